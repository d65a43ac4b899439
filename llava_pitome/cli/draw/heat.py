"""A number per patch as a colour: the heat map of energies. Needs no matplotlib, which the web page lacks."""

import numpy as np
from PIL import Image
from torch import Tensor

from llava_pitome.cli.draw.overlay import Outside, grid_of, numbered, with_lines, with_outside

COLOURS = ((46, 30, 94), (49, 92, 148), (39, 148, 140), (127, 200, 92), (250, 232, 92))  # low to high
EDGE = (24, 24, 32)
DROPPED = (128, 128, 128)


def heat(
    values: Tensor,
    slot: Tensor,
    step: int = 32,
    grid: tuple[int, int] | None = None,
    dropped: Tensor | None = None,
    outside: Outside | None = None,
) -> Image.Image:
    """A heat map of the patches, from the lowest to the highest value, with dark lines between tokens.

    Args:
        values: (N,) one per patch, in raster order.
        slot: (N,) the token of each patch.
        step: pixels per patch in the result.
        grid: rows and columns of patches; None: a square.
        dropped: (N,) True for dropped patches, which are grey.
        outside: cells that no token stands for, whose values are not read; None: there are none.

    Raises:
        ValueError: the grid does not have N patches.
    """
    rows, columns = grid_of(len(slot), grid)
    is_dropped = np.zeros(len(slot), bool) if dropped is None else dropped.cpu().numpy()
    low, high = value_range(values, dropped)
    numbers = np.nan_to_num(values.cpu().double().numpy())
    scaled = (numbers - low) / (high - low) if high > low else np.full(numbers.shape, 0.5)
    stops = np.linspace(0, 1, len(COLOURS))
    colours = np.stack([np.interp(scaled, stops, channel) for channel in np.array(COLOURS, float).T], -1)
    colours[is_dropped] = DROPPED
    painted = colours.reshape(rows, 1, columns, 1, 3).repeat(step, 1).repeat(step, 3)
    return with_lines(with_outside(painted, outside), numbered(slot, is_dropped, outside), EDGE)


def value_range(values: Tensor, dropped: Tensor | None = None) -> tuple[float, float]:
    """The lowest and the highest value (N,) of patches that are not dropped; NaN is no patch's."""
    used = values if dropped is None else values[~dropped]
    used = used[~used.isnan()]
    return float(used.min()), float(used.max())
