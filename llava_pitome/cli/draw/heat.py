"""A number of each patch as a colour: the energy map."""

import numpy as np
from PIL import Image
from torch import Tensor

from llava_pitome.cli.draw.overlay import framed, shape

COLD_TO_HOT = ((46, 30, 94), (49, 92, 148), (39, 148, 140), (127, 200, 92), (250, 232, 92))  # low to high
EDGE = (24, 24, 32)
DROPPED = (128, 128, 128)


def heat(
    values: Tensor,
    slot: Tensor,
    step: int = 32,
    grid: tuple[int, int] | None = None,
    dropped: Tensor | None = None,
) -> Image.Image:
    """A heat map of the patches, from the lowest value to the highest, and a line between tokens.

    Args:
        values: (N,) one a patch, in raster order.
        slot: (N,) the token that each patch is in.
        step: screen pixels across a patch.
        grid: rows and columns of patches; None: a square.
        dropped: (N,) True for patches that have no value any more; they are grey.

    Raises:
        ValueError: N patches are no such grid.
    """
    rows, columns = shape(len(slot), grid)
    gone = np.zeros(len(slot), bool) if dropped is None else dropped.cpu().numpy()
    found = colours(relative(values.cpu().double().numpy(), spread(values, dropped)))
    found[gone] = DROPPED
    token = np.where(gone, -1, slot.cpu().numpy())
    painted = found.reshape(rows, 1, columns, 1, 3).repeat(step, 1).repeat(step, 3)
    return framed(painted, token, EDGE)


def spread(values: Tensor, dropped: Tensor | None = None) -> tuple[float, float]:
    """The lowest and the highest of the values (N,) of patches that are not dropped."""
    there = values if dropped is None else values[~dropped]
    return float(there.min()), float(there.max())


def relative(values: np.ndarray, ends: tuple[float, float]) -> np.ndarray:
    """Values on a scale from 0 to 1 between its ends; the middle where the ends are one."""
    low, high = ends
    return (values - low) / (high - low) if high > low else np.full(values.shape, 0.5)


def colours(share: np.ndarray) -> np.ndarray:
    """The colours (..., 3) of values on a scale from 0 to 1."""
    at = np.linspace(0, 1, len(COLD_TO_HOT))
    return np.stack([np.interp(share, at, c) for c in np.array(COLD_TO_HOT, float).T], -1)


def bar(width: int, height: int) -> Image.Image:
    """The colours from low to high, left to right."""
    line = colours(np.linspace(0, 1, width)).round().astype(np.uint8)
    return Image.fromarray(line[None].repeat(height, 0))
