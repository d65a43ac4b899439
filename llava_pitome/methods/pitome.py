"""PiToMe: merge where tokens crowd, protect the lonely ones (Tran et al., NeurIPS 2024, arXiv:2405.16148)."""

import torch
from torch import Tensor
from torch.nn import functional as F

START = 0.9  # the margin at depth 0; it falls to 0 at the last layer (section 3.2)


def parents(
    metric: Tensor,
    remove: int,
    *,
    depth: float = 0.0,
    margin: float | None = None,
    alpha: float = 1.0,
    energy: str = "eq4",
) -> Tensor:
    """The token each token folds into: (B, N), itself for the N - remove that survive.

    The 2 `remove` tokens of highest energy alternate between A and B down the list; every a joins its most
    similar b. Ties go to the lower index.

    Args:
        metric: (B, N, D) what similarity is measured on; the attention keys, in the paper.
        remove: tokens that go, at most N // 2.
        depth: l_i / l in [0, 1), how far up the encoder this is; sets the margin where none is given.
        margin: similarity from which two tokens count as one cluster.
        alpha: how strongly tokens below the margin lower the energy.
        energy: "eq4", the paper's, or "elu", what the authors' LLaVA branch computes.

    Raises:
        ValueError: a margin or alpha that is no number, an unknown energy.
    """
    _check(margin, alpha, energy)
    similarity = cosine(metric)
    order = _crowded_first(similarity, depth, margin, alpha, energy)
    a, b = order[:, : 2 * remove : 2], order[:, 1 : 2 * remove : 2]  # (B, remove) each
    rows = similarity.gather(1, a.unsqueeze(-1).expand(-1, -1, similarity.shape[2]))
    closest = _first_max(rows.gather(2, b.unsqueeze(1).expand(-1, remove, -1)), b)
    parent = torch.arange(metric.shape[1], device=metric.device).repeat(metric.shape[0], 1)
    return parent.scatter(1, a, closest)


def order(metric: Tensor, remove: int, **parameters) -> Tensor:
    """Ranks (B, N) that lay survivors out as the authors do: protected by energy, then merged.

    Takes what `parents` takes.
    """
    down = _crowded_first(cosine(metric), **parameters)
    return (down.argsort(dim=1) - 2 * remove) % metric.shape[1]


def cosine(metric: Tensor) -> Tensor:
    """Cosine similarity of every pair of tokens: (B, N, D) to (B, N, N)."""
    unit = F.normalize(metric, dim=-1)
    return unit @ unit.transpose(1, 2)


def mean_energy(similarity: Tensor, margin: float, alpha: float = 1.0, energy: str = "eq4") -> Tensor:
    """Energy of every token (B, N): high inside a large cluster, low where a token stands alone (eq. 4)."""
    return ENERGIES[energy](similarity, margin, alpha).mean(-1)


ENERGIES = {
    "eq4": lambda x, m, alpha: torch.where(x >= m, x, alpha * torch.expm1(x - m)),
    "elu": lambda x, m, alpha: F.elu(x - m, alpha),
}


def _check(margin: float | None, alpha: float, energy: str) -> None:
    for name, value in (("margin", START if margin is None else margin), ("alpha", alpha)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
            raise ValueError(f"{name}={value!r} is not allowed: it must be a finite number")
    if energy not in ENERGIES:
        raise ValueError(f"energy={energy!r} is unknown; allowed are {', '.join(ENERGIES)}")


def _crowded_first(
    similarity: Tensor,
    depth: float = 0.0,
    margin: float | None = None,
    alpha: float = 1.0,
    energy: str = "eq4",
) -> Tensor:
    """Token indices (B, N) by falling energy."""
    m = START * (1 - depth) if margin is None else margin
    return mean_energy(similarity, m, alpha, energy).argsort(dim=1, descending=True, stable=True)


def _first_max(scores: Tensor, index: Tensor) -> Tensor:
    """Per row of `scores` (B, A, M), the entry of `index` (B, M) that scores highest: (B, A).

    The lowest entry of equals, which argmax does not promise once the columns are sorted by energy.
    """
    best = scores.amax(-1, keepdim=True)
    candidates = index.unsqueeze(1).masked_fill(scores < best, torch.iinfo(index.dtype).max)
    return candidates.amin(-1)
