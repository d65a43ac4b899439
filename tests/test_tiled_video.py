"""Merging tokens of videos: counts, still frames, places of change."""

import pytest
import torch
from conftest import PATCH
from PIL import Image
from tiled import (
    Prompt,
    clip,
    features_of,
    inputs_of,
    make_tiled,
    make_tiled_processor,
    noise,
    tile_side,
)

from llava_pitome import MergeConfig, merge_tokens
from llava_pitome.hooks.image_packing import ImagePacking
from llava_pitome.hooks.temporal_merge import length_in_time, parents_in_time
from llava_pitome.methods import METHODS
from llava_pitome.models import hf_llava

VIDEO = 17  # the id of <video>
KINDS = ("next-video", "onevision", "onevision-odd")
CONFIGS = [
    *({"prefix": 0.5, "method": k} for k, m in METHODS.items() if "prefix" in m.places),
    *({"ratio": 0.9, "method": k} for k, m in METHODS.items() if "tower" in m.places),
    {"tokens_per_frame": 1},
    {"tokens_per_frame": 9},
    {"tokens_per_frame": 4, "temporal": True},
    {"tokens_per_frame": 4, "temporal": True, "prefix_share": 1.0, "method": "tome"},
    {"tokens_per_video": 7, "newlines": "none"},
    {"tokens_per_video": 7, "temporal": True},
    {"tokens_per_video": 8, "temporal": True, "prefix_share": 0.5, "prefix_metric": "keys"},
    {"tokens_per_video": 9, "prefix_share": 1.0, "method": "divprune"},
    {"ratio": 0.8, "prefix_share": 0.5, "temporal": True},
    {"ratio": 0.9, "temporal": True},
    {"prefix": 7},
    {"prefix": 0.4, "temporal": True},
    {"tokens": 60, "tokens_per_frame": 3},
    {"tokens_per_tile": 60, "tokens_per_video": 8},
    {"ratio": 1.0, "newlines": "none"},
    {"ratio": 1.0, "newlines": "scaled"},
]


def config_for(kind, fields):
    """The config; None where its method needs a class token that the tower lacks."""
    config = MergeConfig(**fields)
    needs_class = "class_attention" in METHODS[config.method].needs
    return None if needs_class and kind != "next-video" and config.merges_in_tower else config


CASES = [(kind, fields) for kind in KINDS for fields in CONFIGS if config_for(kind, fields) is not None]


def ids_of(value):
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def video_features(model, processor, *videos):
    """Features (V, n, D) and inputs of prompts with one video each."""
    inputs = inputs_of(processor, [Prompt("what <video>", (), (video,)) for video in videos])
    with torch.no_grad():
        return torch.stack(features_of(model, inputs)), inputs


@pytest.mark.parametrize("kind, fields", CASES, ids=ids_of)
def test_as_many_placeholders_are_written_as_tokens_arrive(kind, fields):
    model, processor = make_tiled(kind), make_tiled_processor(kind)
    with merge_tokens(model, config_for(kind, fields), processor), torch.no_grad():
        for frames in (1, 2, 5):
            features, inputs = video_features(model, processor, clip(frames), clip(frames, 7))
            written = (inputs["input_ids"] == VIDEO).sum(1)
            assert written.tolist() == [features.shape[1]] * 2 and features.isfinite().all()
            told = processor._get_num_multimodal_tokens(video_sizes=[(frames, 50, 60)])
            assert told["num_video_tokens"] == written.tolist()[:1]
            model(**inputs)
            if kind.startswith("onevision"):
                is_newline = (features == model.model.image_newline).all(2)
                assert (is_newline.sum(1) == (fields.get("newlines") != "none")).all()
                assert is_newline[:, -1].all() == is_newline.any()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("part", [1.0, 0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_a_still_video_merges_to_what_one_frame_merges_to(kind, part, share):
    """Nothing is lost by further frames: a budget of one frame's tokens gives that frame's features."""
    model, processor = make_tiled(kind), make_tiled_processor(kind)
    of_frame = hf_llava.find(model).llava.tiling.frame_side ** 2
    end = int(kind.startswith("onevision"))
    stock = video_features(model, processor, [noise(50, 60)])[0]
    config = MergeConfig(tokens_per_video=round(of_frame * part) + end, temporal=True, prefix_share=share)
    with merge_tokens(model, config, processor):
        expected = video_features(model, processor, [noise(50, 60)])[0]
        for frames in (2, 3, 5):
            found = video_features(model, processor, [noise(50, 60)] * frames)[0]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    if part == 1:
        assert torch.equal(expected, stock)


@pytest.mark.parametrize("kind", KINDS)
def test_without_temporal_a_still_video_loses_tokens(kind):
    model, processor = make_tiled(kind), make_tiled_processor(kind)
    tokens = hf_llava.find(model).llava.tiling.frame_side ** 2 + kind.startswith("onevision")
    stock = video_features(model, processor, [noise(50, 60)])[0]
    with merge_tokens(model, MergeConfig(tokens_per_video=tokens, prefix_share=1.0), processor):
        found = video_features(model, processor, [noise(50, 60)] * 3)[0]
    assert (found - stock).abs().max() > 0.1


def changing(side, frames, row, column):
    """A video of noise in which two by two patches change with every frame, the others stay."""
    pixels, cell = side * PATCH, 2 * PATCH
    found = []
    for i in range(frames):
        frame = noise(pixels, pixels)
        box = (column * cell, row * cell)
        frame.paste(noise(cell, cell, seed=i + 50), box)
        found.append(frame)
    return found


@pytest.mark.parametrize("row, column", [(0, 0), (1, 2), (2, 1)])
@pytest.mark.parametrize("kind", ["next-video", "onevision"])
def test_places_of_change_keep_their_tokens(kind, row, column, monkeypatch):
    """One token of every place stays, and of the place that changes one a frame."""
    model, processor = make_tiled(kind), make_tiled_processor(kind)
    for layer in model.model.vision_tower.encoder.layers:  # patches do not attend to each other
        torch.nn.init.zeros_(layer.self_attn.out_proj.weight)
        torch.nn.init.zeros_(layer.self_attn.out_proj.bias)
    frames, found, merged = 4, [], ImagePacking._merged

    def keep(self, call, *args):
        found.append(merged(self, call, *args))
        return found[-1]

    monkeypatch.setattr(ImagePacking, "_merged", keep)
    end = int(kind == "onevision")
    config = MergeConfig(tokens_per_video=9 + frames - 1 + end, temporal=True, prefix_share=1.0)
    with merge_tokens(model, config, processor):
        video_features(model, processor, changing(tile_side(kind), frames, row, column))
    (tokens,) = found
    place = row * 3 + column
    expected = sorted({*range(9), *(place + 9 * i for i in range(frames))})
    count = len(expected)
    assert tokens.position[0, :count].tolist() == expected
    sizes = dict(zip(expected, tokens.sizes[0].tolist()))
    assert all(n == (1 if x % 9 == place else frames) for x, n in sizes.items())


@pytest.mark.parametrize("temporal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_still_and_moving_videos_of_a_batch_merge_as_alone(kind, temporal):
    model, processor = make_tiled(kind), make_tiled_processor(kind)
    videos = [clip(4), [noise(50, 60)] * 4, [noise(50, 60, 3)] * 2 + clip(2, 8)]
    with merge_tokens(model, MergeConfig(tokens_per_video=11, temporal=temporal), processor):
        together = video_features(model, processor, *videos)[0]
        for video, expected in zip(videos, together):
            found = video_features(model, processor, video)[0][0]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_pooled_frame_keeps_all_that_its_budget_says():
    """A frame's whole number of tokens, after pooling, changes no bit, whatever number of patches it had."""
    for kind in KINDS:
        model, processor = make_tiled(kind), make_tiled_processor(kind)
        of_frame = hf_llava.find(model).llava.tiling.frame_side ** 2
        stock = video_features(model, processor, clip(3))[0]
        with merge_tokens(model, MergeConfig(tokens_per_frame=of_frame), processor):
            assert torch.equal(video_features(model, processor, clip(3))[0], stock)


# Which tokens join


def test_the_most_similar_neighbours_in_time_join():
    x = torch.tensor([[[1.0, 0], [0, 1], [1, 0.1], [1, 1], [1, 0.2], [1, 1.1]]])  # three frames of two tokens
    assert parents_in_time(x, 3, 6).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert parents_in_time(x, 3, 5).tolist() == [[0, 1, 2, 3, 4, 3]]
    assert parents_in_time(x, 3, 3).tolist() == [[0, 1, 0, 3, 0, 3]]
    assert parents_in_time(x, 3, 2).tolist() == [[0, 1, 0, 1, 0, 1]]


def test_tokens_join_in_time_only_where_they_are_more_alike_than_in_space():
    torch.manual_seed(0)
    still = torch.randn(1, 1, 6, 8).expand(1, 5, 6, 8).flatten(1, 2)
    assert length_in_time(still, 5, 6) == 6
    assert length_in_time(still, 5, 20) == 20
    assert length_in_time(still, 5, 2) == 6  # of one frame; the rest merges in space
    flat = torch.randn(1, 5, 1, 8).expand(1, 5, 6, 8).flatten(1, 2)  # frames of one colour each
    assert length_in_time(flat, 5, 5) == 30
    assert length_in_time(torch.randn(1, 30, 8), 5, 30) == 30
    assert length_in_time(torch.randn(1, 5, 8), 5, 2) == 2  # frames of one token have no space
    assert length_in_time(torch.randn(1, 5, 8), 1, 2) == 5  # and one frame no time


def test_a_frame_may_be_of_any_size():
    model, processor = make_tiled("onevision"), make_tiled_processor("onevision")
    with merge_tokens(model, MergeConfig(tokens_per_frame=2), processor):
        for size in ((1, 1), (300, 20), (20, 300)):
            features = video_features(model, processor, [Image.new("RGB", size)] * 2)[0]
            assert features.shape[1] == 5 and features.isfinite().all()
