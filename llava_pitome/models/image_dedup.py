"""Images and videos that repeat in a batch, encoded once: benchmarks ask many questions of each."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava_pitome.models import hf_llava as llava

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}  # by modality, as `generate` names it
OF_IMAGES = ("image_sizes", "batch_num_images")  # further inputs of the models that cut images into tiles


def encode_once(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """What `generate` takes instead of `inputs`, where images repeat: their features, each computed once.

    Inputs without repeated images, and models that take no features, are returned as they are.

    Args:
        model: a LLaVA that is in use, merging or not.
        inputs: as the processor makes them; images are pixel_values (I, 3, H, W), or (I, tiles, 3, H, W) with
            image_sizes (I, 2), videos are pixel_values_videos (V, frames, 3, H, W).
    """
    takes = getattr(model, "_supports_mm_encoder_outputs", None)  # not there in older transformers
    if takes is None or not takes():
        return inputs
    found = {"image": _images(model, inputs), "video": _videos(model, inputs)}
    found = {modality: features for modality, features in found.items() if features is not None}
    if not found:
        return inputs
    encoded = {PIXELS[modality] for modality in found} | (set(OF_IMAGES) if "image" in found else set())
    return {k: v for k, v in inputs.items() if k not in encoded} | {"mm_encoder_outputs": found}


def distinct(pixels: Tensor, others: Sequence[Any] | None = None) -> tuple[list[int], list[int]]:
    """The index of the first of each distinct image (I, ...), and which of these every image is.

    Args:
        pixels: of the images.
        others: of each image, what else it must have in common with another to be the same.
    """
    kinds: dict[Any, int] = {}
    first, which = [], []
    for i, image in enumerate(pixels.detach().cpu().contiguous().view(torch.uint8).numpy()):
        other = None if others is None else others[i]
        kind = kinds.setdefault((hashlib.blake2b(image).digest(), other), len(kinds))
        if kind == len(first):
            first.append(i)
        which.append(kind)
    return first, which


def _images(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """The features of all images; None where none repeats."""
    pixels, sizes = inputs.get(PIXELS["image"]), inputs.get("image_sizes")
    if pixels is None or (sizes is not None and pixels.ndim != 5):
        return None
    if sizes is None:
        first, which = distinct(pixels)
        if len(first) == len(which):
            return None
        return _repeated(model.get_image_features(pixel_values=pixels[first], return_dict=True), which)
    tiling, counts = llava.find(model).llava.tiling, inputs.get("batch_num_images")
    layouts = tiling.images(sizes, counts)
    first, which = distinct(pixels, list(zip(layouts, map(tuple, sizes.tolist()))))
    if len(first) == len(which):
        return None
    given: dict[str, Any] = {}
    if counts is not None:  # those that share a prompt last, at least two of them
        order = sorted(range(len(first)), key=lambda k: layouts[first[k]].ends_with_newline)
        shared = sum(layouts[i].ends_with_newline for i in first)
        first = [first[k] for k in order] + [first[order[-1]]] * (shared == 1)
        place = {k: position for position, k in enumerate(order)}
        which = [place[k] for k in which]
        alone = len(order) - shared
        given["batch_num_images"] = [1] * alone + [len(first) - alone] * (shared > 0)
    each = model.get_image_features(
        pixel_values=pixels[first], image_sizes=sizes[first], **given, return_dict=True
    )
    return _repeated(each, which)


def _videos(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """The features of all videos; None where none repeats."""
    pixels = inputs.get(PIXELS["video"])
    if pixels is None:
        return None
    first, which = distinct(pixels)
    if len(first) == len(which):
        return None
    return _repeated(model.get_video_features(pixels[first], return_dict=True), which)


def _repeated(output: Any, which: list[int]) -> Any:
    """The features of every image, of those of each distinct one."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    each = output.pooler_output
    features = each[which] if isinstance(each, Tensor) else [each[i] for i in which]
    return BaseModelOutputWithPooling(pooler_output=features)
