"""Calls of models that cut images into tiles that are mistakes: errors with the value, before they run."""

import pytest
import torch
from tiled import (
    KINDS,
    Prompt,
    clip,
    inputs_of,
    make_tiled,
    make_tiled_processor,
    noise,
    takes_videos,
)

from llava_pitome import MergeConfig, apply, merge_tokens

CONFIG = MergeConfig(ratio=0.9)


@pytest.fixture(params=["next-vicuna", "next-video", "onevision"])
def kind(request):
    return request.param


@pytest.fixture
def merging(kind):
    """A model that merges and may not run its vision tower, its processor, and inputs of two images."""
    model, processor = make_tiled(kind), make_tiled_processor(kind)
    apply(model, CONFIG, processor)
    prompts = [Prompt("<image> what", (noise(50, 100),)), Prompt("a <image>", (noise(90, 90),))]
    inputs = inputs_of(processor, prompts)
    model.model.vision_tower.register_forward_pre_hook(refuse)
    return model, processor, inputs


def refuse(*_):
    raise AssertionError("the vision tower ran")


def test_sizes_that_do_not_match_the_tiles_raise(merging):
    model, _, inputs = merging
    for sizes, needs in (
        ([[50, 100], [50, 100], [50, 100]], "needs 3 of 3"),
        ([[50, 100]], "needs 1 of 3"),
    ):
        bad = inputs | {"image_sizes": torch.tensor(sizes)}
        with pytest.raises(ValueError, match=rf"holds 2 images of 5 tiles; .*{needs}|names 2 images"):
            model(**bad)
    bad = inputs | {"pixel_values": inputs["pixel_values"][:, :4]}
    with pytest.raises(ValueError, match=r"2 images of 4 tiles; .* needs 2 of 5"):
        model(**bad)
    flat = torch.cat([inputs["pixel_values"][0, :3], inputs["pixel_values"][1]])
    for wrong in (flat[:-1], torch.cat([flat, flat[:1]])):
        with pytest.raises(ValueError, match=f"pixel_values holds {len(wrong)} tiles; .* needs 8"):
            model(**inputs | {"pixel_values": wrong})


@pytest.mark.parametrize("shape", [(3, 48, 48), (1, 2, 5, 3, 48, 48)])
def test_pixels_of_another_shape_raise(merging, shape):
    model, _, inputs = merging
    with pytest.raises(ValueError, match=r"pixel_values has shape \(.*it must be \(images, tiles"):
        model(**inputs | {"pixel_values": torch.zeros(shape)})


@pytest.mark.parametrize("size", [(40, 48), (48, 56), (96, 96)])
def test_tiles_of_another_size_raise(merging, size):
    model, _, inputs = merging
    with pytest.raises(ValueError, match=f"tile are {size[0]} x {size[1]}; this model's tiles are 48 x 48"):
        model(**inputs | {"pixel_values": torch.zeros(2, 5, 3, *size)})


@pytest.mark.parametrize("sizes", [None, [[0, 50], [50, 50]], [[50, 50, 3], [50, 50, 3]], [50, 50]])
def test_sizes_that_are_none_raise(merging, sizes):
    model, _, inputs = merging
    bad = dict(inputs) | {"image_sizes": None if sizes is None else torch.tensor(sizes)}
    with pytest.raises(ValueError, match=r"image_sizes|each side must be at least 1"):
        model(**bad)


def test_a_processor_for_other_tiles_is_refused(kind):
    model = make_tiled(kind)
    for change, message in (
        (lambda p: setattr(p.image_processor, "image_grid_pinpoints", [[48, 96]]), "image_grid_pinpoints="),
        (lambda p: setattr(p.image_processor, "size", {"height": 56, "width": 56}), "tiles of 56 pixels.*48"),
        (lambda p: setattr(p, "vision_feature_select_strategy", "other"), "'other'"),
    ):
        processor = make_tiled_processor(kind)
        change(processor)
        with pytest.raises(ValueError, match=message):
            apply(model, CONFIG, processor)
    names = {"next-vicuna": ("patch_size", 16), "next-video": ("patch_size", 16),
             "onevision": ("num_image_tokens", 49)}  # fmt: skip
    processor = make_tiled_processor(kind)
    setattr(processor, *names[kind])
    with pytest.raises(ValueError, match=r"patch_size=16, the model 8|49 placeholders for a tile.* 36"):
        apply(model, CONFIG, processor)
    if kind == "onevision":
        processor = make_tiled_processor(kind)
        processor.vision_aspect_ratio = "anyres_max_9"
        with pytest.raises(ValueError, match="anyres_max_9', the model anyres_max_2"):
            apply(model, CONFIG, processor)
    from conftest import make_processor

    with pytest.raises(ValueError, match="LlavaProcessor does not cut images into tiles"):
        apply(model, CONFIG, make_processor())
    assert not vars(model.model).get("get_image_features")


@pytest.mark.parametrize(
    "fields",
    [
        {"tokens": 5}, {"tokens": 2000}, {"prefix": 5}, {"prefix": 2000}, {"tokens_per_tile": 37},
        {"tokens": 30, "tile_shares": "thumbnail", "newlines": "none"}, {"tokens": 4, "newlines": "none"},
    ],
    ids=str,
)  # fmt: skip
def test_budgets_that_do_not_fit_raise_before_the_model_runs(kind, fields):
    model, processor = make_tiled(kind), make_tiled_processor(kind)
    prompt = [Prompt("<image>", (noise(96, 96),))]
    plain = inputs_of(processor, prompt)
    name, value = next(iter(fields.items()))
    model.model.vision_tower.register_forward_pre_hook(refuse)
    if value == 30:
        fields = fields | {"tokens": 37}
    message = rf"{name}={fields[name]} does not fit: .*allowed is \d+ to \d+"
    with merge_tokens(model, MergeConfig(**fields), processor):
        with pytest.raises(ValueError, match=message):
            inputs_of(processor, prompt)
        with pytest.raises(ValueError, match=message):
            model(**plain)
        with pytest.raises(ValueError, match=message):
            processor._get_num_multimodal_tokens(image_sizes=[(96, 96)])


# Videos


@pytest.fixture(params=["next-video", "onevision", "onevision-odd"])
def video_kind(request):
    return request.param


def test_pixels_that_are_no_video_raise(video_kind):
    model, processor = make_tiled(video_kind), make_tiled_processor(video_kind)
    tile = model.config.vision_config.image_size
    apply(model, CONFIG, processor)
    inputs = inputs_of(processor, [Prompt("<video>", (), (clip(2),))])
    model.model.vision_tower.register_forward_pre_hook(refuse)
    for shape, message in (
        ((1, 0, 3, tile, tile), "a video has 0 frames; at least 1"),
        ((2, 3, tile, tile), r"shape \(2, 3, .* must be \(videos, frames"),
        ((1, 2, 3, tile, tile + 8), f"{tile} x {tile + 8}; this model's tiles are {tile} x {tile}"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs | {"pixel_values_videos": torch.zeros(shape)})
        with pytest.raises(ValueError, match=message):
            model.generate(**inputs | {"pixel_values_videos": torch.zeros(shape)}, max_new_tokens=1)


def test_a_video_without_frames_raises_in_the_processor(video_kind):
    model, processor = make_tiled(video_kind), make_tiled_processor(video_kind)
    with merge_tokens(model, CONFIG, processor):
        with pytest.raises(ValueError, match="0 frames; at least 1"):
            processor._get_num_multimodal_tokens(video_sizes=[(0, 50, 50)])
        with pytest.raises(ValueError, match="0 frames; at least 1"):
            processor.replace_video_token({"pixel_values_videos": torch.zeros(1, 0, 3, 48, 48)}, video_idx=0)


@pytest.mark.parametrize(
    "config, message",
    [
        (MergeConfig(tokens=60), "tokens=60 is the budget of an image; give tokens_per_frame"),
        (MergeConfig(tokens_per_tile=6), "tokens_per_tile=6"),
        (MergeConfig(tokens_per_frame=50), r"tokens_per_frame=50 does not fit: a frame has \d+ tokens"),
        (MergeConfig(tokens_per_video=1), "tokens_per_video=1 does not fit"),
        (MergeConfig(tokens_per_video=500), r"tokens_per_video=500 does not fit: .*allowed is \d+ to \d+"),
    ],
)
def test_budgets_that_do_not_fit_a_video_raise_before_the_model_runs(video_kind, config, message):
    model, processor = make_tiled(video_kind), make_tiled_processor(video_kind)
    prompt = [Prompt("<video>", (), (clip(3),))]
    plain = inputs_of(processor, prompt)
    model.model.vision_tower.register_forward_pre_hook(refuse)
    with merge_tokens(model, config, processor):
        with pytest.raises(ValueError, match=message):
            inputs_of(processor, prompt)
        with pytest.raises(ValueError, match=message):
            model(**plain)


def test_images_and_videos_in_a_row_raise(video_kind):
    model, processor = make_tiled(video_kind), make_tiled_processor(video_kind)
    prompts = [
        Prompt("what is this"),
        Prompt("<image> or <video>", (noise(50, 100),), (clip(2),)),
    ]
    plain = inputs_of(processor, prompts)
    model.model.vision_tower.register_forward_pre_hook(refuse)
    with merge_tokens(model, CONFIG, processor):
        with pytest.raises(ValueError, match="images and videos, which cannot merge together: '<image> or"):
            inputs_of(processor, prompts)
        with pytest.raises(ValueError, match=r"prompts \[1\] hold images and videos"):
            model(**plain)
        with pytest.raises(ValueError, match=r"prompts \[1\] hold images and videos"):
            model(plain["input_ids"], **{k: v for k, v in plain.items() if k != "input_ids"})


# Configs


@pytest.mark.parametrize(
    "fields", [{"tokens_per_frame": 3}, {"tokens_per_video": 9}, {"ratio": 0.9, "temporal": True}], ids=str
)
def test_fields_of_videos_on_a_model_without_them_raise(fields):
    name = next(k for k in fields if k != "ratio")
    with pytest.raises(ValueError, match=f"{name}=.* is not allowed: .*takes no videos"):
        apply(make_tiled("next-vicuna"), MergeConfig(**fields))


@pytest.mark.parametrize("kind", KINDS)
def test_what_tiles_do_not_support_raises_when_it_is_applied(kind):
    model = make_tiled(kind)
    for fields, message in (
        ({"resize": (4, 5)}, r"resize=\(4, 5\) does not fit"),
        ({"ratio": 0.9, "method": "grid", "prefix_share": 0.5}, "grid"),
        ({"prefix": 0.5, "method": "grid", "tile_shares": "joint"}, "grid"),
        ({"prefix": 0.5, "method": "grid", "tile_shares": "attention"}, "grid|class token"),
        ({"decoder": {1: 0.5}, "method": "grid"}, "method 'grid' works on the grid"),
        ({"prefix": 0.5, "method": "grid", "temporal": True}, "grid|takes no videos"),
        ({"ratio": (0.9, 0.5)}, "ratio holds 2 shares"),
    ):
        with pytest.raises(ValueError, match=message):
            apply(model, MergeConfig(**fields))
    if takes_videos(kind) and kind != "next-video":
        with pytest.raises(ValueError, match="tile_shares='attention' needs a class token"):
            apply(model, MergeConfig(ratio=0.9, tile_shares="attention"))
    assert "token_merging" not in vars(model.config)


@pytest.mark.parametrize(
    "fields",
    [
        {"tokens_per_frame": 3}, {"tokens_per_video": 9}, {"ratio": 0.9, "temporal": True},
        {"ratio": 0.9, "newlines": "none"}, {"ratio": 0.9, "tile_shares": "equal"},
        {"ratio": 0.9, "across_tiles": False},
    ],
    ids=str,
)  # fmt: skip
def test_fields_of_tiles_on_a_model_without_them_raise(model, fields):
    name = next(k for k in fields if k != "ratio")
    with pytest.raises(
        ValueError, match=f"{name}=.* is not allowed: a LlavaForConditionalGeneration takes no"
    ):
        apply(model, MergeConfig(**fields))


@pytest.mark.parametrize("strategy, kind", [("full", "next-vicuna"), ("default", "onevision")])
def test_features_that_are_not_the_patches_alone_raise(strategy, kind):
    model = make_tiled(kind, vision_feature_select_strategy=strategy)
    with pytest.raises(ValueError, match=f"vision_feature_select_strategy='{strategy}' does not fit"):
        apply(model, CONFIG)
