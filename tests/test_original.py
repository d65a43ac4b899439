"""Merging in the original package's own models."""

import copy
from types import SimpleNamespace

import originals
import pytest
import torch
from conftest import LAYERS, PATCHES, make_processor
from originals import IMAGE, ROWS, generate
from peft import LoraConfig, get_peft_model
from prompts import RECIPES

from llava_pitome import MergeConfig, apply, merge_tokens, remove

BEST = MergeConfig.recipe("best", tokens=6)
CONFIGS = [*RECIPES, BEST, MergeConfig(decoder={1: 0.5}, method="fastv")]
PROMPTS = [[1, 5, IMAGE, 6, 7, 8], [1, IMAGE, 9, IMAGE], [1, IMAGE, 4], [1, 5, 9]]  # as ids


@pytest.fixture
def pixels():
    """A picture for each <image>, and one for the prompt without, which the package passes over."""
    return torch.randn(5, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def padded(rows, pixels):
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "images": pixels}


def hooks(model):
    tower = model.get_vision_tower().vision_tower
    modules = [*model.modules(), *tower.modules()]
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_batch_answers_as_its_rows_alone(original, pixels, config):
    inputs = padded(PROMPTS, pixels)
    with merge_tokens(original, config), torch.no_grad():
        together, answers = original(**inputs).logits, generate(original, inputs)
        first = 0
        for row, ids in enumerate(PROMPTS):
            count = max(ids.count(IMAGE), 1)
            alone = padded([ids], pixels[first : first + count])
            first += count
            logits = original(**alone).logits[0]
            torch.testing.assert_close(together[row, -len(logits) :], logits, rtol=0, atol=2e-4)
            assert torch.equal(answers[row], generate(original, alone)[0])


@pytest.mark.parametrize("config", CONFIGS)
def test_prompts_may_be_padded_on_the_right(original, pixels, config):
    original.config.tokenizer_padding_side = "right"
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in PROMPTS])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in PROMPTS])
    with merge_tokens(original, config), torch.no_grad():
        together = original(input_ids=ids, attention_mask=mask, images=pixels).logits
        first = original(**padded(PROMPTS[:1], pixels[:1])).logits[0]
        second = original(**padded(PROMPTS[1:2], pixels[1:3])).logits[0]
    for row, logits in enumerate((first, second)):
        torch.testing.assert_close(together[row, : len(logits)], logits, rtol=0, atol=2e-4)


@pytest.mark.parametrize("config", CONFIGS)
def test_as_many_tokens_arrive_as_the_config_says(original, pixels, config):
    with merge_tokens(original, config), torch.no_grad():
        length = original(**padded(PROMPTS[:1], pixels[:1])).logits.shape[1]
    assert length == config.tokens_at(PATCHES, LAYERS - 1) + len(PROMPTS[0]) - 1


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.decoder])
def test_the_cache_is_shorter_behind_a_layer_that_merges(original, pixels, config):
    with merge_tokens(original, config), torch.no_grad():
        out = original(**padded(PROMPTS[:1], pixels[:1]), use_cache=True)
    kept = config.llm_lengths(config.tokens_at(PATCHES, LAYERS - 1), 3)[:-1]
    lengths = [out.past_key_values.get_seq_length(i) for i in range(3)]
    assert lengths == [n + len(PROMPTS[0]) - 1 for n in kept]


@pytest.mark.parametrize("config", CONFIGS)
def test_after_remove_the_model_is_as_it_was(original, pixels, config):
    inputs = padded(PROMPTS, pixels)
    with torch.no_grad():
        original(**inputs)  # transformers' own hooks come with the first pass
        plain, answers = original(**inputs).logits, generate(original, inputs)
        before, saved = hooks(original), copy.deepcopy(original.config.to_dict())
        weights = {name: x.clone() for name, x in original.state_dict().items()}
        with pytest.raises(ZeroDivisionError), merge_tokens(original, config):
            assert original.config.token_merging == config.to_dict()
            generate(original, inputs)
            raise ZeroDivisionError
        assert torch.equal(original(**inputs).logits, plain)
        assert torch.equal(generate(original, inputs), answers)
    assert hooks(original) == before
    assert original.config.to_dict() == saved
    after = original.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    "config", [MergeConfig(ratio=1.0), MergeConfig(prefix=1.0), MergeConfig(tokens=PATCHES)]
)
def test_what_merges_nothing_changes_no_bit(original, pixels, config):
    inputs = padded(PROMPTS, pixels)
    with torch.no_grad():
        plain = original(**inputs).logits
        with merge_tokens(original, config):
            assert torch.equal(original(**inputs).logits, plain)


def test_merging_changes_the_answer(original, pixels):
    inputs = padded(PROMPTS[:1], pixels[:1])
    with torch.no_grad():
        plain = original(**inputs).logits[0, -1]
        with merge_tokens(original, MergeConfig(ratio=0.8)):
            assert not torch.allclose(original(**inputs).logits[0, -1], plain, atol=1e-3)


@pytest.mark.parametrize("config", [MergeConfig(ratio=0.8), BEST, MergeConfig(prefix=0.3, decoder={0: 0.5})])
def test_the_class_token_may_be_among_the_features(clip_folder, pixels, config):
    original = originals.make_original(clip_folder, mm_vision_select_feature="cls_patch")
    inputs = padded(PROMPTS[:2], pixels[:3])
    with merge_tokens(original, config) as merging, torch.no_grad():
        out = original(**padded(PROMPTS[:1], pixels[:1])).logits
        assert out.shape[1] == config.tokens_at(PATCHES, merging.tower.num_layers) + 1 + len(PROMPTS[0]) - 1
        answers = generate(original, inputs)
        assert torch.equal(answers[:1], generate(original, padded(PROMPTS[:1], pixels[:1])))


@pytest.mark.parametrize("config", [MergeConfig(ratio=0.8), BEST])
def test_prompts_of_text_alone_answer_as_without_merging(original, pixels, config):
    ids = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 4]])
    plain = generate(original, {"input_ids": ids})
    with merge_tokens(original, config):
        generate(original, padded(PROMPTS, pixels))  # what is left of it does not matter
        assert torch.equal(generate(original, {"input_ids": ids}), plain)


@pytest.mark.parametrize("config", [MergeConfig(ratio=0.8), BEST])
def test_pictures_may_come_as_a_list_and_several_at_once(original, pixels, config):
    inputs = padded(PROMPTS, pixels)
    with merge_tokens(original, config), torch.no_grad():
        expected = original(**inputs).logits
        assert torch.equal(original(**inputs | {"images": [*pixels]}).logits, expected)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_model_under_peft_merges_and_learns(original, pixels, config):
    wrapped = get_peft_model(original, LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], r=2))
    inputs = padded(PROMPTS, pixels)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] <= 0, -100)
    with merge_tokens(wrapped, config):
        loss = wrapped(**inputs, labels=labels).loss
        loss.backward()
    grads = {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}
    assert loss.isfinite()
    assert all((g is None) == ("vision_tower" in n) for n, g in grads.items())
    assert sum(g.abs().sum() for g in grads.values() if g is not None) > 0


@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_reach_the_projector_but_not_the_tower_as_in_the_package(original, pixels, config):
    original.get_vision_tower().requires_grad_(True)
    inputs = padded(PROMPTS, pixels)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] <= 0, -100)
    with merge_tokens(original, config):
        original(**inputs, labels=labels).loss.backward()
    assert original.model.mm_projector[0].weight.grad.abs().sum() > 0
    assert original.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in original.get_vision_tower().parameters())


def test_a_copy_of_a_merging_model_merges_by_itself(original, pixels):
    inputs = padded(PROMPTS, pixels)
    with torch.no_grad():
        plain = original(**inputs).logits
        apply(original, BEST)
        copied = copy.deepcopy(original)
        expected = original(**inputs).logits
        remove(original)
        assert torch.equal(copied(**inputs).logits, expected)
        remove(copied)
        assert torch.equal(copied(**inputs).logits, plain)


# What is refused


@pytest.mark.parametrize(
    "name, value",
    [
        ("image_aspect_ratio", "anyres"),
        ("mm_patch_merge_type", "spatial"),
        ("mm_patch_merge_type", "spatial_unpad"),
    ],
)
def test_features_that_are_laid_out_in_a_grid_raise(original, name, value):
    setattr(original.config, name, value)
    with pytest.raises(ValueError, match="is not supported: it cuts a picture into tiles"):
        apply(original, MergeConfig(ratio=0.9))
    assert not hasattr(original.config, "token_merging")


def test_a_tower_that_is_not_loaded_raises(original):
    original.get_vision_tower().is_loaded = False
    with pytest.raises(ValueError, match=r"get_vision_tower\(\)\.load_model\(\) first"):
        apply(original, MergeConfig(ratio=0.9))


def test_a_model_without_tower_raises(original):
    original.model.vision_tower = None
    with pytest.raises(ValueError, match="no vision tower"):
        apply(original, MergeConfig(ratio=0.9))


def test_a_tower_of_another_class_raises(original):
    class CLIPVisionTowerS2(type(original.get_vision_tower())):
        pass

    original.get_vision_tower().__class__ = CLIPVisionTowerS2
    with pytest.raises(
        ValueError, match=r"CLIPVisionTowerS2 is not supported.* allowed is a CLIPVisionTower"
    ):
        apply(original, MergeConfig(ratio=0.9))


def test_an_unknown_choice_of_features_raises(original):
    original.get_vision_tower().select_feature = "slices"
    with pytest.raises(ValueError, match="'slices' is unknown; allowed are 'patch' and 'cls_patch'"):
        apply(original, MergeConfig(ratio=0.9))


def test_a_processor_raises(original):
    with pytest.raises(ValueError, match="leave processor=LlavaProcessor out"):
        apply(original, MergeConfig(ratio=0.9), make_processor())


def test_layers_that_the_language_model_does_not_have_raise(original):
    with pytest.raises(ValueError, match="7"):
        apply(original, MergeConfig(decoder={7: 0.5}))


def test_another_class_of_the_package_raises(original):
    class LlavaMptForCausalLM(torch.nn.Module):
        config = SimpleNamespace()

    with pytest.raises(ValueError, match=r"LlavaMptForCausalLM is not supported. Supported: Llava"):
        apply(LlavaMptForCausalLM(), MergeConfig(ratio=0.9))


def test_a_picture_that_is_cut_at_the_end_of_a_long_prompt_raises_inside_the_language_model(original, pixels):
    original.config.tokenizer_model_max_length = 20
    inputs = padded(PROMPTS[:1], pixels[:1])
    whole = MergeConfig(decoder={0: 0.5})
    with merge_tokens(original, whole), pytest.raises(ValueError, match="beginning of an image only"):
        original(**inputs)
    with merge_tokens(original, MergeConfig(tokens=9, decoder={0: 0.5})), torch.no_grad():
        assert original(**inputs).logits.shape == (1, 9 + 5, ROWS)
