"""Confidence intervals and p values for answers to the same questions, by resampling images.

Questions about one image are not independent, so images are what is resampled.
Shapes: Q questions, P images, C columns (whatever is averaged or compared).
"""

from collections.abc import Hashable, Sequence

import numpy as np
import pandas
from scipy import stats

RESAMPLES = 10_000
LEVEL = 0.95
EXACT = 16  # images up to which every choice of signs is enumerated
BATCH_SIZE = 2**22  # random numbers at a time
DECIMALS = 9  # of sums that are compared: equal ones may differ by rounding errors


def sum_by_image(scores: np.ndarray, images: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """The sum (P, C) of the scores (Q, C) over each image's questions, and their numbers (P,)."""
    groups = pandas.DataFrame(scores).groupby(pandas.factorize(np.asarray(images))[0])
    return groups.sum().to_numpy(), groups.size().to_numpy().astype(float)


def intervals(sums: np.ndarray, counts: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """The 95 % bootstrap percentile intervals (2, C) of the means over questions.

    Args:
        sums: (P, C) of each image.
        counts: (P,) questions about each image.
        resamples: how often P images are drawn with replacement.
        seed: of the draws.
    """
    images = len(counts)

    def means(drawn: np.ndarray, axis: int) -> np.ndarray:
        """The means (C, R) of R samples (R, P) of images; weights instead of copies of `sums`."""
        drawn = np.atleast_2d(drawn)
        offsets = images * np.arange(len(drawn))[:, None]
        weights = np.bincount((drawn + offsets).ravel(), minlength=drawn.size).reshape(drawn.shape)
        return ((weights @ sums) / (weights @ counts)[:, None]).T

    if images == 1:
        return np.stack([sums[0] / counts[0]] * 2)  # scipy refuses samples of one
    interval = stats.bootstrap(
        (np.arange(images),), means, n_resamples=resamples, confidence_level=LEVEL, method="percentile",
        batch=max(BATCH_SIZE // images, 1), vectorized=True, rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return np.stack(interval)


def p_values(differences: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Two-sided p values (C,) of a sign-flip permutation test against no difference.

    Images (P, C) without a difference do not count. With up to EXACT others every choice of signs is
    enumerated; with more, `resamples` random choices are drawn, and the observed one counts as well.
    """
    found = np.ones(differences.shape[1])
    few = (differences != 0).sum(0) <= EXACT
    for column in np.flatnonzero(few):
        nonzero = differences[differences[:, column] != 0, column]
        if len(nonzero):
            found[column] = _sign_flips(nonzero[:, None], 2**EXACT, None)[0]
    if not few.all():
        found[~few] = _sign_flips(differences[:, ~few], resamples, np.random.default_rng(seed))
    return found


def _sign_flips(differences: np.ndarray, resamples: int, rng: np.random.Generator | None) -> np.ndarray:
    """The p values (C,) of `differences` (P, C); scipy flips the signs of P ones."""
    if len(differences) == 1:
        return np.ones(1)  # scipy refuses samples of one
    return stats.permutation_test(
        (np.ones(len(differences)),),
        lambda signs, axis: np.abs(signs @ differences).round(DECIMALS),
        permutation_type="samples", alternative="greater", n_resamples=resamples,
        batch=max(BATCH_SIZE // len(differences), 1), vectorized=True, rng=rng,
    ).pvalue  # fmt: skip


def holm(p: Sequence[float]) -> list[float]:
    """P values adjusted for several comparisons by Holm's method, which scipy.stats lacks: each in [p, 1]."""
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    factors = len(p) - np.arange(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * np.asarray(p)[order]), 1.0) if len(p) else []
    return adjusted.tolist()
