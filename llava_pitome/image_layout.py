"""How a model cuts an image into tiles, and which of their patches reach the language model: numbers alone.

LLaVA-NeXT and its kin encode a thumbnail and a grid of tiles of one image (anyres), and the frames of a
video. After the projector they leave out the patches that only show padding (unpad), pool large grids, and
put a newline token after each row.
"""

import math
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple


class Window(NamedTuple):
    """Rows and columns of patches, from the first to before the last."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def area(self) -> int:
        """Patches in it."""
        return max(self.bottom - self.top, 0) * max(self.right - self.left, 0)


class Region(NamedTuple):
    """Tiles whose patches form one grid: a thumbnail, the tiles of an image, a frame of a video.

    Attributes:
        first: index of its first tile among the image's.
        rows: of tiles.
        columns: of tiles.
        window: the patches of the grid that show the image, and not padding.
        height: rows of the tokens that the language model is given without merging.
        width: their columns. Height and width are those of the window, unless the model pools it.
        newlines: whether a newline token follows each row.
    """

    first: int
    rows: int
    columns: int
    window: Window
    height: int
    width: int
    newlines: bool = False

    @property
    def tiles(self) -> int:
        """The number of its tiles."""
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        """Tokens without merging, newlines not counted."""
        return self.height * self.width

    @property
    def num_newlines(self) -> int:
        """Newline tokens without merging."""
        return self.height if self.newlines else 0

    @property
    def is_pooled(self) -> bool:
        """Whether the model pools the window to fewer tokens."""
        return self.tokens != self.window.area

    def window_of(self, tile: int, side: int) -> Window:
        """The patches of one of its tiles, counted from its first, that show the image."""
        row, column = divmod(tile, self.columns)
        top, bottom = (min(max(x - row * side, 0), side) for x in self.window[:2])
        left, right = (min(max(x - column * side, 0), side) for x in self.window[2:])
        return Window(top, bottom, left, right)


class _Layout(NamedTuple):
    side: int
    regions: tuple[Region, ...]
    ends_with_newline: bool = False
    is_video: bool = False


class ImageLayout(_Layout):
    """An image or a video as a model encodes it.

    Attributes:
        side: rows, and columns, of the patches of a tile.
        regions: in the order in which the language model is given them.
        ends_with_newline: whether one newline token follows all of them.
        is_video: whether the regions are the frames of a video.
    """

    @property
    def tiles(self) -> int:
        """Tiles of all regions."""
        return sum(region.tiles for region in self.regions)

    @property
    def tokens(self) -> int:
        """Tokens that the language model is given without merging, newlines among them."""
        return sum(r.tokens + r.num_newlines for r in self.regions) + self.ends_with_newline

    def resized(self, side: int) -> "ImageLayout":
        """The layout where every tile has side x side patches, and no region is pooled."""
        regions = []
        for region in self.regions:
            top, bottom, left, right = (round(x * side / self.side) for x in region.window)
            height, width = max(bottom - top, 0), max(right - left, 0)
            window = Window(top, bottom, left, right)
            regions.append(region._replace(window=window, height=height, width=width))
        return self._replace(side=side, regions=tuple(regions))

    def tile_windows(self) -> Iterator[Window]:
        """The patches of each tile that show the image."""
        for region in self.regions:
            for tile in range(region.tiles):
                yield region.window_of(tile, self.side)

    @cached_property
    def tile_patches(self) -> tuple[int, ...]:
        """How many patches of each tile show the image."""
        return tuple(window.area for window in self.tile_windows())


def single_tile(side: int, ends_with_newline: bool = False) -> ImageLayout:
    """The layout of an image that is one tile, all of whose patches show it."""
    return ImageLayout(side, (_whole_tile(0, side),), ends_with_newline)


def tiled(
    side: int, rows: int, columns: int, height: int, width: int, max_tiles: int | None = None
) -> ImageLayout:
    """The layout of an image as a thumbnail and a grid of tiles.

    The image is scaled to the grid without changing its aspect, and padded on both sides alike.

    Args:
        side: rows of patches of a tile.
        rows: of tiles.
        columns: of tiles.
        height: of the image in pixels.
        width: of the image in pixels.
        max_tiles: tiles whose tokens a grid may have; a larger one is pooled (OneVision's anyres_max_9).
    """
    window = unpadded(rows * side, columns * side, height, width)
    kept_rows, kept_columns = window.bottom - window.top, window.right - window.left
    if max_tiles is not None:
        ratio = math.sqrt(kept_rows * kept_columns / (max_tiles * side**2))
        if ratio > 1.1:
            kept_rows, kept_columns = int(kept_rows // ratio), int(kept_columns // ratio)
    grid = Region(1, rows, columns, window, kept_rows, kept_columns, newlines=True)
    return ImageLayout(side, (_whole_tile(0, side), grid))


def unpadded(rows: int, columns: int, height: int, width: int) -> Window:
    """The patches that show an image of `height` x `width` pixels, scaled into rows x columns of patches.

    Rounds as transformers' `unpad_image` does.
    """
    if width / height > columns / rows:
        shown = int(round(height * (columns / width), 7))
        padding = (rows - shown) // 2
        return Window(padding, rows - padding, 0, columns)
    shown = int(round(width * (rows / height), 7))
    padding = (columns - shown) // 2
    return Window(0, rows, padding, columns - padding)


def video(side: int, frames: int, pooled_side: int, ends_with_newline: bool) -> ImageLayout:
    """The layout of a video: each frame is a tile, pooled to pooled_side x pooled_side tokens."""
    whole = Window(0, side, 0, side)
    regions = tuple(Region(i, 1, 1, whole, pooled_side, pooled_side) for i in range(frames))
    return ImageLayout(side, regions, ends_with_newline, is_video=True)


def _whole_tile(first: int, side: int) -> Region:
    return Region(first, 1, 1, Window(0, side, 0, side), side, side)
