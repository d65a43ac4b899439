"""Merging in models of the original package."""

import copy
import gc
import weakref
from types import SimpleNamespace

import originals
import pytest
import torch
from conftest import LAYERS, PATCHES, make_processor
from originals import IMAGE, ROWS, generate, pad
from prompts import RECIPES

from llava_pitome import MergeConfig, apply, merge_tokens, remove
from llava_pitome.api import applied

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")
BEST = MergeConfig.recipe("best", tokens=6)
CONFIGS = [*RECIPES, BEST, MergeConfig(decoder={1: 0.5}, method="fastv")]
PROMPTS = [[1, 5, IMAGE, 6, 7, 8], [1, IMAGE, 9, IMAGE], [1, IMAGE, 4], [1, 5, 9]]  # as ids
WORDS = len(PROMPTS[0]) - 1  # tokens of text in the first one


@pytest.fixture
def pixels():
    """An image for each <image>, and one for the prompt without, which the package skips."""
    return torch.randn(5, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def inputs(pixels):
    return pad(PROMPTS, pixels)


def first_prompt(pixels):
    return pad(PROMPTS[:1], pixels[:1])


def hook_counts(model):
    modules = [*model.modules(), *model.get_vision_tower().vision_tower.modules()]
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("config", CONFIGS)
def test_rows_of_a_padded_batch_are_independent(original, pixels, config, left):
    original.config.tokenizer_padding_side = "left" if left else "right"
    inputs, first = pad(PROMPTS, pixels, left), 0
    with merge_tokens(original, config), torch.no_grad():
        batch = original(**inputs).logits
        answers = generate(original, inputs) if left else None
        for row, ids in enumerate(PROMPTS):
            count = max(ids.count(IMAGE), 1)
            alone = pad([ids], pixels[first : first + count])
            first += count
            logits = original(**alone).logits[0]
            same = batch[row, -len(logits) :] if left else batch[row, : len(logits)]
            torch.testing.assert_close(same, logits, rtol=0, atol=2e-4)
            assert not left or torch.equal(answers[row], generate(original, alone)[0])


@pytest.mark.parametrize("config", CONFIGS)
def test_prompt_and_cache_lengths_are_those_of_the_config(original, pixels, config):
    tokens = config.tokens_at(PATCHES, LAYERS - 1)
    with merge_tokens(original, config), torch.no_grad():
        out = original(**first_prompt(pixels), use_cache=True)
    kept = config.llm_lengths(tokens, 3)
    assert out.logits.shape[1] == tokens + WORDS
    assert [out.past_key_values.get_seq_length(i) for i in range(3)] == [n + WORDS for n in kept[:-1]]


@pytest.mark.parametrize("config", CONFIGS[::3])
def test_a_merging_model_is_freed(clip_folder, inputs, config):
    model = originals.make_original(clip_folder)
    apply(model, config)
    model(**inputs, labels=inputs["input_ids"].clamp(min=0)).loss.backward()
    reference = weakref.ref(model.get_model().layers[0])
    del model
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("config", CONFIGS[::3])
def test_a_copy_merges_and_a_tower_outside_of_the_modules_is_given_back(original, inputs, config):
    with torch.no_grad():
        plain = original(**inputs).logits
        original.get_model().vision_tower = [original.get_model()._modules.pop("vision_tower")]  # as for FSDP
        with merge_tokens(original, config):
            expected, other = original(**inputs).logits, copy.deepcopy(original)
            assert applied(other) == applied(original) == config
            assert torch.equal(other(**inputs).logits, expected)
        assert applied(original) is None and torch.equal(original(**inputs).logits, plain)
        remove(other)
        assert applied(other) is None and torch.equal(other(**inputs).logits, plain)


@pytest.mark.parametrize("config", CONFIGS)
def test_remove_restores_the_model(original, inputs, config):
    with torch.no_grad():
        original(**inputs)  # installs transformers' own hooks
        plain, answers = original(**inputs).logits, generate(original, inputs)
        hooks, saved = hook_counts(original), copy.deepcopy(original.config.to_dict())
        weights = {name: x.clone() for name, x in original.state_dict().items()}
        with pytest.raises(ZeroDivisionError), merge_tokens(original, config):
            assert original.config.token_merging == config.to_dict()
            generate(original, inputs)
            raise ZeroDivisionError
        assert torch.equal(original(**inputs).logits, plain)
        assert torch.equal(generate(original, inputs), answers)
    assert hook_counts(original) == hooks
    assert original.config.to_dict() == saved
    after = original.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], weights[name]) for name in weights)


def test_the_answer_changes_only_where_something_merges(original, inputs, pixels):
    with torch.no_grad():
        plain = original(**inputs).logits
        for config in (MergeConfig(ratio=1.0), MergeConfig(prefix=1.0), MergeConfig(tokens=PATCHES)):
            with merge_tokens(original, config):
                assert torch.equal(original(**inputs).logits, plain)
        plain = original(**first_prompt(pixels)).logits[0, -1]
        with merge_tokens(original, MergeConfig(ratio=0.8)):
            assert not torch.allclose(original(**first_prompt(pixels)).logits[0, -1], plain, atol=1e-3)


@pytest.mark.parametrize("config", [MergeConfig(ratio=0.8), BEST, MergeConfig(prefix=0.3, decoder={0: 0.5})])
def test_the_class_token_may_be_a_feature(clip_folder, pixels, config):
    original = originals.make_original(clip_folder, mm_vision_select_feature="cls_patch")
    with merge_tokens(original, config), torch.no_grad():
        length = original(**first_prompt(pixels)).logits.shape[1]
        assert length == config.tokens_at(PATCHES, LAYERS - 1) + 1 + WORDS
        answers = generate(original, pad(PROMPTS[:2], pixels[:3]))
        assert torch.equal(answers[:1], generate(original, first_prompt(pixels)))


@pytest.mark.parametrize("config", [MergeConfig(ratio=0.8), BEST])
def test_text_prompts_answer_as_without_merging(original, inputs, config):
    text = pad([[1, 5, 6, 7], [1, 8, 9, 4]], None)
    plain = generate(original, text)
    with merge_tokens(original, config):
        generate(original, inputs)  # whose state must not be used again
        assert torch.equal(generate(original, text), plain)


@pytest.mark.parametrize("config", [MergeConfig(ratio=0.8), BEST])
def test_images_may_be_a_list(original, inputs, pixels, config):
    with merge_tokens(original, config), torch.no_grad():
        expected = original(**inputs).logits
        assert torch.equal(original(**inputs | {"images": [*pixels]}).logits, expected)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_model_under_peft_merges_and_learns(original, inputs, config):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(original, LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], r=2))
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] <= 0, -100)
    with merge_tokens(wrapped, config):
        loss = wrapped(**inputs, labels=labels).loss
        loss.backward()
    grads = {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}
    assert loss.isfinite()
    assert all((g is None) == ("vision_tower" in n) for n, g in grads.items())
    assert sum(g.abs().sum() for g in grads.values() if g is not None) > 0


@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_reach_the_projector_but_not_the_tower_as_in_the_package(original, inputs, config):
    original.get_vision_tower().requires_grad_(True)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] <= 0, -100)
    with merge_tokens(original, config):
        original(**inputs, labels=labels).loss.backward()
    assert original.model.mm_projector[0].weight.grad.abs().sum() > 0
    assert original.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in original.get_vision_tower().parameters())


def test_a_copy_of_a_merging_model_merges_by_itself(original, inputs):
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


def set_config(name, value):
    return lambda model: setattr(model.config, name, value)


def set_tower(name, value):
    return lambda model: setattr(model.get_vision_tower(), name, value)


class CLIPVisionTowerS2(torch.nn.Module):
    is_loaded = True


@pytest.mark.parametrize(
    "change, message",
    [
        (set_config("image_aspect_ratio", "anyres"), "is not supported: it cuts an image into tiles"),
        (set_config("mm_patch_merge_type", "spatial"), "is not supported: it cuts an image into tiles"),
        (set_config("mm_patch_merge_type", "spatial_unpad"), "is not supported: it cuts an image into tiles"),
        (set_tower("is_loaded", False), r"get_vision_tower\(\)\.load_model\(\) first"),
        (set_tower("select_feature", "slices"), "'slices' is unknown; allowed are 'patch' and 'cls_patch'"),
        (lambda model: setattr(model.model, "vision_tower", None), "no vision tower"),
        (
            lambda model: setattr(model.model, "vision_tower", CLIPVisionTowerS2()),
            "CLIPVisionTowerS2 is not supported.* allowed is a CLIPVisionTower",
        ),
    ],
)
def test_an_unsupported_model_raises_and_stays_as_it_was(original, change, message):
    change(original)
    with pytest.raises(ValueError, match=message):
        apply(original, MergeConfig(ratio=0.9))
    assert not hasattr(original.config, "token_merging")


def test_an_unsupported_argument_raises(original):
    with pytest.raises(ValueError, match="leave processor=LlavaProcessor out"):
        apply(original, MergeConfig(ratio=0.9), make_processor())
    with pytest.raises(ValueError, match="7"):
        apply(original, MergeConfig(decoder={7: 0.5}))

    class LlavaMptForCausalLM(torch.nn.Module):
        config = SimpleNamespace()

    with pytest.raises(ValueError, match=r"LlavaMptForCausalLM is not supported. Supported: Llava"):
        apply(LlavaMptForCausalLM(), MergeConfig(ratio=0.9))


def test_an_image_truncated_with_its_prompt_raises_inside_the_language_model(original, pixels):
    original.config.tokenizer_model_max_length = 20
    inputs = first_prompt(pixels)
    with (
        merge_tokens(original, MergeConfig(decoder={0: 0.5})),
        pytest.raises(ValueError, match="beginning of an image only"),
    ):
        original(**inputs)
    with merge_tokens(original, MergeConfig(tokens=9, decoder={0: 0.5})), torch.no_grad():
        assert original(**inputs).logits.shape == (1, 9 + WORDS, ROWS)
