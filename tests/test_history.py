"""What is told of each patch is what happened to it, and watching changes nothing."""

import numpy as np
import pytest
import torch
from conftest import LAYERS, PATCH, PATCHES, SIDE, make_model, make_processor
from PIL import Image
from torch.nn import functional as F

from llava_pitome import METHODS, MergeConfig, apply, merge_tokens, remove
from llava_pitome.cli.draw import panels
from llava_pitome.merge.plan import trace
from llava_pitome.methods import pitome
from llava_pitome.models import hf_llava as llava
from llava_pitome.tracing.history import watching
from llava_pitome.tracing.study import study
from llava_pitome.tracing.view import pixels, visible

PROMPT = "<image> what is this"
FEATURE = LAYERS - 1
IN_TOWER = [name for name, method in METHODS.items() if "tower" in method.places]
AMOUNTS = {"tower": {"ratio": 0.8}, "prefix": {"prefix": 9}, "decoder": {"decoder": {0: 20, 1: 7}}}


def studied(model, processor, picture, config):
    return study(model, processor, picture, config, PROMPT).history


def watched(model, processor, pictures, config):
    """The history of each of a batch of pictures, and the trace that the hooks tell."""
    given = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    with merge_tokens(model, config) as merging, watching(merging) as watch, torch.no_grad():
        llava.encode(model, given)
        return [watch.history(i) for i in range(len(pictures))], merging.plans()


@pytest.mark.parametrize("method", IN_TOWER)
def test_patches_are_where_the_hooks_say_for_every_picture_of_a_batch(method, model, processor, pictures):
    config = MergeConfig(ratio=0.8, method=method)
    histories, plans = watched(model, processor, pictures, config)
    lengths = config.lengths(PATCHES, FEATURE)
    for history, slot in zip(histories, trace(plans)):
        assert torch.equal(history.after("tower", FEATURE - 1).slot, slot)
        assert history.after("decoder", 99) == history.after("tower", FEATURE - 1)
        assert tuple(history.after("tower", i).tokens for i in range(FEATURE)) == lengths[1:]
        assert all(len(history.after("tower", i).slot.unique()) == lengths[i + 1] for i in range(FEATURE))


@pytest.mark.parametrize("method, place", [(n, p) for n, m in METHODS.items() for p in m.places])
def test_every_method_is_told_in_every_place(method, place, model, processor, pictures):
    amount = (
        AMOUNTS[place] if not (METHODS[method].needs_grid and place == "decoder") else {"decoder": {0: 9}}
    )
    history = studied(model, processor, pictures[1], MergeConfig(method=method, **amount))
    assert history.patches == PATCHES
    assert {merge.place for merge in history.merges} == {place}
    state = history.start
    for merge in history.merges:
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(merge.before, state))
        state = merge.after
        assert sorted(state.slot.unique().tolist()) == list(range(state.tokens))
        assert (state.dropped | ~merge.before.dropped).all()  # what is gone stays gone
    left = {"tower": MergeConfig(ratio=0.8).tokens_at(PATCHES, FEATURE), "prefix": 9}
    assert state.tokens == left.get(place, 9 if METHODS[method].needs_grid else 7)


@pytest.mark.parametrize("method", ["fastv", "divprune"])
def test_of_a_method_that_only_keeps_as_many_patches_are_left_as_tokens(method, model, processor, pictures):
    place = METHODS[method].places[0]
    history = studied(model, processor, pictures[1], MergeConfig(method=method, **AMOUNTS[place]))
    last = history.merges[-1].after
    assert int((~last.dropped).sum()) == last.tokens


def test_of_methods_that_average_nothing_is_dropped(model, processor, pictures):
    for method in ("pitome", "tome", "random"):
        history = studied(model, processor, pictures[1], MergeConfig(ratio=0.7, method=method))
        assert not history.merges[-1].after.dropped.any()


def test_merges_follow_from_tower_to_prefix_to_language_model(model, processor, pictures):
    config = MergeConfig(ratio=0.95, prefix=12, decoder={1: 5})
    history = studied(model, processor, pictures[2], config)
    assert [m.place for m in history.merges][-2:] == ["prefix", "decoder"]
    assert history.after("tower", FEATURE - 1).tokens > history.after("prefix").tokens == 12
    assert history.after("decoder", 0).tokens == 12 and history.after("decoder", 1).tokens == 5
    assert history.merge("prefix") is history.merges[-2] and history.merge("decoder", 1).layer == 1
    assert history.merge("decoder", 0) is None


def test_layers_that_do_not_merge_have_no_merge(model, processor, pictures):
    ratio = (1.0, 0.5, 1.0, 1.0, 0.5, 1.0, 1.0)
    history = studied(model, processor, pictures[2], MergeConfig(ratio=ratio))
    assert [m.layer for m in history.merges] == [1, 4]
    assert [history.after("tower", i).tokens for i in range(7)] == [36, 18, 18, 18, 9, 9, 9]


def test_without_merges_every_patch_is_a_token(model, processor, pictures):
    history = studied(model, processor, pictures[0], MergeConfig(ratio=1.0))
    assert history.merges == () and history.patches == PATCHES
    assert history.after("tower", 3).slot.tolist() == list(range(PATCHES))


def test_the_energy_is_of_the_keys_that_the_tower_made(model, processor, pictures):
    """In the first layer nothing has merged, so that a plain pass makes the same keys."""
    kept = []
    layer = model.model.vision_tower.encoder.layers[0].self_attn
    handle = layer.k_proj.register_forward_hook(lambda _m, _a, keys: kept.append(keys))
    with torch.no_grad():
        llava.encode(model, pixels(processor, pictures[1]))
    handle.remove()
    keys = kept[0][0, 1:].unflatten(-1, (layer.num_heads, -1)).mean(1)  # without the class token
    unit = F.normalize(keys, dim=-1)
    cosines = unit @ unit.T
    expected = torch.where(cosines >= 0.9, cosines, torch.exp(cosines - 0.9) - 1).mean(1)
    merge = studied(model, processor, pictures[1], MergeConfig(ratio=0.8)).merge("tower", 0)
    assert torch.allclose(merge.energy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    "fields", [{}, {"parameters": {"energy": "elu", "margin": 0.3}}, {"metric": "hidden"}]
)
def test_whoever_merges_away_is_among_those_of_highest_energy(fields, model, processor, pictures):
    history = studied(model, processor, pictures[1], MergeConfig(ratio=0.8, **fields))
    for merge in history.merges:
        plan = merge.sight.plan
        energy = torch.empty(merge.before.tokens).scatter(0, merge.before.slot, merge.energy())
        candidates = energy.argsort(descending=True, stable=True)[: 2 * plan.gone.shape[1]]
        assert set(plan.gone[0].tolist()) <= set(candidates.tolist())


def test_patches_of_one_token_have_one_energy(model, processor, pictures):
    merge = studied(model, processor, pictures[3], MergeConfig(ratio=0.7)).merges[-1]
    for token in range(merge.before.tokens):
        assert len(merge.energy()[merge.before.slot == token].unique()) == 1


def test_what_goes_by_no_energy_has_none_unless_pitomes_is_borrowed(model, processor, pictures):
    merge = studied(model, processor, pictures[1], MergeConfig(ratio=0.8, method="tome")).merges[2]
    assert merge.energy() is None
    expected = pitome.PiToMe().energies(merge.sight.metric, merge.sight.depth)[0]
    assert torch.equal(merge.energy(borrowed=True), expected[merge.before.slot])


def test_an_early_method_is_told_layer_by_layer(model, processor, pictures):
    history = studied(model, processor, pictures[1], MergeConfig.recipe("released", ratio=0.8))
    assert [m.energy() is None for m in history.merges] == [m.sight.method == "tome" for m in history.merges]
    assert {m.sight.method for m in history.merges} == {"tome", "pitome"}


def test_watching_changes_no_bit_and_ends_with_its_block(model, processor, pictures):
    inputs = processor(images=pictures[:2], text=[PROMPT, PROMPT], return_tensors="pt")
    config = MergeConfig(ratio=0.8, prefix=6, decoder={0: 4})
    with torch.no_grad():
        merging = apply(model, config, processor)
        inputs = processor(images=pictures[:2], text=[PROMPT, PROMPT], return_tensors="pt")
        plain = model(**inputs).logits
        with watching(merging) as watch:
            assert torch.equal(model(**inputs).logits, plain)
            first = watch.history(1)
        llava.encode(model, inputs["pixel_values"].flip(0))
        assert torch.equal(
            watch.history(1).merges[-1].after.slot, first.merges[-1].after.slot
        )  # the old pass
    remove(model)


def test_an_answer_is_told_by_its_first_pass(model, processor, pictures):
    config = MergeConfig(ratio=0.9, decoder={0: 4})
    with merge_tokens(model, config, processor) as merging, watching(merging) as watch:
        inputs = processor(images=pictures[0], text=PROMPT, return_tensors="pt")
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        told = watch.history()
    alone = studied(model, processor, pictures[0], config)
    assert [m.after.tokens for m in told.merges] == [m.after.tokens for m in alone.merges]
    assert torch.equal(told.merges[-1].after.slot, alone.merges[-1].after.slot)


def test_another_pass_takes_the_place_of_the_one_before(model, processor, pictures):
    config = MergeConfig(ratio=0.8)
    with merge_tokens(model, config) as merging, watching(merging) as watch, torch.no_grad():
        for picture in pictures[:2]:
            llava.encode(model, pixels(processor, picture))
        second = watch.history()
    assert torch.equal(
        second.merges[-1].after.slot, studied(model, processor, pictures[1], config).merges[-1].after.slot
    )
    assert len(second.merges) == FEATURE


def test_two_do_not_watch_at_once(model, processor, pictures):
    with merge_tokens(model, MergeConfig(ratio=0.8)) as merging, watching(merging) as first, torch.no_grad():
        with pytest.raises(RuntimeError, match="watched already"), watching(merging):
            pass
        llava.encode(model, pixels(processor, pictures[0]))
        assert len(first.history().merges) == FEATURE  # the first goes on


def test_what_was_not_seen_raises(model, processor, pictures):
    with merge_tokens(model, MergeConfig(ratio=0.8)) as merging, watching(merging) as watch, torch.no_grad():
        with pytest.raises(ValueError, match="no picture was encoded"):
            watch.history()
        llava.encode(model, pixels(processor, pictures[0]))
        for image in (1, -1):
            with pytest.raises(ValueError, match=f"image={image} is not allowed: the last pass had 1"):
                watch.history(image)


def test_a_method_that_reads_the_question_wants_one(model, processor, pictures):
    with pytest.raises(ValueError, match="'fastv' merges in the language model, where a question is read"):
        study(model, processor, pictures[0], MergeConfig(method="fastv", decoder={0: 9}))
    assert not model.model.language_model.layers[0]._forward_pre_hooks


def test_a_study_leaves_model_and_processor_as_they_were(model, processor, pictures):
    merging = apply(model, MergeConfig(ratio=0.9), processor)
    before = len(processor(images=pictures[0], text=PROMPT)["input_ids"][0])
    study(model, processor, pictures[0], MergeConfig(ratio=0.5))
    assert len(processor(images=pictures[0], text=PROMPT)["input_ids"][0]) == before
    assert model.config.token_merging == merging.config.to_dict()
    remove(model)


def test_the_view_is_the_picture_where_nothing_has_to_be_shrunk_or_cropped(processor, pictures):
    seen = visible(processor, pixels(processor, pictures[2])[0])
    assert np.array_equal(np.asarray(seen), np.asarray(pictures[2]))


@pytest.mark.parametrize("size", [(400, 100), (100, 400), (7, 5), (1, 1)])
def test_the_view_of_any_picture_is_what_the_tower_is_given(size, processor):
    seen = visible(processor, pixels(processor, Image.new("RGB", size, (200, 30, 90)))[0])
    assert seen.size == (SIDE, SIDE)
    assert np.abs(np.asarray(seen).astype(int) - (200, 30, 90)).max() <= 1


def test_a_tower_without_class_token_is_told_as_well(pictures):
    model, processor = make_model("siglip"), make_processor("siglip")
    found = study(model, processor, pictures[1], MergeConfig(ratio=0.8))
    assert found.grid == (SIDE // PATCH, SIDE // PATCH) and len(found.history.merges) > 0


def test_a_shrunken_picture_is_seen_shrunken(model, processor, pictures):
    found = study(model, processor, pictures[1], MergeConfig(ratio=0.8, resize=(4, 5)))
    assert found.grid == (4, 5) and found.history.patches == 20
    assert found.view.size == (5 * PATCH, 4 * PATCH)
    point = panels.Point("", "tower", FEATURE - 1)
    assert panels.tokens(found, point, 100).picture.size == (100, 80)


def test_rows_of_a_sheet_say_what_there_is(model, processor, pictures):
    points = [panels.Point("a", "tower", 0), panels.Point("b", "prefix", 0)]
    mine, theirs = (
        study(model, processor, pictures[1], MergeConfig(ratio=0.8, method=m)) for m in ("pitome", "tome")
    )
    tokens, energy = panels.rows("mine", mine, points, 96)
    assert [p.caption for p in tokens.panels] == ["36 patches", "29 tokens", "9 tokens"]
    assert [p.caption for p in energy.panels] == ["", "in front: 36 tokens", "nothing merges here"]
    assert energy.detail == "that pitome goes by" and tokens.detail == "ratio 0.8"
    assert len(panels.rows("mine", mine, points, 96, "none")) == 1
    assert len(panels.rows("theirs", theirs, points, 96)) == 1
    _, borrowed = panels.rows("theirs", theirs, points, 96, "all")
    assert borrowed.detail == "PiToMe's, of what tome merges by" and borrowed.panels[1].ends
