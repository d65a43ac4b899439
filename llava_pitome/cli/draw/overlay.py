"""Which patches became one token: an image with the patches of each token in one colour.

Shapes: N patches; an image of patches is (rows, step, columns, step, 3), `step` pixels per patch.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from llava_pitome.image_io import to_rgb

EDGE = (255, 255, 255)
FAINT = 0.3  # opacity of a line between two patches that are tokens of their own
DARK = 0.25  # brightness of dropped patches
PADDING, HATCH = (236, 238, 241), (190, 194, 200)  # colours of cells that show padding, and of their hatching
BLANK = (255, 255, 255)
DROPPED, PADDED, EMPTY = -1, -2, -3  # in place of tokens


class Outside(NamedTuple):
    """The cells of a grid that no token stands for.

    Attributes:
        padding: (N,) True for cells that show padding, which are hatched.
        blank: (N,) True for cells without a patch, which are white.
    """

    padding: Tensor
    blank: Tensor


def overlay(
    image: Image.Image,
    slot: Tensor,
    step: int = 32,
    grid: tuple[int, int] | None = None,
    dropped: Tensor | None = None,
    outside: Outside | None = None,
) -> Image.Image:
    """The image with the patches of each token in their mean colour, and white lines between tokens.

    A patch that is a token of its own shows the image; a dropped patch is dark.

    Args:
        image: the input of the vision tower, a whole number of patches high and wide.
        slot: (N,) the token of each patch, in raster order.
        step: pixels per patch in the result.
        grid: rows and columns of patches; None: a square.
        dropped: (N,) True for dropped patches.
        outside: cells that no token stands for; None: there are none.

    Raises:
        ValueError: the grid does not have N patches, or the image is not a whole number of patches.
    """
    rows, columns = grid_of(len(slot), grid)
    if image.width % columns or image.height % rows:
        raise ValueError(
            f"{rows} x {columns} patches do not tile an image of {image.width} x {image.height} pixels"
        )
    image = to_rgb(image)
    is_dropped = np.zeros(len(slot), bool) if dropped is None else dropped.cpu().numpy()
    token = numbered(slot, is_dropped, outside)
    tiles = np.asarray(image, np.float64).reshape(rows, image.height // rows, columns, -1, 3)
    _, index, count = np.unique(token, return_inverse=True, return_counts=True)
    colours = np.zeros((len(count), 3))
    np.add.at(colours, index, tiles.mean((1, 3)).reshape(-1, 3))
    means, is_single = (colours / count[:, None])[index], (count == 1)[index]  # of each patch's token
    enlarged = image.resize((columns * step, rows * step), Image.Resampling.BICUBIC)
    pixels = np.asarray(enlarged, np.float64).reshape(rows, step, columns, step, 3)

    def per_patch(values: np.ndarray) -> np.ndarray:
        return values.reshape(rows, 1, columns, 1, -1)

    painted = np.where(per_patch(is_single), pixels, per_patch(means))
    painted = np.where(per_patch(is_dropped), pixels * DARK, painted)
    painted = with_outside(painted, outside)
    return with_lines(painted, token, EDGE, is_single & ~is_dropped)


def plain(
    image: Image.Image, step: int, grid: tuple[int, int], outside: Outside | None = None
) -> Image.Image:
    """The image with `step` pixels per patch; arguments as for `overlay`."""
    rows, columns = grid
    enlarged = to_rgb(image).resize((columns * step, rows * step), Image.Resampling.BICUBIC)
    pixels = np.asarray(enlarged, np.float64).reshape(rows, step, columns, step, 3)
    painted = with_outside(pixels, outside)
    return Image.fromarray(painted.round().astype(np.uint8).reshape(rows * step, columns * step, 3))


def numbered(slot: Tensor, is_dropped: np.ndarray, outside: Outside | None) -> np.ndarray:
    """The token (N,) of each cell, where all dropped patches, padding, and blank cells are one each."""
    token = np.where(is_dropped, DROPPED, slot.cpu().numpy())
    if outside is None:
        return token
    return np.where(outside.blank.numpy(), EMPTY, np.where(outside.padding.numpy(), PADDED, token))


def with_outside(painted: np.ndarray, outside: Outside | None) -> np.ndarray:
    """An image of patches (rows, step, columns, step, 3) with padding hatched and blank cells white."""
    if outside is None:
        return painted
    rows, step, columns = painted.shape[:3]
    down, across = np.arange(rows * step), np.arange(columns * step)
    is_line = (down[:, None] + across) % 8 < 2  # diagonals across cells
    hatched = np.where(is_line[..., None], HATCH, PADDING).reshape(painted.shape)
    for cells, colours in ((outside.padding, hatched), (outside.blank, np.array(BLANK))):
        painted = np.where(cells.numpy().reshape(rows, 1, columns, 1, 1), colours, painted)
    return painted


def grid_of(count: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of `count` patches.

    Raises:
        ValueError: the grid, or a square where it is None, does not have as many.
    """
    rows, columns = grid or (round(count**0.5),) * 2
    if rows * columns != count:
        raise ValueError(f"{count} patches are no grid of {rows} x {columns}")
    return rows, columns


def with_lines(
    painted: np.ndarray, token: np.ndarray, colour: tuple[int, int, int], faint: np.ndarray | None = None
) -> Image.Image:
    """An image of patches with a line between patches of different tokens.

    Args:
        painted: (rows, step, columns, step, 3), values 0 to 255.
        token: (N,) the token of each patch; there is no line between cells that no token stands for.
        colour: of the lines.
        faint: (N,) the line between two such patches is faint; None: no line is.
    """
    rows, step, columns = painted.shape[:3]
    token = token.reshape(rows, columns)
    faint = np.zeros(token.shape, bool) if faint is None else faint.reshape(rows, columns)

    def opacity(a: tuple, b: tuple) -> np.ndarray:
        differ = (token[a] != token[b]) & (np.maximum(token[a], token[b]) > PADDED)
        return differ * np.where(faint[a] & faint[b], FAINT, 1.0)

    upper, lower, left, right = np.s_[:-1], np.s_[1:], np.s_[:, :-1], np.s_[:, 1:]
    line = np.zeros(painted.shape[:4])
    thickness = max(step // 8, 1)  # pixels; an odd one is below or right of the border
    start, end = step - thickness // 2, thickness - thickness // 2
    horizontal, vertical = opacity(upper, lower)[:, None, :, None], opacity(left, right)[:, None, :, None]
    line[:-1, start:] = horizontal
    line[1:, :end] = horizontal
    line[:, :, :-1, start:] = np.maximum(line[:, :, :-1, start:], vertical)
    line[:, :, 1:, :end] = np.maximum(line[:, :, 1:, :end], vertical)
    painted = painted + line[..., None] * (np.array(colour, float) - painted)
    return Image.fromarray(painted.round().astype(np.uint8).reshape(rows * step, columns * step, 3))
