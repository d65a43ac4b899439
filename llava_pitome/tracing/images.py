"""Tracing an image, or a video: a model runs on it once, and its merges are recorded."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from llava_pitome.api import merge_tokens
from llava_pitome.config import MergeConfig
from llava_pitome.hooks.handle import MergeHandle
from llava_pitome.image_io import to_rgb
from llava_pitome.models import hf_llava
from llava_pitome.tracing.recorder import MergeRecorder, record_merges
from llava_pitome.tracing.states import MergeTrace
from llava_pitome.tracing.tiles import canvas_of


class ImageTrace(NamedTuple):
    """One image or video, one config, and what the config does to its patches.

    Attributes:
        config: how the model merged.
        image: the input of the vision tower as an image, after resizing, cropping and normalisation; of a
            model that cuts images into tiles, the tiles put together as `tracing.tiles.Canvas` says.
        grid: rows and columns of its patches.
        trace: its merges.
        padding: (N,) which cells of the grid show padding; None: none does.
        blank: (N,) which cells hold no patch; None: all do.
        newlines: tokens at the input of the language model that are no patch's.
    """

    config: MergeConfig
    image: Image.Image
    grid: tuple[int, int]
    trace: MergeTrace
    padding: Tensor | None = None
    blank: Tensor | None = None
    newlines: int = 0


@torch.no_grad()
def trace_image(
    model: nn.Module, processor: Any, image: Image.Image, config: MergeConfig, question: str | None = None
) -> ImageTrace:
    """Runs a model once on an image, merging as `config` says, and returns the trace of the image.

    A config that was applied before, and the processor, are restored afterwards.

    Args:
        model: see `models.hf_llava.SUPPORTED`.
        processor: its processor.
        image: of any size and mode; it becomes RGB as by `image_io.to_rgb`.
        config: how to merge.
        question: about the image; needed, and used, only where the language model merges. A text that
            contains the processor's image token is taken as the complete prompt.

    Raises:
        ValueError: the model does not support the config, the image cannot become RGB, or a question is
            missing.
    """
    image = to_rgb(image)
    in_language_model = _reads_question(config, question)
    with merge_tokens(model, config, processor) as handle, record_merges(handle) as recorder:
        prepared = processor.image_processor(image, return_tensors="pt")
        pixels = prepared["pixel_values"]
        if in_language_model:
            inputs = processor(images=[image], text=_prompt(processor, question), return_tensors="pt")
            model(**inputs.to(model.device, model.dtype), logits_to_keep=1)
        else:
            names = ("image_sizes", "batch_num_images")
            hf_llava.encode(model, pixels, **{name: prepared[name] for name in names if name in prepared})
        if recorder.layout is not None:
            return _put_together(processor.image_processor, handle, recorder, pixels[0])
        pixels = handle.resized(pixels)
        grid = tuple(side // processor.patch_size for side in pixels.shape[-2:])
        return ImageTrace(config, as_image(processor, pixels[0]), grid, recorder.trace())


@torch.no_grad()
def trace_video(
    model: nn.Module,
    processor: Any,
    frames: Sequence[Image.Image],
    config: MergeConfig,
    question: str | None = None,
) -> ImageTrace:
    """Runs a model once on a video, merging as `config` says, and returns the trace of its frames.

    Args:
        model: that takes videos.
        processor: its processor.
        frames: of the video, as `video_io.read_video` returns them.
        config: how to merge.
        question: as for `trace_image`.

    Raises:
        ValueError: the model takes no videos or does not support the config, a frame cannot become RGB, there
            are none, or a question is missing.
    """
    llava = hf_llava.find(model).llava
    if llava is None or llava.tiling is None or llava.tiling.frame_side is None:
        raise ValueError(f"a {type(hf_llava.unwrap(model)).__name__} takes no videos")
    frames = [to_rgb(frame) for frame in frames]
    in_language_model = _reads_question(config, question)
    with merge_tokens(model, config, processor) as handle, record_merges(handle) as recorder:
        pixels = processor.video_processor([frames], return_tensors="pt")["pixel_values_videos"]
        if in_language_model:
            text = _prompt(processor, question, "video")
            inputs = processor(videos=[frames], text=text, return_tensors="pt")
            model(**inputs.to(model.device, model.dtype), logits_to_keep=1)
        else:
            hf_llava.encode_video(model, pixels)
        return _put_together(processor.video_processor, handle, recorder, pixels[0])


def _reads_question(config: MergeConfig, question: str | None) -> bool:
    """Whether a config merges in the language model; raises ValueError where it does without a question."""
    in_language_model = bool(config.merging_layers)
    if in_language_model and not question:
        raise ValueError(
            f"method {config.method!r} merges in the language model, which reads a question: give one"
        )
    return in_language_model


def _put_together(settings: Any, handle: MergeHandle, recorder: MergeRecorder, tiles: Tensor) -> ImageTrace:
    """The trace of an image whose tiles are (T, 3, H, W), prepared by a processor with these settings."""
    canvas, trace = canvas_of(recorder.layout), recorder.trace()
    packed = trace.after("prefix")
    patches = packed.slot[packed.slot >= 0].unique()
    pictures = [_as_image(settings, tile) for tile in handle.resized(tiles[: len(canvas.cell)])]
    return ImageTrace(
        handle.config, canvas.image(pictures), canvas.grid, trace, canvas.padding, canvas.blank,
        newlines=packed.tokens - len(patches),
    )  # fmt: skip


def as_image(processor: Any, pixels: Tensor) -> Image.Image:
    """Pixel values (3, H, W) of one image as an RGB image, with the processor's normalisation undone."""
    return _as_image(processor.image_processor, pixels)


def _as_image(settings: Any, pixels: Tensor) -> Image.Image:
    values = pixels.detach().cpu().float().numpy()
    if settings.do_normalize:
        mean, std = (
            np.asarray(x, np.float32).reshape(-1, 1, 1) for x in (settings.image_mean, settings.image_std)
        )
        values = values * std + mean
    if settings.do_rescale:
        values = values / settings.rescale_factor
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def _prompt(processor: Any, question: str, kind: str = "image") -> str:
    """The prompt of a question about one image or video."""
    if getattr(processor, f"{kind}_token") in question:
        return question
    content = [{"type": kind}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
