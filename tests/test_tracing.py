"""Traces agree with the plans of the hooks, and recording changes nothing."""

import numpy as np
import pytest
import torch
from conftest import LAYERS, PATCH, PATCHES, SIDE, make_model, make_processor
from PIL import Image
from torch.nn import functional as F

from llava_pitome import METHODS, MergeConfig, apply, merge_tokens, remove
from llava_pitome.merge import plan as plans
from llava_pitome.methods.pitome import PiToMe
from llava_pitome.models import hf_llava as llava
from llava_pitome.tracing import as_image, record_merges, trace_image

PROMPT = "<image> what is this"
FEATURE = LAYERS - 1
IN_TOWER = [name for name, method in METHODS.items() if "tower" in method.places]
AMOUNTS = {"tower": {"ratio": 0.8}, "prefix": {"prefix": 9}, "decoder": {"decoder": {0: 20, 1: 7}}}


def trace(model, processor, image, config):
    return trace_image(model, processor, image, config, PROMPT).trace


def pixels(processor, images):
    return processor.image_processor(images, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("method", IN_TOWER)
def test_states_are_those_of_the_plans_for_every_image_of_a_batch(method, model, processor, pictures):
    config = MergeConfig(ratio=0.8, method=method)
    with merge_tokens(model, config) as handle, record_merges(handle) as recorder, torch.no_grad():
        llava.encode(model, pixels(processor, pictures))
        traces, slots = [recorder.trace(i) for i in range(len(pictures))], plans.trace(handle.plans())
    lengths = config.lengths(PATCHES, FEATURE)
    for found, slot in zip(traces, slots):
        assert torch.equal(found.after("tower", FEATURE - 1).slot, slot)
        assert found.after("decoder", 99) == found.after("tower", FEATURE - 1)
        assert tuple(found.after("tower", i).tokens for i in range(FEATURE)) == lengths[1:]
        assert all(len(found.after("tower", i).slot.unique()) == lengths[i + 1] for i in range(FEATURE))


@pytest.mark.parametrize("method, place", [(n, p) for n, m in METHODS.items() for p in m.places])
def test_every_method_is_traced_in_every_place(method, place, model, processor, pictures):
    once = METHODS[method].needs_grid and place == "decoder"
    amount = {"decoder": {0: 9}} if once else AMOUNTS[place]
    found = trace(model, processor, pictures[1], MergeConfig(method=method, **amount))
    assert found.patches == PATCHES
    assert {merge.place for merge in found.merges} == {place}
    state = found.initial
    for merge in found.merges:
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(merge.before, state))
        state = merge.after
        assert sorted(state.slot.unique().tolist()) == list(range(state.tokens))
        assert (state.dropped | ~merge.before.dropped).all()  # a dropped patch stays dropped
    tower = MergeConfig(ratio=0.8).tokens_at(PATCHES, FEATURE)
    assert state.tokens == {"tower": tower, "prefix": 9, "decoder": 9 if once else 7}[place]


@pytest.mark.parametrize("method", ["fastv", "divprune"])
def test_pruning_methods_leave_one_patch_per_token(method, model, processor, pictures):
    place = METHODS[method].places[0]
    found = trace(model, processor, pictures[1], MergeConfig(method=method, **AMOUNTS[place]))
    last = found.merges[-1].after
    assert int((~last.dropped).sum()) == last.tokens


@pytest.mark.parametrize("method", ["pitome", "tome", "random"])
def test_averaging_methods_drop_nothing(method, model, processor, pictures):
    found = trace(model, processor, pictures[1], MergeConfig(ratio=0.7, method=method))
    assert not found.merges[-1].after.dropped.any()


def test_merges_are_in_the_order_tower_projector_language_model(model, processor, pictures):
    found = trace(model, processor, pictures[2], MergeConfig(ratio=0.95, prefix=12, decoder={1: 5}))
    assert [m.place for m in found.merges][-2:] == ["prefix", "decoder"]
    assert found.after("tower", FEATURE - 1).tokens > found.after("prefix").tokens == 12
    assert found.after("decoder", 0).tokens == 12 and found.after("decoder", 1).tokens == 5
    assert found.merge("prefix") is found.merges[-2] and found.merge("decoder", 1).layer == 1
    assert found.merge("decoder", 0) is None


@pytest.mark.parametrize(
    "ratio, layers, tokens",
    [
        ((1.0, 0.5, 1.0, 1.0, 0.5, 1.0, 1.0), [1, 4], [36, 18, 18, 18, 9, 9, 9]),
        (1.0, [], [36] * 7),
    ],
)
def test_layers_that_do_not_merge_have_no_merge(ratio, layers, tokens, model, processor, pictures):
    found = trace(model, processor, pictures[2], MergeConfig(ratio=ratio))
    assert [m.layer for m in found.merges] == layers
    assert [found.after("tower", i).tokens for i in range(7)] == tokens
    assert found.after("tower", 0).slot.tolist() == list(range(PATCHES))


def test_the_energy_is_that_of_the_towers_keys(model, processor, pictures):
    """No token has merged before the first layer, so that a dense forward pass has the same keys."""
    outputs = []
    layer = model.model.vision_tower.encoder.layers[0].self_attn
    hook = layer.k_proj.register_forward_hook(lambda _m, _a, keys: outputs.append(keys))
    with torch.no_grad():
        llava.encode(model, pixels(processor, pictures[1]))
    hook.remove()
    keys = outputs[0][0, 1:].unflatten(-1, (layer.num_heads, -1)).mean(1)  # without the class token
    unit = F.normalize(keys, dim=-1)
    cosines = unit @ unit.T
    expected = torch.where(cosines >= 0.9, cosines, torch.exp(cosines - 0.9) - 1).mean(1)
    merge = trace(model, processor, pictures[1], MergeConfig(ratio=0.8)).merge("tower", 0)
    assert torch.allclose(merge.energy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    "fields", [{}, {"parameters": {"energy": "elu", "margin": 0.3}}, {"metric": "hidden"}]
)
def test_tokens_that_merge_into_others_have_the_highest_energies(fields, model, processor, pictures):
    for merge in trace(model, processor, pictures[1], MergeConfig(ratio=0.8, **fields)).merges:
        plan = merge.record.plan
        energy = torch.empty(merge.before.tokens).scatter(0, merge.before.slot, merge.energy())
        candidates = energy.argsort(descending=True, stable=True)[: 2 * plan.gone.shape[1]]
        assert set(plan.gone[0].tolist()) <= set(candidates.tolist())


def test_patches_of_one_token_have_one_energy(model, processor, pictures):
    merge = trace(model, processor, pictures[3], MergeConfig(ratio=0.7)).merges[-1]
    for token in range(merge.before.tokens):
        assert len(merge.energy()[merge.before.slot == token].unique()) == 1


def test_methods_without_an_energy_fall_back_to_pitomes_on_request(model, processor, pictures):
    merge = trace(model, processor, pictures[1], MergeConfig(ratio=0.8, method="tome")).merges[2]
    assert merge.energy() is None
    expected = PiToMe().energies(merge.record.metric, merge.record.depth)[0]
    assert torch.equal(merge.energy(fallback=True), expected[merge.before.slot])


def test_the_method_of_early_layers_is_recorded(model, processor, pictures):
    merges = trace(model, processor, pictures[1], MergeConfig.recipe("released", ratio=0.8)).merges
    assert [m.energy() is None for m in merges] == [m.record.method == "tome" for m in merges]
    assert {m.record.method for m in merges} == {"tome", "pitome"}


def test_recording_changes_no_bit_and_ends_with_its_block(model, processor, pictures):
    with torch.no_grad():
        handle = apply(model, MergeConfig(ratio=0.8, prefix=6, decoder={0: 4}), processor)
        inputs = processor(images=pictures[:2], text=[PROMPT, PROMPT], return_tensors="pt")
        logits = model(**inputs).logits
        with record_merges(handle) as recorder:
            assert torch.equal(model(**inputs).logits, logits)
            first = recorder.trace(1)
        llava.encode(model, inputs["pixel_values"].flip(0))
        assert torch.equal(recorder.trace(1).merges[-1].after.slot, first.merges[-1].after.slot)
    remove(model)


def test_generation_is_traced_by_its_prefill(model, processor, pictures):
    config = MergeConfig(ratio=0.9, decoder={0: 4})
    with merge_tokens(model, config, processor) as handle, record_merges(handle) as recorder:
        inputs = processor(images=pictures[0], text=PROMPT, return_tensors="pt")
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        generated = recorder.trace()
    single = trace(model, processor, pictures[0], config)
    assert [m.after.tokens for m in generated.merges] == [m.after.tokens for m in single.merges]
    assert torch.equal(generated.merges[-1].after.slot, single.merges[-1].after.slot)


def test_a_forward_pass_replaces_the_one_before(model, processor, pictures):
    config = MergeConfig(ratio=0.8)
    with merge_tokens(model, config) as handle, record_merges(handle) as recorder, torch.no_grad():
        for image in pictures[:2]:
            llava.encode(model, pixels(processor, image))
        second = recorder.trace()
    expected = trace(model, processor, pictures[1], config)
    assert torch.equal(second.merges[-1].after.slot, expected.merges[-1].after.slot)
    assert len(second.merges) == FEATURE


def test_two_recorders_at_once_are_refused(model, processor, pictures):
    config = MergeConfig(ratio=0.8)
    with merge_tokens(model, config) as handle, record_merges(handle) as first, torch.no_grad():
        with pytest.raises(RuntimeError, match="already"), record_merges(handle):
            pass
        llava.encode(model, pixels(processor, pictures[0]))
        assert len(first.trace().merges) == FEATURE  # the first goes on


def test_images_that_were_not_recorded_are_refused(model, processor, pictures):
    config = MergeConfig(ratio=0.8)
    with merge_tokens(model, config) as handle, record_merges(handle) as recorder, torch.no_grad():
        with pytest.raises(ValueError, match="no image was encoded"):
            recorder.trace()
        llava.encode(model, pixels(processor, pictures[0]))
        for image in (1, -1):
            with pytest.raises(ValueError, match=f"image={image} is not allowed: the last pass had 1"):
                recorder.trace(image)


def test_a_merge_in_the_language_model_needs_a_question(model, processor, pictures):
    with pytest.raises(ValueError, match="'fastv' merges in the language model, which reads a question"):
        trace_image(model, processor, pictures[0], MergeConfig(method="fastv", decoder={0: 9}))
    assert not model.model.language_model.layers[0]._forward_pre_hooks


def test_tracing_restores_model_and_processor(model, processor, pictures):
    handle = apply(model, MergeConfig(ratio=0.9), processor)
    before = len(processor(images=pictures[0], text=PROMPT)["input_ids"][0])
    trace_image(model, processor, pictures[0], MergeConfig(ratio=0.5))
    assert len(processor(images=pictures[0], text=PROMPT)["input_ids"][0]) == before
    assert model.config.token_merging == handle.config.to_dict()
    remove(model)


def test_an_image_that_is_neither_resized_nor_cropped_comes_back_unchanged(processor, pictures):
    image = as_image(processor, pixels(processor, pictures[2])[0])
    assert np.array_equal(np.asarray(image), np.asarray(pictures[2]))


@pytest.mark.parametrize("size", [(400, 100), (100, 400), (7, 5), (1, 1)])
def test_any_image_is_shown_as_the_towers_input(size, processor):
    image = as_image(processor, pixels(processor, Image.new("RGB", size, (200, 30, 90)))[0])
    assert image.size == (SIDE, SIDE)
    assert np.abs(np.asarray(image).astype(int) - (200, 30, 90)).max() <= 1


@pytest.mark.parametrize("tower, resize", [("siglip", None), ("clip", (4, 5))])
def test_the_grid_is_that_of_the_towers_input(tower, resize, pictures):
    model, processor = make_model(tower), make_processor(tower)
    found = trace_image(model, processor, pictures[1], MergeConfig(ratio=0.8, resize=resize))
    rows, columns = resize or (SIDE // PATCH, SIDE // PATCH)
    assert found.grid == (rows, columns) and found.trace.patches == rows * columns
    assert found.image.size == (columns * PATCH, rows * PATCH) and found.trace.merges
