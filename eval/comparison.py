"""Answers to the same questions compared: intervals by drawing pictures again, p values by flipping signs.

Questions about one picture are not independent, so what is drawn and flipped are pictures.
Shapes: Q questions, P pictures, C columns (whatever is averaged or compared).
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np

DRAWS = 10_000
LEVEL = 0.95
EXACT = 16  # pictures up to which every choice of signs is tried
AT_ONCE = 2**22  # numbers drawn at a time
TOLERANCE = 1e-9  # by which sums may differ from rounding alone


def by_picture(scores: np.ndarray, pictures: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """The sum (P, C) of the scores (Q, C) of each picture's questions, and how many (P,) there are."""
    numbers = {picture: i for i, picture in enumerate(dict.fromkeys(pictures))}
    index = np.array([numbers[picture] for picture in pictures])
    sums = np.zeros((len(numbers), scores.shape[1]))
    np.add.at(sums, index, scores)
    return sums, np.bincount(index).astype(float)


def intervals(sums: np.ndarray, counts: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """The 95 % intervals (2, C) of the means over questions: percentiles over drawn sets of pictures.

    Args:
        sums: (P, C) of each picture.
        counts: (P,) questions about each picture.
        draws: how often as many pictures are drawn as there are, with replacement.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    pictures = len(counts)
    means = []
    for count in _parts(draws, pictures):
        drawn = rng.integers(0, pictures, (count, pictures)) + pictures * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * pictures).reshape(count, pictures).astype(float)
        means.append((times @ sums) / (times @ counts)[:, None])
    tail = 100 * (1 - LEVEL) / 2
    return np.percentile(np.concatenate(means), [tail, 100 - tail], axis=0)


def p_values(differences: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Two-sided p values (C,) for no difference: how often random signs make a sum as far from 0.

    Pictures (P, C) without a difference say nothing. With up to EXACT others every choice of signs is tried;
    with more, `draws` random ones and the one that was observed.
    """
    found = np.ones(differences.shape[1])
    few = (differences != 0).sum(0) <= EXACT
    for column in np.flatnonzero(few):
        found[column] = _exact(differences[:, column])
    many = differences[:, ~few]
    if many.shape[1]:
        rng = np.random.default_rng(seed)
        least = np.abs(many.sum(0)) - TOLERANCE
        beyond = np.zeros(many.shape[1])
        for count in _parts(draws, len(many)):
            signs = rng.integers(0, 2, (count, len(many))) * 2.0 - 1
            beyond += (np.abs(signs @ many) >= least).sum(0)
        found[~few] = (1 + beyond) / (1 + draws)
    return found


def _exact(differences: np.ndarray) -> float:
    """The p value over every choice of signs."""
    told = differences[differences != 0]
    choices = np.arange(2 ** len(told))[:, None]
    signs = (choices >> np.arange(len(told)) & 1) * 2.0 - 1  # (choices, pictures)
    return float((np.abs(signs @ told) >= abs(told.sum()) - TOLERANCE).mean())


def holm(p: Sequence[float]) -> list[float]:
    """P values for several comparisons at once, by Holm's method: each in [p, 1]."""
    adjusted, largest = [1.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min((len(p) - rank) * p[i], 1.0))
        adjusted[i] = largest
    return adjusted


def _parts(draws: int, pictures: int) -> list[int]:
    """`draws` in parts that fit into memory."""
    most = max(AT_ONCE // max(pictures, 1), 1)
    return [min(most, draws - i * most) for i in range(math.ceil(draws / most))]
