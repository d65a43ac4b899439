"""How a LLaVA-NeXT divides a picture into a thumbnail and tiles; sizes are (height, width) in pixels.

The numbers are those of LLaVA-NeXT at a third: tiles of 112 pixels instead of 336.
"""

import math
from dataclasses import dataclass

import numpy as np

from llava_pitome.embedded.scenes import PATCH, SIDE

PINPOINTS = ((SIDE, 2 * SIDE), (2 * SIDE, SIDE), (2 * SIDE, 2 * SIDE), (3 * SIDE, SIDE), (SIDE, 3 * SIDE))
GRID = SIDE // PATCH  # patches of a tile's side


@dataclass(frozen=True)
class Tiling:
    """The tiles of a picture, which is resized to `resized` and padded to `resolution`.

    Attributes:
        size: of the picture.
        resolution: the sum of the tiles, one of PINPOINTS.
        resized: the picture within it.
        offset: pixels of padding above and on the left.
    """

    size: tuple[int, int]
    resolution: tuple[int, int]
    resized: tuple[int, int]
    offset: tuple[int, int]

    @property
    def scale(self) -> float:
        """Pixels of the tiles per pixel of the picture."""
        return min(r / s for r, s in zip(self.resolution, self.size))

    @property
    def tiles(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return self.resolution[0] // SIDE, self.resolution[1] // SIDE

    def patch_borders(self, axis: int) -> np.ndarray:
        """Borders of the patches along an axis, in pixels of the picture; some are outside of it."""
        patches = np.arange(self.resolution[axis] // PATCH + 1) * PATCH
        return (patches - self.offset[axis]) * self.size[axis] / self.resized[axis]

    def tile_borders(self, axis: int) -> np.ndarray:
        """Borders between two tiles along an axis, in pixels of the picture."""
        return self.patch_borders(axis)[GRID:-1:GRID]


def tiling(height: int, width: int) -> Tiling:
    """The tiling of a picture of this size."""
    resolution = best_resolution(height, width)
    scale = min(resolution[0] / height, resolution[1] / width)
    resized = (
        min(math.ceil(height * scale), resolution[0]),
        min(math.ceil(width * scale), resolution[1]),
    )
    offset = ((resolution[0] - resized[0]) // 2, (resolution[1] - resized[1]) // 2)
    return Tiling((height, width), resolution, resized, offset)


def best_resolution(height: int, width: int) -> tuple[int, int]:
    """The pinpoint that keeps most of a picture's pixels; of several the smallest, then the first."""

    def merit(pinpoint: tuple[int, int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - pinpoint[0] * pinpoint[1]

    return max(PINPOINTS, key=merit)
