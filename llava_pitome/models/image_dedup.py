"""Pictures that come several times in a batch, encoded once: benchmarks ask many questions about each."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn


def encode_once(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """What `generate` takes instead of `inputs`, where images repeat: their features, each computed once.

    Inputs without repeated images, and models that take no features, are returned as they are.

    Args:
        model: a LLaVA that is in use, merging or not.
        inputs: as the processor makes them, pixel_values (I, 3, H, W) among them.
    """
    pixels = inputs.get("pixel_values")
    takes = getattr(model, "_supports_mm_encoder_outputs", None)  # not there in older transformers
    if pixels is None or takes is None or not takes():
        return inputs
    first, which = distinct(pixels)
    if len(first) == len(which):
        return inputs
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    each = model.get_image_features(pixel_values=pixels[first], return_dict=True).pooler_output
    features = each[which] if isinstance(each, Tensor) else [each[i] for i in which]
    rest = {k: v for k, v in inputs.items() if k != "pixel_values"}
    return rest | {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)}}


def distinct(pixels: Tensor) -> tuple[list[int], list[int]]:
    """The index of the first of each distinct image (I, ...), and which of these every image is."""
    kinds: dict[bytes, int] = {}
    first, which = [], []
    for i, image in enumerate(pixels.detach().cpu().contiguous().view(torch.uint8).numpy()):
        kind = kinds.setdefault(hashlib.blake2b(image).digest(), len(kinds))
        if kind == len(first):
            first.append(i)
        which.append(kind)
    return first, which
