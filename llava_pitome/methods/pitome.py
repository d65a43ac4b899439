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
    return ordered(metric, remove, depth=depth, margin=margin, alpha=alpha, energy=energy)[0]


def ordered(metric: Tensor, remove: int, **parameters) -> tuple[Tensor, Tensor]:
    """`parents`, and ranks (B, N) that lay survivors out as the authors do: by energy, merged ones last."""
    margin, alpha, energy = resolved(**parameters)
    unit = F.normalize(metric, dim=-1)
    down = mean_energy(unit, margin, alpha, energy).argsort(dim=1, descending=True, stable=True)
    a, b = down[:, : 2 * remove : 2], down[:, 1 : 2 * remove : 2].sort(1).values  # (B, remove) each
    scores = _rows(unit, a) @ _rows(unit, b).transpose(1, 2)  # (B, remove, remove)
    closest = b.gather(1, scores.argmax(-1))  # the first of equals, the lowest index since b is sorted
    here = torch.arange(metric.shape[1], device=metric.device).expand_as(down)
    rank = torch.empty_like(down).scatter_(1, down, (here - 2 * remove) % metric.shape[1])
    return here.scatter(1, a, closest), rank


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
    depth: float = 0.0, margin: float | None = None, alpha: float = 1.0, energy: str = "eq4"
) -> tuple[float, float, str]:
    """The margin at this depth unless one is given, alpha and energy; checked, as `parents` says."""
    for name, value in (("margin", START if margin is None else margin), ("alpha", alpha)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
            raise ValueError(f"{name}={value!r} is not allowed: it must be a finite number")
    if energy not in ENERGIES:
        raise ValueError(f"energy={energy!r} is unknown; allowed are {', '.join(ENERGIES)}")
    return (START * (1 - depth) if margin is None else margin), alpha, energy
