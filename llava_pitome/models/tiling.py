"""How models of the LLaVA-NeXT family cut images into tiles: their configs' numbers, and layouts from sizes.

The layouts are those that transformers' own packing makes, known from the sizes of the images alone.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from llava_pitome.image_layout import ImageLayout, single_tile, tiled, video


class Tiling(NamedTuple):
    """The numbers of a model's config on which its image layouts depend.

    Attributes:
        side: rows, and columns, of the patches of a tile.
        tile: side of a tile in pixels.
        pinpoints: height and width in pixels of the grids that images are scaled to.
        max_tiles: tiles whose tokens a grid may have before it is pooled; None: it is never pooled.
        has_single_tiles: whether images that share a prompt are one tile each.
        frame_side: rows, and columns, of the tokens of a video's frame; None: the model takes no videos.
        video_newline: whether a newline token follows a video.
    """

    side: int
    tile: int
    pinpoints: tuple[tuple[int, int], ...]
    max_tiles: int | None = None
    has_single_tiles: bool = False
    frame_side: int | None = None
    video_newline: bool = False

    @property
    def nominal_size(self) -> tuple[int, int]:
        """Height and width in pixels of the image for which counts are given where no image is known.

        It is the largest square grid whose tokens are not pooled: 672 x 672 for LLaVA-NeXT, whose 2,880
        patches papers start from. Where no grid is square, the largest.
        """
        most = None if self.max_tiles is None else self.max_tiles * self.tile**2
        whole = [(h, w) for h, w in self.pinpoints if most is None or h * w <= most]
        squares = [(h, w) for h, w in whole if h == w]
        return max(squares or whole or self.pinpoints, key=lambda sides: sides[0] * sides[1])

    def image(self, height: int, width: int, is_alone: bool = True) -> ImageLayout:
        """The layout of an image.

        Args:
            height: in pixels.
            width: in pixels.
            is_alone: whether it is the only image of its prompt.

        Raises:
            ValueError: a side is below one pixel.
        """
        if self.has_single_tiles and not is_alone:
            return single_tile(self.side, ends_with_newline=True)
        return _tiled(self, int(height), int(width))

    def images(self, sizes: Any, counts: Any = None) -> list[ImageLayout]:
        """The layouts of a batch's images.

        Args:
            sizes: (I, 2) height and width of each, in pixels.
            counts: images of each prompt; None: every image is alone in its prompt.

        Raises:
            ValueError: sizes are not of this shape, counts do not add up to the number of images, or a side
                is below one pixel.
        """
        found = [] if sizes is None else _plain(sizes)
        if not found or any(not isinstance(size, Sequence) or len(size) != 2 for size in found):
            raise ValueError(
                f"image_sizes={found or sizes} is not allowed: it must be (images, 2), the height and width "
                "of each image in pixels"
            )
        sizes = found
        alone = [True] * len(sizes)
        if counts is not None and self.has_single_tiles:
            alone = [n == 1 for n in _plain(counts) for _ in range(n)]
            if len(alone) != len(sizes):
                raise ValueError(
                    f"batch_num_images={_plain(counts)} names {len(alone)} images; image_sizes holds "
                    f"{len(sizes)}"
                )
        return [self.image(*size, is_alone) for size, is_alone in zip(sizes, alone)]

    def video(self, frames: int) -> ImageLayout:
        """The layout of a video.

        Raises:
            ValueError: it has no frames, or the model takes no videos.
        """
        if self.frame_side is None:
            raise ValueError("this model takes no videos")
        if frames < 1:
            raise ValueError(f"a video has {frames} frames; at least 1 is needed")
        return video(self.side, frames, self.frame_side, self.video_newline)


def _plain(values: Any) -> list:
    """Nested numbers of a tensor, an array or a sequence as lists."""
    return values.tolist() if hasattr(values, "tolist") else [_plain(v) if _is_row(v) else v for v in values]


def _is_row(value: Any) -> bool:
    return hasattr(value, "tolist") or isinstance(value, Sequence)


@lru_cache(maxsize=4096)
def _tiled(tiling: Tiling, height: int, width: int) -> ImageLayout:
    from transformers.image_processing_utils import select_best_resolution

    if min(height, width) < 1:
        raise ValueError(f"an image has {height} x {width} pixels; each side must be at least 1")
    best = select_best_resolution((height, width), [list(pinpoint) for pinpoint in tiling.pinpoints])
    if best is None:  # an image so narrow that it vanishes in every grid
        raise ValueError(
            f"an image of {height} x {width} pixels fits none of image_grid_pinpoints="
            f"{list(tiling.pinpoints)}"
        )
    rows, columns = (pixels // tiling.tile for pixels in best)
    return tiled(tiling.side, rows, columns, height, width, tiling.max_tiles)
