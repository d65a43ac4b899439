"""Loading checkpoints of models that cut images into tiles, without torchvision, and preparing videos."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from tiled import KINDS, make_tiled, make_tiled_processor, noise, takes_videos, tile_side

from llava_pitome import MergeConfig, load, merge_tokens, remove
from llava_pitome.models.video_processor import PROCESSORS, PilVideoProcessor, make_processor

OF_VIDEOS = [kind for kind in KINDS if takes_videos(kind)]
PARTS = (
    "image_processor", "tokenizer", "num_image_tokens", "vision_feature_select_strategy", "patch_size",
    "vision_aspect_ratio", "num_additional_image_tokens",
)  # fmt: skip


def processor_of(kind):
    """A processor that can be saved, whose videos are prepared by PilVideoProcessor."""
    plain = make_tiled_processor(kind)
    if not takes_videos(kind):
        return plain
    side = tile_side(kind) * 8
    square = {"height": side, "width": side}
    is_next = kind == "next-video"
    sizes = {"size": {"shortest_edge": side}, "crop_size": square} if is_next else {"size": square}
    video = PilVideoProcessor(dict(PROCESSORS.values())[type(plain).__name__], sizes)
    parts = {name: getattr(plain, name) for name in PARTS if hasattr(plain, name)}
    return make_processor(type(plain), **parts, video_processor=video)


def ask(model, processor, **given):
    """Ids of four new tokens about an image or a video."""
    word = "<video>" if "videos" in given else "<image>"
    inputs = processor(text=f"{word} what is this", return_tensors="pt", **given)
    return model.generate(**inputs, max_new_tokens=4, do_sample=False)


def clip(count=3):
    return [noise(50, 90, seed) for seed in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_merging_model_is_loaded_merging(kind, tmp_path):
    model, processor = make_tiled(kind), processor_of(kind)
    config = MergeConfig(tokens=30, tokens_per_frame=4) if takes_videos(kind) else MergeConfig(tokens=30)
    given = [{"images": noise(60, 100)}, {"images": noise(130, 40)}]
    given += [{"videos": [clip()]}] if takes_videos(kind) else []
    plain = [ask(model, processor, **x) for x in given]
    with merge_tokens(model, config, processor):
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        expected = [ask(model, processor, **x) for x in given]
    loaded, own = load(str(tmp_path))
    assert (type(loaded), type(own)) == (type(model), type(processor))
    assert MergeConfig.from_dict(loaded.config.token_merging) == config
    assert own.tokenizer.padding_side == "left" and not loaded.training
    for x, ids in zip(given, expected):
        assert torch.equal(ask(loaded, own, **x), ids)
    remove(loaded)
    for x, ids in zip(given, plain):
        assert torch.equal(ask(loaded, own, **x), ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_checkpoint_is_loaded_plain_and_by_a_given_config(kind, tmp_path):
    make_tiled(kind).save_pretrained(tmp_path)
    processor_of(kind).save_pretrained(tmp_path)
    image = noise(60, 100)
    plain = load(str(tmp_path))
    merging = load(str(tmp_path), MergeConfig(tokens=30))
    counts = [
        (p(images=image, text="<image> what", return_tensors="pt").input_ids == m.config.image_token_id).sum()
        for m, p in (plain, merging)
    ]
    assert not hasattr(plain[0].config, "token_merging") and counts[0] > counts[1] == 30


@pytest.mark.parametrize("kind", ["next-vicuna", "next-video", "onevision"])
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_the_language_model_alone_is_quantized(kind, quantization, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = make_tiled(kind).config
    config.text_config.hidden_size, config.text_config.head_dim = 64, 16  # 4 bits pack blocks of 64
    type(make_tiled(kind))(config).save_pretrained(tmp_path)
    processor_of(kind).save_pretrained(tmp_path)
    model, processor = load(str(tmp_path), MergeConfig(ratio=0.8), quantization=quantization)
    kinds = {
        name: {type(m).__name__ for m in module.modules() if isinstance(m, torch.nn.Linear)}
        for name, module in (*model.model.named_children(), ("head", model.lm_head))
    }
    packed = "Linear4bit" if quantization == "4bit" else "Linear8bitLt"
    assert packed in kinds["language_model"]
    assert packed not in kinds["vision_tower"] | kinds["multi_modal_projector"] | kinds["head"]
    assert ask(model, processor, images=noise(60, 100)).shape[1] > 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_its_head_raises(kind, tmp_path):
    make_tiled(kind).model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a Llava\w+Model, which has no language model head"):
        load(str(tmp_path))


@pytest.mark.parametrize("kind", OF_VIDEOS)
@pytest.mark.parametrize("where", ["video_preprocessor_config.json", "preprocessor_config.json"])
def test_settings_of_older_checkpoints_are_read(kind, where, tmp_path):
    make_tiled(kind).save_pretrained(tmp_path)
    processor_of(kind).save_pretrained(tmp_path)
    nested = json.loads((tmp_path / "processor_config.json").read_text())
    video, images = nested.pop("video_processor"), nested.pop("image_processor")
    changed = {"image_mean": [0.1, 0.2, 0.3]}
    files = {"preprocessor_config.json": images, "processor_config.json": nested}
    if where in files:
        files[where] |= changed
    else:
        files[where] = video | changed
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    _, own = load(str(tmp_path))
    assert own.video_processor.settings["image_mean"] == [0.1, 0.2, 0.3]
    pixels = own.video_processor([Image.new("RGB", (9, 9))], return_tensors="pt")["pixel_values_videos"]
    std = torch.tensor(own.video_processor.settings["image_std"])
    assert torch.allclose(pixels[0, 0, :, 0, 0], -torch.tensor([0.1, 0.2, 0.3]) / std)


@pytest.mark.parametrize("kind", dict(PROCESSORS.values()).values())
def test_frames_are_prepared_as_images_of_these_settings(kind):
    videos = PilVideoProcessor(kind, {})
    pixels = videos([clip(3), clip(3)], return_tensors="pt")["pixel_values_videos"]
    side = 224 if kind == "LlavaNextVideoVideoProcessor" else 384
    assert pixels.shape == (2, 3, 3, side, side)
    mean, std = (torch.tensor(videos.settings[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    frame = clip(1)[0]
    if side == 224:  # the shorter side is scaled to the tile, and the middle is kept
        width = int(90 * side / 50)
        left = (width - side) // 2
        frame = frame.resize((width, side), Image.Resampling.BICUBIC).crop((left, 0, left + side, side))
    else:
        frame = frame.resize((side, side), Image.Resampling.BICUBIC)
    expected = (torch.tensor(np.asarray(frame)).permute(2, 0, 1) / 255 - mean) / std
    assert torch.allclose(pixels[0, 0], expected, atol=1e-5)


def test_a_video_may_be_an_array_or_a_tensor():
    videos = PilVideoProcessor("LlavaOnevisionVideoProcessor", {})
    array = np.stack([np.asarray(frame) for frame in clip()])
    forms = [
        clip(),
        [clip()],
        array,
        array[None],
        torch.tensor(array),
        torch.tensor(array).permute(0, 3, 1, 2),
    ]
    pixels = [videos(form, return_tensors="pt")["pixel_values_videos"] for form in forms]
    assert all(torch.equal(x, pixels[0]) for x in pixels)


@pytest.mark.parametrize(
    "given, options, reason",
    [
        ([], {}, "a video has 0 frames; at least 1 is needed"),
        ([[]], {}, "a video has 0 frames; at least 1 is needed"),
        ([[noise(9, 9)], []], {}, "a video has 0 frames; at least 1 is needed"),
        (np.zeros((0, 9, 9, 3), np.uint8), {}, "a video has 0 frames; at least 1 is needed"),
        ("a.mp4", {}, "a video is 'a.mp4'; read it with llava_pitome.video_io.read_video"),
        (["a.mp4"], {}, "a video is 'a.mp4'; read it with"),
        ([noise(9, 9)], {"num_frames": 4}, "num_frames=4 is not supported without torchvision"),
        ([noise(9, 9)], {"fps": 2}, "fps=2 is not supported without torchvision"),
        ([noise(9, 9)], {"device": "cpu"}, "device='cpu' is not supported for videos"),
    ],
)  # fmt: skip
def test_videos_that_cannot_be_prepared_raise(given, options, reason):
    with pytest.raises(ValueError, match=reason):
        PilVideoProcessor("LlavaOnevisionVideoProcessor", {})(given, **options)


@pytest.mark.parametrize("kind", OF_VIDEOS)
def test_an_older_transformers_is_named_where_videos_merge(kind, monkeypatch):
    model, processor = make_tiled(kind), processor_of(kind)
    features = type(model.model).get_video_features

    def older(self, pixel_values, **kwargs):
        return features(self, pixel_values, **kwargs)

    pixels = processor.video_processor([clip()], return_tensors="pt")["pixel_values_videos"]
    monkeypatch.setattr(type(model.model), "get_video_features", older)
    with merge_tokens(model, MergeConfig(ratio=1.0), processor):
        model.model.get_video_features(pixels)
    with (
        merge_tokens(model, MergeConfig(ratio=0.8), processor),
        pytest.raises(ValueError, match="merging the tokens of videos needs a newer transformers"),
    ):
        model.model.get_video_features(pixels)


@pytest.mark.parametrize("kind", OF_VIDEOS)
def test_a_processor_is_checked_copied_and_pickled_as_any_other(kind):
    processor = processor_of(kind)
    assert "check_argument_for_proper_class" not in vars(processor)
    for other in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        inputs = [p(videos=[clip()], text="<video> a", return_tensors="pt") for p in (processor, other)]
        assert all(torch.equal(inputs[0][name], inputs[1][name]) for name in inputs[0])
    with pytest.raises((TypeError, AttributeError)):
        make_processor(type(processor), image_processor=3, tokenizer=processor.tokenizer,
                       video_processor=processor.video_processor)  # fmt: skip
