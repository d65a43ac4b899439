"""The control for choosing by content: patches are pooled in the cells of a uniform grid, average pooling.

There are exactly as many cells as tokens are to stay. Where these make no rectangle, bands of rows differ by
one in how many cells they hold.
"""

import math

import torch
from torch import Tensor

from llava_pitome.methods._common import middle, part_of


def parents(metric: Tensor, remove: int, *, depth: float = 0.0, grid: tuple[int, int]) -> Tensor:
    """The token each token folds into: (B, N), the one in the middle of its cell.

    Args:
        metric: (B, N, D); only its shape counts.
        remove: tokens that go, at most N - 1.
        depth: not used by this method.
        grid: rows and columns of patches, N in all.

    Raises:
        ValueError: a grid of another number of patches.
    """
    count, (rows, columns) = metric.shape[1], grid
    if rows * columns != count:
        raise ValueError(f"grid={grid!r} is not allowed: rows times columns must be the {count} tokens")
    cells = count - remove
    square = round(math.sqrt(cells * rows / columns))  # bands that make cells nearly square
    bands = min(max(square, math.ceil(cells / columns)), rows, cells)
    place = torch.arange(count, device=metric.device)
    band = part_of(place // columns, rows, bands)  # (N,)
    held = (band + 1) * cells // bands - band * cells // bands  # (N,) cells in the band
    cell = part_of(place % columns, columns, held)
    parent = middle(band, rows, bands) * columns + middle(cell, columns, held)
    return parent.repeat(len(metric), 1)
