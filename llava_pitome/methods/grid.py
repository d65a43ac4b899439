"""Grid pooling, a control for choosing tokens by content: average pooling in the cells of a uniform grid."""

import math

import torch
from torch import Tensor

from llava_pitome.merge.reduce import MergeResult
from llava_pitome.methods._common import segment_middle, segment_of
from llava_pitome.methods.registry import Method, register_method


@register_method("grid")
class Grid(Method):
    """Patches merge within cells, exactly as many as tokens are kept, into the middle patch of each.

    Where the count has no rectangular grid, bands of rows differ by one in their number of cells. Only the
    metric's shape counts.
    """

    needs = ("grid",)
    places = ("prefix", "decoder")

    def merge(self, metric: Tensor, remove: int, depth: float = 0.0, *, grid: tuple[int, int]) -> MergeResult:
        """Returns the cells.

        Raises:
            ValueError: rows times columns of the grid are not N.
        """
        count, (rows, columns) = metric.shape[1], grid
        if rows * columns != count:
            raise ValueError(f"grid={grid!r} is not allowed: rows times columns must be the {count} tokens")
        cells = count - remove
        square = round(math.sqrt(cells * rows / columns))  # number of bands that makes cells nearly square
        bands = min(max(square, math.ceil(cells / columns)), rows, cells)
        position = torch.arange(count, device=metric.device)
        band = segment_of(position // columns, rows, bands)  # (N,)
        width = (band + 1) * cells // bands - band * cells // bands  # (N,) cells in the band
        cell = segment_of(position % columns, columns, width)
        parent = segment_middle(band, rows, bands) * columns + segment_middle(cell, columns, width)
        return MergeResult(parent.repeat(len(metric), 1))
