"""A picture as the tower sees it: shrunk, cropped to a square, and made visible again."""

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor


def pixels(processor: Any, picture: Image.Image) -> Tensor:
    """What the tower is given of a picture: (1, 3, H, W)."""
    return processor.image_processor(picture, return_tensors="pt")["pixel_values"]


def visible(processor: Any, seen: Tensor) -> Image.Image:
    """One picture (3, H, W) as the tower is given it, with the normalisation of `pixels` taken back."""
    how, values = processor.image_processor, seen.detach().cpu().float().numpy()
    if how.do_normalize:
        mean, deviation = (
            np.asarray(x, np.float32).reshape(-1, 1, 1) for x in (how.image_mean, how.image_std)
        )
        values = values * deviation + mean
    if how.do_rescale:
        values = values / how.rescale_factor
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
