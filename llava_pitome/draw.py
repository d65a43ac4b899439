"""Which patches became one token: pictures of a merge.

The only file that draws; needs numpy and pillow, which are imported where they are used.
"""

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

EDGE = (255, 255, 255)


def overlay(picture: "Image.Image", slot: Tensor, scale: int = 4) -> "Image.Image":
    """The picture with every token's patches in their mean colour, and a line between tokens.

    Args:
        picture: as the tower sees it: square, cropped, a whole number of patches across.
        slot: (N,) the token that each patch ended up in, in raster order; see `merging.trace`.
        scale: screen pixels a picture pixel.

    Raises:
        ValueError: N is no square number, or the picture is not a whole number of patches across.
    """
    import numpy as np
    from PIL import Image

    side = round(len(slot) ** 0.5)
    if side * side != len(slot) or picture.width != picture.height or picture.width % side:
        raise ValueError(
            f"{len(slot)} patches do not tile a picture of {picture.width} x {picture.height} pixels"
        )
    patch = picture.width // side
    groups = slot.cpu().numpy().reshape(side, side)
    pixels = np.asarray(picture.convert("RGB"), np.float64)
    means = pixels.reshape(side, patch, side, patch, 3).mean((1, 3))  # (side, side, 3)
    for token in np.unique(groups):
        means[groups == token] = means[groups == token].mean(0)
    step = patch * scale
    painted = means.repeat(step, 0).repeat(step, 1)
    for axis in (0, 1):
        edges = np.diff(groups, axis=axis) != 0
        for row, column in zip(*edges.nonzero()):
            y, x = row * step, column * step
            if axis == 0:
                painted[y + step - 1 : y + step + 1, x : x + step] = EDGE
            else:
                painted[y : y + step, x + step - 1 : x + step + 1] = EDGE
    return Image.fromarray(painted.round().astype(np.uint8))


def strip(pictures: "list[Image.Image]", gap: int = 8) -> "Image.Image":
    """Pictures of one height side by side on white."""
    from PIL import Image

    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    whole = Image.new("RGB", (width, max(p.height for p in pictures)), (255, 255, 255))
    x = 0
    for picture in pictures:
        whole.paste(picture, (x, 0))
        x += picture.width + gap
    return whole
