"""Traces of images that are cut into tiles, and of videos."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_tiled_chat import make
from test_tiled_loading import processor_of
from tiled import KINDS, make_tiled, noise, takes_videos, tile_side

from llava_pitome import METHODS, MergeConfig, merge_tokens
from llava_pitome.image_layout import tiled, video
from llava_pitome.image_schedule import resized
from llava_pitome.models import hf_llava
from llava_pitome.models.image_counts import counts_of
from llava_pitome.tracing import record_merges, trace_image, trace_video
from llava_pitome.tracing.states import OUTSIDE
from llava_pitome.tracing.tiles import canvas_of, packed_positions

SIZES = [(60, 100), (130, 40), (96, 96), (20, 150), (1, 1)]
OF_VIDEOS = [kind for kind in KINDS if takes_videos(kind)]
CONFIGS = [
    MergeConfig(ratio=0.8),
    MergeConfig(tokens_per_tile=9),
    MergeConfig(ratio=0.9, newlines="none"),
    MergeConfig(prefix=0.3),
    MergeConfig(prefix=0.3, across_tiles=False),
    MergeConfig(ratio=0.85, prefix=0.5, order="method"),
    MergeConfig(ratio=0.9, prefix=0.5, tile_shares="joint"),
    MergeConfig(ratio=0.9, tile_shares="thumbnail"),
    MergeConfig(resize=(3, 3)),
    MergeConfig(resize=(4, 4), prefix=0.5),
    MergeConfig(prefix=0.4, method="divprune"),
    MergeConfig(prefix=0.4, decoder={0: 0.5, 1: 5}),
]


def clip(count=5):
    """A video in which a part of each frame is still."""
    frames = [np.asarray(noise(50, 90, seed)).copy() for seed in range(count)]
    for frame in frames:
        frame[:, :45] = frames[0][:, :45]
    return [Image.fromarray(frame) for frame in frames]


def features(model, processor, config, image=None, frames=None):
    """The features of an image or video as they reach the language model, (M, D)."""
    with merge_tokens(model, config, processor), torch.no_grad():
        if frames is not None:
            pixels = processor.video_processor([frames], return_tensors="pt")["pixel_values_videos"]
            found = model.model.get_video_features(pixels, return_dict=True).pooler_output[0]
            return found.reshape(-1, found.shape[-1])
        given = processor.image_processor(image, return_tensors="pt")
        names = [name for name in ("pixel_values", "image_sizes", "batch_num_images") if name in given]
        out = model.model.get_image_features(**{name: given[name] for name in names}, return_dict=True)
        return out.pooler_output[0]


def check_states(found, pools=False):
    """Every state is a partition of the patches that is coarser than the one before, unless a grid pools."""
    traced, state = found.trace, found.trace.initial
    cells = found.grid[0] * found.grid[1]
    assert state.slot.shape == (cells,) and found.image.size[0] % found.grid[1] == 0
    outside = found.padding | found.blank
    assert traced.patches == cells - int(outside.sum()) and not (found.padding & found.blank).any()
    assert (state.slot[outside] == OUTSIDE).all() and not state.dropped[outside].any()
    for merge in traced.merges:
        assert torch.equal(merge.before.slot, state.slot) and torch.equal(merge.before.dropped, state.dropped)
        live = state.slot >= 0
        assert torch.equal(live, merge.after.slot >= 0)
        if not (merge.place == "prefix" and pools):
            pairs = torch.stack([state.slot, merge.after.slot])[:, live].unique(dim=1)
            assert pairs.shape[1] == len(state.slot[live].unique())  # what is together stays together
        used = merge.after.slot[live].unique()
        assert used.max() < merge.after.tokens
        if merge.place == "tower":
            assert used.tolist() == list(range(merge.after.tokens))
        state = merge.after
    return state


@pytest.mark.parametrize("kind", ["next-vicuna", "next-video", "onevision-odd"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: str(config.changes()))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_states_are_partitions_of_the_counted_tokens(kind, config, size):
    model, processor = make(kind)
    found = trace_image(model, processor, noise(*size), config, "what is this")
    layout = resized(config, counts_of(hf_llava.find(model)).tiling.image(*size))
    check_states(found, any(region.is_pooled for region in layout.regions))
    final = found.trace.after("prefix")
    assert final.tokens == counts_of(hf_llava.find(model)).images(config, [size])[0]
    assert len(final.slot[final.slot >= 0].unique()) == final.tokens - found.newlines
    used = layout.regions[: 1 if config.tile_shares == "thumbnail" else None]
    rows = 0 if config.newlines == "none" else sum(region.num_newlines for region in used)
    assert found.newlines == rows + (layout.ends_with_newline and config.newlines != "none")
    if config.decoder:
        assert found.trace.after("decoder", 1).tokens == 5


@pytest.mark.parametrize("kind", ["next-llama3", "onevision"])
@pytest.mark.parametrize("size", SIZES[:4], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        MergeConfig(ratio=1.0), MergeConfig(prefix=0.3), MergeConfig(prefix=0.3, across_tiles=False),
        MergeConfig(prefix=0.3, tile_shares="joint"), MergeConfig(prefix=0.4, method="divprune"),
        MergeConfig(prefix=0.5, order="method"),
    ],
)  # fmt: skip
def test_a_tokens_features_are_the_mean_of_its_patches(kind, size, config):
    model, processor = make(kind)
    image = noise(*size)
    found = trace_image(model, processor, image, config)
    stock = features(model, processor, MergeConfig(ratio=1.0), image)
    merged = features(model, processor, config, image)
    layout = counts_of(hf_llava.find(model)).tiling.image(*size)
    canvas = canvas_of(layout)
    at = canvas.spread(packed_positions(layout), OUTSIDE)
    final = found.trace.after("prefix")
    for token in final.slot[final.slot >= 0].unique().tolist():
        members = at[
            (final.slot == token) & ~final.dropped
        ].unique()  # of a pooled region, tokens that are shared
        torch.testing.assert_close(merged[token], stock[members].mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", OF_VIDEOS)
@pytest.mark.parametrize("temporal", [False, True])
def test_a_videos_tokens_are_the_means_of_its_patches(kind, temporal):
    model, processor = make(kind)
    config, frames = MergeConfig(prefix=0.4, temporal=temporal), clip()
    found = trace_video(model, processor, frames, config)
    stock = features(model, processor, MergeConfig(ratio=1.0), frames=frames)
    merged = features(model, processor, config, frames=frames)
    layout = counts_of(hf_llava.find(model)).tiling.video(len(frames))
    at = canvas_of(layout).spread(packed_positions(layout), OUTSIDE)
    final = check_states(found, pools=True)
    assert final.tokens == len(merged)
    for token in final.slot[final.slot >= 0].unique().tolist():
        members = at[final.slot == token].unique()
        torch.testing.assert_close(merged[token], stock[members].mean(0), atol=1e-5, rtol=1e-4)
    frame = canvas_of(layout).spread(
        torch.arange(len(frames)).repeat_interleave(layout.side**2).view(5, -1), -1
    )
    across = [len(frame[final.slot == t].unique()) for t in range(final.tokens)]
    assert (max(across) > 1) == temporal


@pytest.mark.parametrize("kind", OF_VIDEOS)
def test_frames_that_merge_with_others_are_not_dropped(kind):
    model, processor = make(kind)
    count = counts_of(hf_llava.find(model)).videos(None, [1])[0]
    config = MergeConfig(tokens_per_video=count, temporal=True)
    found = trace_video(model, processor, [noise(50, 90)] * 4, config)
    final = found.trace.after("prefix")
    assert not final.dropped.any() and (final.slot >= 0).sum() == found.trace.patches
    assert len(final.slot[final.slot >= 0].unique()) == count - found.newlines


def test_tokens_in_the_tower_are_those_of_the_records():
    model, processor = make("next-vicuna")
    config = MergeConfig(ratio=0.8)
    found, records = trace_image(model, processor, noise(130, 40), config), []
    with merge_tokens(model, config, processor) as handle, torch.no_grad():
        handle.record(records.append)
        inputs = processor.image_processor(noise(130, 40), return_tensors="pt")
        hf_llava.encode(model, inputs["pixel_values"], image_sizes=inputs["image_sizes"])
    canvas = canvas_of(counts_of(hf_llava.find(model)).tiling.image(130, 40))
    slot = torch.arange(36).repeat(4, 1)
    for i, record in enumerate(records):
        slot = record.plan.slot.gather(1, slot)
        own = slot + torch.arange(4)[:, None] * 36
        state = found.trace.after("tower", i)
        pairs = torch.stack([canvas.spread(own, -1), state.slot])[:, state.slot >= 0].unique(dim=1)
        assert pairs.shape[1] == state.tokens == len(pairs[0].unique()) == len(pairs[1].unique())


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if "tower" in m.places])
def test_energies_are_those_of_the_tokens_that_show_the_image(method):
    model, processor = make("next-llama3")
    found = trace_image(model, processor, noise(130, 40), MergeConfig(ratio=0.85, method=method))
    merge = found.trace.merge("tower", 1)
    values = merge.energy(fallback=True)
    live = merge.before.slot >= 0
    assert torch.equal(~values.isnan(), live)
    for token in range(merge.before.tokens):
        assert len(values[merge.before.slot == token].unique()) == 1
    assert (merge.energy() is None) == (METHODS[method]().energies(torch.randn(1, 9, 4), 0.1) is None)


def test_energies_after_the_projector_and_in_the_language_model():
    model, processor = make("next-llama3")
    config = MergeConfig(prefix=0.3, across_tiles=False, decoder={1: 5})
    found = trace_image(model, processor, noise(60, 100), config, "what is this")
    for place in ("prefix", "decoder"):
        merge = found.trace.merge(place, place == "decoder")
        values = merge.energy()
        assert torch.equal(~values.isnan(), merge.before.slot >= 0)


@pytest.mark.parametrize("kind", ["next-video", "onevision"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_tiles_are_put_together_to_the_picture(kind, size):
    model, processor = make(kind)
    image = noise(*size).resize((size[1] * 2, size[0] * 2)).resize(size[::-1])
    found = trace_image(model, processor, image, MergeConfig(ratio=0.8))
    layout = counts_of(hf_llava.find(model)).tiling.image(*size)
    tiles = processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
    side, grid = tile_side(kind) * 8, layout.regions[1]
    width = grid.columns * side
    assert found.image.size == (width + 8 + side, max(grid.rows, 1) * side)
    settings = processor.image_processor
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (settings.image_mean, settings.image_std))
    pixels = ((tiles * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    whole = np.asarray(found.image)
    for tile in range(grid.tiles):
        top, left = tile // grid.columns * side, tile % grid.columns * side
        assert np.array_equal(whole[top : top + side, left : left + side], pixels[tile + 1])
    assert np.array_equal(whole[:side, width + 8 :], pixels[0])
    assert (whole[:, width : width + 8] == 255).all()


def test_canvases_hold_every_patch_once():
    for layout in (
        tiled(6, 2, 2, 60, 100),
        tiled(7, 3, 1, 50, 9),
        video(6, 3, 3, True),
        video(6, 10, 3, False),
    ):
        canvas = canvas_of(layout)
        cells = canvas.cell.flatten()
        assert len(cells.unique()) == len(cells) and cells.max() < canvas.grid[0] * canvas.grid[1]
        assert int((~canvas.blank).sum()) == len(cells)
    assert canvas.grid == (3 * 6 + 2, 4 * 6 + 3)


def test_recording_a_model_that_generates():
    model, processor = make("onevision")
    image = noise(60, 100)
    inputs = processor(images=image, text="<image> what", return_tensors="pt")
    with merge_tokens(model, MergeConfig(ratio=0.8), processor) as handle:
        inputs = processor(images=image, text="<image> what", return_tensors="pt")
        expected = model.generate(**inputs, max_new_tokens=3)
        with record_merges(handle) as recorder:
            with pytest.raises(ValueError, match="no image was encoded"):
                recorder.trace()
            for _ in range(2):
                assert torch.equal(model.generate(**inputs, max_new_tokens=3), expected)
            trace = recorder.trace()
            alone = trace_image(*make("onevision"), image, MergeConfig(ratio=0.8)).trace
            assert torch.equal(trace.after("prefix").slot, alone.after("prefix").slot)
            assert len(trace.merges) == len(alone.merges)
            with pytest.raises(ValueError, match="image=1 is not allowed"):
                recorder.trace(1)
            both = processor(images=[[image, image]], text="<image> <image> what", return_tensors="pt")
            model.generate(**both, max_new_tokens=1)
            with pytest.raises(ValueError, match="the last pass had 2 images"):
                recorder.trace()
        assert torch.equal(model.generate(**inputs, max_new_tokens=3), expected)


@pytest.mark.parametrize("kind", ["next-mistral", "onevision"])
def test_what_is_not_defined_for_tiles_says_so(kind):
    model, processor = make_tiled(kind), processor_of(kind)
    with merge_tokens(model, MergeConfig(ratio=0.8), processor) as handle:
        for call in (handle.plans, handle.sizes):
            with pytest.raises(
                ValueError, match=r"are not defined: the tokens of its tiles .* tracing\.trace_image"
            ):
                call()
        inputs = processor(images=noise(60, 100), text="<image> what", return_tensors="pt")
        model.generate(**inputs, max_new_tokens=1)
        assert handle.patches() == 36


@pytest.mark.parametrize("kind", ["next-mistral", None])
def test_a_model_without_videos_traces_none(kind, model, processor):
    if kind is not None:
        model, processor = make(kind)
    with pytest.raises(ValueError, match="takes no videos"):
        trace_video(model, processor, clip(), MergeConfig(ratio=0.8))
