"""PiToMe: merge where tokens crowd, protect the lonely ones (Tran et al., NeurIPS 2024, arXiv:2405.16148)."""

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = {
    True: 2**18,
    False: 2**26,
}  # similarities in a block, on CPUs (1 MiB, half a core's L2) and elsewhere
SMALL = 2**16  # up to here, 256 KiB, one block serves
START = 0.9  # the margin at depth 0; it falls to 0 at the last layer (section 3.2)
SPLITS = ("energy", "raster")


def parents(
    metric: Tensor,
    remove: int,
    *,
    depth: float = 0.0,
    margin: float | None = None,
    start: float = START,
    end: float = 0.0,
    alpha: float = 1.0,
    energy: str = "eq4",
    candidates: float | None = 2.0,
    split: str = "energy",
) -> Tensor:
    """The token each token folds into: (B, N), itself for the N - remove that survive.

    In the paper the 2 `remove` tokens of highest energy alternate between A and B down the list; every a
    joins its most similar b. Where more tokens are candidates, those a join that are most similar to their b.
    Ties go to the lower index.

    Args:
        metric: (B, N, D) what similarity is measured on; the attention keys, in the paper.
        remove: tokens that go, at most N // 2.
        depth: l_i / l in [0, 1], how far up the encoder this is; sets the margin where none is given.
        margin: similarity from which two tokens count as one cluster, the same at every depth.
        start: the margin at depth 0.
        end: the margin at depth 1; in between it changes evenly.
        alpha: how strongly tokens below the margin lower the energy.
        energy: "eq4", the paper's, or "elu", what the authors' LLaVA branch computes.
        candidates: tokens that may merge, in multiples of `remove`, at least 2 (the paper); the others, of
            lowest energy, are protected. None protects nobody.
        split: "energy" alternates A and B down the list of energies (the paper), "raster" in raster order.

    Raises:
        ValueError: a number that is none, an unknown energy or split, candidates below 2.
    """
    how = {"depth": depth, "margin": margin, "start": start, "end": end, "alpha": alpha, "energy": energy}
    return ordered(metric, remove, candidates=candidates, split=split, **how)[0]


def ordered(
    metric: Tensor, remove: int, *, candidates: float | None = 2.0, split: str = "energy", **energy
) -> tuple[Tensor, Tensor]:
    """`parents`, and ranks (B, N) that lay survivors out as the authors do: by energy, merged ones last."""
    count = metric.shape[1]
    pool = _pool(count, remove, candidates)
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; allowed are {', '.join(SPLITS)}")
    unit = F.normalize(metric, dim=-1)
    down = mean_energy(unit, *resolved(**energy)).argsort(dim=1, descending=True, stable=True)
    chosen = down[:, :pool] if split == "energy" else down[:, :pool].sort(1).values
    a, b = chosen[:, ::2], chosen[:, 1::2].sort(1).values
    scores = _rows(unit, a) @ _rows(unit, b).transpose(1, 2)  # (B, |A|, |B|)
    best, at = scores.max(-1)  # the first of equals, the lowest index since b is sorted
    closest = b.gather(1, at)
    if pool > 2 * remove:
        goes = best.argsort(dim=1, descending=True, stable=True)[:, :remove]
        a, closest = a.gather(1, goes), closest.gather(1, goes)
    here = torch.arange(count, device=metric.device).expand_as(down)
    rank = torch.empty_like(down).scatter_(1, down, (here - pool) % count)
    return here.scatter(1, a, closest), rank


def score(metric: Tensor, *, candidates: float | None = 2.0, split: str = "energy", **energy) -> Tensor:
    """The energy (B, N) by which `parents` tells crowded tokens from lonely ones, to be looked at.

    Takes what `parents` takes; `candidates` and `split` are what is made of energies, and change none.
    """
    return mean_energy(F.normalize(metric, dim=-1), *resolved(**energy))


def _pool(count: int, remove: int, candidates: float | None) -> int:
    """How many tokens may merge."""
    if candidates is None:
        return count
    if isinstance(candidates, bool) or not isinstance(candidates, int | float) or not candidates >= 2:
        raise ValueError(
            f"candidates={candidates!r} is not allowed: it must be a number from 2, or None for all tokens"
        )
    return int(min(candidates * remove, count))


def mean_energy(unit: Tensor, margin: float, alpha: float = 1.0, energy: str = "eq4") -> Tensor:
    """Energy of every token (B, N): high inside a large cluster, low where a token stands alone (eq. 4).

    Similarities are worked through in blocks of rows, each of which stays in a CPU's cache.

    Args:
        unit: (B, N, D) tokens of length 1.
        margin: m.
        alpha: how strongly similarities below the margin count.
        energy: a name in ENERGIES.
    """
    other = unit.transpose(1, 2)
    step = _rows_at_a_time(unit)
    if step >= unit.shape[1]:
        return ENERGIES[energy](unit @ other, margin, alpha)
    return torch.cat([ENERGIES[energy](rows @ other, margin, alpha) for rows in unit.split(step, 1)], 1)


def _mean_below(x: Tensor, m: float, alpha: float) -> Tensor:
    """The mean of alpha (exp(x - m) - 1) where x < m, and of 0 elsewhere."""
    return alpha * (x.clamp(max=m).sub_(m).exp_().mean(-1) - 1)


ENERGIES = {  # similarities (B, K, N) to energies (B, K); sums taken apart, so that no mask is written
    "eq4": lambda x, m, alpha: F.threshold(x, _before(m, x.dtype), 0.0).mean(-1) + _mean_below(x, m, alpha),
    "elu": lambda x, m, alpha: x.clamp(min=m).mean(-1) - m + _mean_below(x, m, alpha),
}


_BEFORE: dict[tuple[float, torch.dtype], float] = {}  # one a layer; worked out once


@torch.compiler.assume_constant_result
def _before(m: float, dtype: torch.dtype) -> float:
    """The number in front of m: F.threshold passes what lies above its bound, eq. 4 what is at m too."""
    if (m, dtype) not in _BEFORE:
        at, end = (torch.tensor(x, dtype=dtype, device="cpu") for x in (m, -torch.inf))
        _BEFORE[m, dtype] = torch.nextafter(at, end).item()
    return _BEFORE[m, dtype]


def _rows(unit: Tensor, index: Tensor) -> Tensor:
    """The tokens at `index` (B, K): (B, K, D)."""
    return unit.gather(1, index.unsqueeze(-1).expand(-1, -1, unit.shape[2]))


def _rows_at_a_time(unit: Tensor) -> int:
    """Rows of the (B, N, N) similarities to look at together: a third, and no more than a block."""
    batch, count, _ = unit.shape
    if batch * count * count <= SMALL:
        return count
    return max(min(-(-count // 3), BLOCK[unit.device.type == "cpu"] // (batch * count)), 1)


def resolved(
    depth: float = 0.0,
    margin: float | None = None,
    start: float = START,
    end: float = 0.0,
    alpha: float = 1.0,
    energy: str = "eq4",
) -> tuple[float, float, str]:
    """The margin at this depth unless one is given, alpha and energy; checked, as `parents` says."""
    numbers = {"margin": START if margin is None else margin, "start": start, "end": end, "alpha": alpha}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
            raise ValueError(f"{name}={value!r} is not allowed: it must be a finite number")
    if energy not in ENERGIES:
        raise ValueError(f"energy={energy!r} is unknown; allowed are {', '.join(ENERGIES)}")
    return (start * (1 - depth) + end * depth if margin is None else margin), alpha, energy
