"""What would give another answer than was asked for, and must raise instead or work."""

import pickle

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, get_peft_model
from prompts import PROMPTS, RECIPES, batch, generate, single

from llava_pitome import MergeConfig, apply, merge_tokens, remove

BEST = MergeConfig.recipe("best", tokens=6)


@pytest.mark.parametrize("config", [*RECIPES, BEST])
def test_a_merging_model_can_be_pickled(model, processor, pictures, config):
    with merge_tokens(model, config, processor), torch.no_grad():
        inputs = batch(processor, PROMPTS, pictures)
        copy = pickle.loads(pickle.dumps(model))
        assert torch.equal(copy(**inputs).logits, model(**inputs).logits)


def test_wrapping_keys_of_the_language_model_after_apply_raises(model, processor, pictures):
    apply(model, MergeConfig(decoder={0: 0.5}), processor)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["k_proj"], r=2))
    with pytest.raises(RuntimeError, match="wrapped after apply"):
        wrapped(**single(processor, PROMPTS[0], pictures))


def test_keys_of_the_tower_that_are_wrapped_after_apply_count(processor, pictures):
    found = []
    for first in (True, False):
        model, lora = (
            make_model(),
            LoraConfig(target_modules=r".*vision_tower.*k_proj", init_lora_weights=False),
        )
        torch.manual_seed(1)
        if first:
            get_peft_model(model, lora)
        apply(model, MergeConfig(ratio=0.8), processor)
        if not first:
            get_peft_model(model, lora)
        with torch.no_grad():
            found.append(model.eval()(**single(processor, PROMPTS[0], pictures)).logits)
        remove(model)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "other",
    [{"positions": "packed"}, {"llm_proportional": False}, {"positions": "packed", "decoder": {0: 0.5}}],
)
def test_a_cache_goes_on_only_as_it_was_filled(model, processor, pictures, other):
    with merge_tokens(model, BEST, processor), torch.no_grad():
        cache = model(**single(processor, PROMPTS[0], pictures), use_cache=True).past_key_values
    config = MergeConfig.recipe("best", tokens=6, **other)
    if not config.reaches_llm:
        config = MergeConfig.recipe("best", tokens=6, **other, decoder={1: 0.5})
    with merge_tokens(model, config, processor), pytest.raises(RuntimeError, match="another merge config"):
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)


def test_embeddings_without_ids_raise(model, processor, pictures):
    with merge_tokens(model, BEST, processor), pytest.raises(ValueError, match="needs input_ids"):
        model(inputs_embeds=torch.zeros(1, 9, 32))


def test_another_method_in_a_recipe_takes_none_of_its_parameters():
    config = MergeConfig.recipe("best", tokens=9, method="tome", ratio=None)
    assert (config.method, config.parameters, config.prefix_share) == ("tome", {}, 0.5)


@pytest.mark.parametrize("side", [(1, 20), (20, 1), (7, 6)])
def test_no_side_of_a_picture_grows(model, processor, side):
    with pytest.raises(ValueError, match=r"resize=.* does not fit"):
        apply(model, MergeConfig(resize=side), processor)


def test_depths_that_hold_no_layer_raise(model):
    with pytest.raises(ValueError, match="holds none of the 7 layers"):
        apply(model, MergeConfig(ratio=0.5, depths=(0.99, 1.0)))


def test_features_of_nothing_but_nan_are_known_again(model, processor, pictures):
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.bias.fill_(torch.nan)
    with merge_tokens(model, BEST, processor):
        assert generate(model, single(processor, PROMPTS[0], pictures)).shape == (1, 6)
