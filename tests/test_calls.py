"""What a merging model is called with: what contradicts the config is refused."""

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import PATCH, PATCHES, make_model, make_processor
from precise import answer, padded, precise
from prompts import PROMPTS, single
from test_tower import images, state
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import output_capturing

from llava_pitome import MergeConfig, apply, merge_tokens, remove
from llava_pitome.api import applied

SELECTS_LAYERS = hasattr(output_capturing, "select_hidden_states")
BEST = MergeConfig.recipe("best", tokens=6)
CONFIGS = [
    MergeConfig(ratio=0.8), MergeConfig(prefix=9), MergeConfig(decoder={0: 0.5}), BEST, MergeConfig(ratio=1.0)
]  # fmt: skip


@pytest.fixture
def ran(model):
    """Layers of the language model that ran."""
    found = []
    model.model.language_model.layers[0].register_forward_hook(lambda *_: found.append(1))
    return found


# Other features than those that merge


@pytest.mark.parametrize(
    "options, message",
    [
        ({"vision_feature_layer": -1}, "vision_feature_layer=-1 contradicts 7 of 8"),
        ({"vision_feature_layer": 3}, "vision_feature_layer=3 contradicts 7 of 8"),
        ({"vision_feature_layer": 99}, "vision_feature_layer=99 is not allowed"),
        ({"vision_feature_layer": [-2, -1]}, "vision_feature_layer=[-2, -1] contradicts 7 of 8"),
        ({"vision_feature_select_strategy": "full"}, "'full' contradicts 'default'"),
        ({"vision_feature_select_strategy": "ful"}, "'ful' contradicts 'default'"),
    ],
)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("call", ["forward", "generate", "get_image_features"])
def test_other_features_than_those_that_merge_raise(
    call, config, options, message, model, processor, pictures, ran
):
    if call == "get_image_features" and not SELECTS_LAYERS:
        pytest.skip("this transformers reads the layer from all hidden states, after the tower")
    apply(model, config, processor)
    inputs = single(processor, PROMPTS[0], pictures)
    with pytest.raises(ValueError) as error, torch.no_grad():
        if call == "forward":
            model(**inputs, **options)
        elif call == "generate":
            model.generate(**inputs, **options, max_new_tokens=2)
        else:
            model.get_image_features(pixel_values=inputs["pixel_values"], **options)
    if options.get("vision_feature_select_strategy") != "ful" or call == "forward":
        assert message in str(error.value)
    assert not ran


@pytest.mark.parametrize("config", CONFIGS)
def test_features_that_are_those_that_merge_may_be_named(config, processor, pictures):
    model = make_model()
    with merge_tokens(model, config, processor), torch.no_grad():
        inputs = single(processor, PROMPTS[0], pictures)
        expected = model(**inputs).logits
        for layer in (-2, 7):
            named = {"vision_feature_layer": layer, "vision_feature_select_strategy": "default"}
            assert torch.equal(model(**inputs, **named).logits, expected)


@pytest.mark.parametrize(
    "field, value", [("vision_feature_layer", -1), ("vision_feature_select_strategy", "full")]
)
def test_a_config_that_is_changed_after_apply_raises(field, value, model, processor, pictures):
    apply(model, MergeConfig(ratio=0.8), processor)
    setattr(model.config, field, value)
    with pytest.raises(ValueError, match=f"{field}=.* contradicts"):
        model(**single(processor, PROMPTS[0], pictures))


# Features from elsewhere


def encode(model, x):
    return model.model.vision_tower(x, output_hidden_states=True).hidden_states[-2][:, 1:]


@pytest.mark.parametrize(
    "config", [MergeConfig(ratio=0.9, prefix=9), MergeConfig(ratio=0.9, prefix=9, method="tome")]
)
def test_features_from_elsewhere_are_given_no_sizes(config):
    model = make_model()
    with merge_tokens(model, config) as handle, torch.no_grad():
        features = encode(model, images())
        other = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
        mixed = torch.cat([features[:1], other[1:]])
        for given in (other, mixed, features + 1e-6, features.flip(0), features[:, :-1]):
            with merge_tokens(model, config):
                alone = model.model.multi_modal_projector(given)
            encode(model, images())
            assert torch.equal(model.model.multi_modal_projector(given), alone)
            assert torch.equal(handle.sizes().sum(1), torch.full((len(given),), float(given.shape[1])))


@pytest.mark.parametrize("method", ["visionzip", "tome"])
def test_features_from_elsewhere_have_no_keys(method):
    model = make_model()
    with merge_tokens(model, MergeConfig(prefix=9, method=method, prefix_metric="keys")), torch.no_grad():
        features = encode(model, images())
        with pytest.raises(RuntimeError, match="did not compute right before"):
            model.model.multi_modal_projector(features + 1)
        assert model.model.multi_modal_projector(features).shape[1] == 9


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_features_that_are_cast_on_their_way_are_recognised(dtype):
    model = make_model()
    model.model.multi_modal_projector.to(dtype)
    with merge_tokens(model, MergeConfig(ratio=0.9, prefix=9)) as handle, torch.no_grad():
        model.model.multi_modal_projector(encode(model, images()).to(dtype))
        assert handle.sizes().sum(1).tolist() == [PATCHES] * 2


@pytest.mark.parametrize("config", [BEST, MergeConfig(ratio=0.8, positions="original")])
def test_features_of_a_plain_model_raise_where_sizes_and_positions_count(config, model, processor, pictures):
    inputs = single(processor, PROMPTS[0], pictures)
    with torch.no_grad():
        encoded = model.get_image_features(pixel_values=inputs.pop("pixel_values"))
        with merge_tokens(model, config), pytest.raises(RuntimeError, match="encoded last"):
            model(**inputs, mm_encoder_outputs={"image": encoded})


def test_features_that_were_encoded_before_apply_merge_in_the_language_model(model, processor, pictures):
    config, inputs = MergeConfig(decoder={0: 0.5}), single(processor, PROMPTS[0], pictures)
    with torch.no_grad():
        encoded = model.get_image_features(pixel_values=inputs["pixel_values"])
        with merge_tokens(model, config):
            expected = model(**inputs).logits
            inputs.pop("pixel_values")
            assert torch.equal(model(**inputs, mm_encoder_outputs={"image": encoded}).logits, expected)


# Generation without a cache


@pytest.mark.parametrize("method", ["fastv", "sparsevlm"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}])
def test_generating_without_a_cache_raises_where_the_prompt_decides(
    method, options, model, processor, pictures
):
    with merge_tokens(model, MergeConfig(method=method, decoder={0: 5}), processor):
        inputs = single(processor, PROMPTS[0], pictures)
        with pytest.raises(ValueError, match=f"use_cache=False is not allowed where method '{method}'"):
            model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, use_cache=False, **options)
        with torch.no_grad():
            kept = {"use_cache": False, "logits_to_keep": 1}
            whole, found = model(**inputs).logits, model(**inputs, **kept).logits  # a single pass is right
            torch.testing.assert_close(found, whole[:, -1:], rtol=0, atol=1e-5)
            longer = inputs | {"input_ids": torch.cat([inputs["input_ids"], torch.tensor([[5]])], 1)}
            longer.pop("attention_mask", None)
            with pytest.raises(ValueError, match="use_cache=False is not allowed"):
                model(**longer, **kept)  # as transformers generated before it encoded images first


@pytest.mark.parametrize(
    "config", [MergeConfig(decoder={0: 5}), BEST, MergeConfig(method="fastv", prefix=1.0)]
)
def test_generating_without_a_cache_is_generating_with_one_elsewhere(config, pictures):
    model, processor = precise(make_model()), make_processor()
    with merge_tokens(model, config, processor):
        inputs = padded(processor, PROMPTS, pictures)
        assert torch.equal(answer(model, inputs, use_cache=False), answer(model, inputs))


# Attention implementations that are set after apply


@pytest.mark.parametrize("config", CONFIGS[:4])
@pytest.mark.parametrize("whole", [True, False])
def test_flex_attention_that_is_set_after_apply_is_named(config, whole, model, processor, pictures):
    apply(model, config, processor)
    inputs = single(processor, PROMPTS[0], pictures)
    if whole:
        model.set_attn_implementation("flex_attention")
    else:
        model.model.vision_tower.config._attn_implementation = "flex_attention"
        model.model.language_model.config._attn_implementation = "flex_attention"
    if config.merges_in_tower or config.reaches_llm:
        with pytest.raises(ValueError, match="attn_implementation='flex_attention'"):
            model(**inputs)
    remove(model)
    assert model.model.vision_tower.config._attn_implementation == "flex_attention"


# Processors


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize(
    "field, value",
    [
        ("patch_size", PATCH - 1), ("patch_size", None), ("num_additional_image_tokens", 2),
        ("num_additional_image_tokens", 5), ("vision_feature_select_strategy", "other"),
        ("vision_feature_select_strategy", None),
    ],
)  # fmt: skip
def test_a_processor_that_does_not_fit_is_refused(field, value, tower, pictures):
    model, processor = make_model(tower), make_processor(tower)
    setattr(processor, field, value)
    before = state(model), sorted(vars(processor))
    with pytest.raises(ValueError, match=field):
        apply(model, MergeConfig(ratio=0.8), processor)
    assert (state(model), sorted(vars(processor))) == before


@pytest.mark.parametrize("extra, strategy", [(0, "default"), (1, "full"), (2, "full"), (2, "default")])
def test_a_processor_that_counts_other_tokens_is_refused(extra, strategy, model, processor):
    processor.num_additional_image_tokens, processor.vision_feature_select_strategy = extra, strategy
    with pytest.raises(ValueError, match="the model makes \\+0 tokens"):
        apply(model, MergeConfig(ratio=0.8), processor)


def test_a_processor_that_counts_the_same_by_other_settings_is_taken(model, processor, pictures):
    processor.num_additional_image_tokens, processor.vision_feature_select_strategy = 0, "full"
    with merge_tokens(model, MergeConfig(ratio=0.8), processor), torch.no_grad():
        model(**single(processor, PROMPTS[0], pictures))


def count(processor, pictures):
    return (single(processor, PROMPTS[0], pictures)["input_ids"] == 4).sum().item()


def test_models_that_share_a_processor_stop_in_any_order(processor, pictures):
    first, second, third = (make_model(seed=i) for i in range(3))
    apply(first, MergeConfig(tokens=9), processor)
    with merge_tokens(second, MergeConfig(tokens=7), processor):
        assert count(processor, pictures) == 7
        with merge_tokens(first, MergeConfig(tokens=5), processor):
            assert count(processor, pictures) in (5, 7)
        assert count(processor, pictures) == 7
        apply(third, MergeConfig(tokens=3), processor)
    assert count(processor, pictures) == 3
    remove(first)
    assert count(processor, pictures) == 3
    own = copy.deepcopy(processor)
    remove(third)
    assert count(processor, pictures) == PATCHES and sorted(vars(processor)) == sorted(vars(make_processor()))
    assert count(own, pictures) in (3, PATCHES)


@pytest.mark.parametrize("inner", [MergeConfig(tokens=5), None])
def test_a_processor_outlives_a_model_that_was_never_removed(inner, processor, pictures):
    model, other = make_model(), make_model(seed=1)
    apply(other, MergeConfig(tokens=9), processor)
    apply(model, MergeConfig(tokens=7), processor)
    del model
    gc.collect()
    assert count(processor, pictures) == 9
    remove(other)
    assert count(processor, pictures) == PATCHES


# Nested contexts


@pytest.mark.parametrize("config", CONFIGS[:4])
def test_the_outer_handle_goes_on_after_an_inner_block(config, model, processor, pictures):
    with merge_tokens(model, config, processor) as outer:
        for inner in (MergeConfig(tokens=3), config, BEST):
            with pytest.raises(KeyError), merge_tokens(model, inner, processor), torch.no_grad():
                model(**single(processor, PROMPTS[0], pictures))
                raise KeyError
            assert applied(model) == config and outer.plans() == []
            with torch.no_grad():
                model(**single(processor, PROMPTS[0], pictures))
            assert (
                len(outer.plans()) == len(config.lengths(PATCHES, 7)) - 1 or outer.plans() or config.decoder
            )
            assert outer.sizes() is None or outer.sizes().sum() == PATCHES


def test_numbers_of_numpy_name_layers(model, processor, pictures):
    with merge_tokens(model, MergeConfig(decoder={np.int64(0): 0.5}), processor), torch.no_grad():
        assert model(**single(processor, PROMPTS[0], pictures)).logits.isfinite().all()


# Stages that do not follow each other at once


@pytest.mark.parametrize("config", [MergeConfig(ratio=0.9, prefix=9), BEST])
def test_features_of_many_passes_are_projected_in_any_order_and_again(config):
    model = make_model()
    pixels = [images(batch=1, seed=i) for i in range(12)]
    with merge_tokens(model, config), torch.no_grad():
        alone = [model.model.multi_modal_projector(encode(model, x)) for x in pixels]
        features = [encode(model, x) for x in pixels]
        for _ in range(2):
            assert all(torch.equal(model.model.multi_modal_projector(x), y) for x, y in zip(features, alone))


@pytest.mark.parametrize("config", [BEST, MergeConfig(ratio=0.8, llm_proportional=True)])
def test_prompts_whose_images_were_encoded_in_turn_are_answered_in_any_order(config, processor, pictures):
    model = make_model()
    with merge_tokens(model, config, processor), torch.no_grad():
        prompts = [single(processor, PROMPTS[0], pictures[i:]) for i in range(4)]
        alone = [model(**inputs).logits for inputs in prompts]
        encoded = [model.get_image_features(pixel_values=inputs.pop("pixel_values")) for inputs in prompts]
        for i in (2, 0, 3, 1):
            found = model(**prompts[i], mm_encoder_outputs={"image": encoded[i]}).logits
            assert torch.equal(found, alone[i])


@pytest.mark.parametrize("config", [BEST, MergeConfig(ratio=0.8, positions="original")])
def test_features_that_another_thread_computed_raise_where_sizes_count(config, processor, pictures):
    model, inputs = make_model(), single(processor, PROMPTS[0], pictures)
    with merge_tokens(model, config, processor), torch.no_grad():
        inputs = single(processor, PROMPTS[0], pictures)
        with ThreadPoolExecutor(1) as pool:
            features = pool.submit(torch.no_grad()(encode), model, inputs.pop("pixel_values")).result()
        encoded = BaseModelOutputWithPooling(pooler_output=list(model.model.multi_modal_projector(features)))
        with pytest.raises(RuntimeError, match="encoded last"):
            model(**inputs, mm_encoder_outputs={"image": encoded})


def test_a_block_without_a_config_takes_up_the_one_in_force(model, processor, pictures):
    apply(model, MergeConfig(tokens=7))
    with merge_tokens(model, processor=processor):
        assert applied(model).tokens == count(processor, pictures) == 7
    assert applied(model).tokens == 7 and count(processor, pictures) == PATCHES


# Processors of models that are gone, and their copies


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_processor_and_its_copies_outlive_a_model_that_ran(copied, processor, pictures):
    model = make_model()
    apply(model, MergeConfig(tokens=7), processor)
    with torch.no_grad():
        model(**single(processor, PROMPTS[0], pictures))
    own = copied(processor)
    assert count(own, pictures) == 7
    del model
    gc.collect()
    assert count(processor, pictures) == PATCHES == count(copied(processor), pictures)


def test_a_shallow_copy_of_a_processor_writes_its_own_placeholders_after_remove(model, processor, pictures):
    apply(model, MergeConfig(tokens=7), processor)
    own = copy.copy(processor)
    remove(model)
    assert count(own, pictures) == count(processor, pictures) == PATCHES


def test_removing_a_copy_of_a_model_that_is_gone_gives_the_processor_back(processor, pictures):
    model = make_model()
    apply(model, MergeConfig(tokens=7), processor)
    model = copy.deepcopy(model)
    gc.collect()
    remove(model)
    assert count(processor, pictures) == PATCHES
