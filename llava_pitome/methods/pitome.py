"""PiToMe: merge large clusters, protect isolated tokens (Tran et al., NeurIPS 2024, arXiv:2405.16148).

Shapes: B images, N tokens, D channels.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from llava_pitome.merge.plan import gather_tokens
from llava_pitome.merge.reduce import MergeResult
from llava_pitome.methods.registry import Method, parameter, register_method

CPU_BLOCK, BLOCK = 2**18, 2**26  # similarities in a block: 1 MiB, half of a core's L2, on CPUs
SMALL = 2**16  # similarities, 256 KiB, that are not divided into blocks


@register_method("pitome")
@dataclass(frozen=True)
class PiToMe(Method):
    """The 2 `remove` tokens of highest energy alternate between A and B down the ranking; A merges into B.

    Every token of A merges into its most similar token of B. Where more tokens are candidates, the `remove`
    most similar pairs merge. Ties go to the lower index. The paper measures similarity on the attention keys.
    Its order of kept tokens is the authors': protected tokens, then merged ones, by energy.
    """

    pairs_tokens = True
    has_order = True

    margin: float | None = parameter(
        None, "similarity from which two tokens count as one cluster, the same at every depth"
    )
    start: float = parameter(0.9, "the margin at depth 0, where no margin is set (section 3.2)")
    end: float = parameter(0.0, "the margin at depth 1; it changes linearly between them")
    alpha: float = parameter(1.0, "how strongly similarities below the margin lower the energy")
    energy: Literal["eq4", "elu"] = parameter(
        "eq4", "eq4 is the paper's energy, elu the one in the authors' LLaVA branch"
    )
    candidates: float | None = parameter(
        2.0,
        "tokens that may merge, as a multiple of those removed (2 in the paper); the others, of lowest "
        "energy, are protected; None protects none",
        least=2,
    )
    split: Literal["energy", "raster"] = parameter(
        "energy", "alternate A and B down the ranking by energy, as in the paper, or in raster order"
    )

    def merge(self, metric: Tensor, remove: int, depth: float = 0.0) -> MergeResult:
        """Returns the pairs and the authors' order (B, N)."""
        count = metric.shape[1]
        pool = count if self.candidates is None else int(min(self.candidates * remove, count))
        unit = F.normalize(metric, dim=-1)
        ranking = self._energies(unit, depth).argsort(dim=1, descending=True, stable=True)
        chosen = ranking[:, :pool] if self.split == "energy" else ranking[:, :pool].sort(1).values
        a, b = chosen[:, ::2], chosen[:, 1::2].sort(1).values
        scores = gather_tokens(unit, a) @ gather_tokens(unit, b).transpose(1, 2)  # (B, |A|, |B|)
        best, index = scores.max(-1)  # the first of equals, the lowest position since b is sorted
        closest = b.gather(1, index)
        if pool > 2 * remove:
            pairs = best.argsort(dim=1, descending=True, stable=True)[:, :remove]
            a, closest = a.gather(1, pairs), closest.gather(1, pairs)
        positions = torch.arange(count, device=metric.device).expand_as(ranking)
        order = torch.empty_like(ranking).scatter_(1, ranking, (positions - pool) % count)
        return MergeResult(positions.scatter(1, a, closest), order=order)

    def merge_triton(self, metric: Tensor, remove: int, depth: float = 0.0) -> MergeResult:
        """`merge` in Triton, without an order; settings that are not the paper's run in PyTorch."""
        from llava_pitome.kernels import matching_triton

        if (self.candidates, self.split) != (2.0, "energy"):
            return self.merge(metric, remove, depth)
        margin = self.margin_at(depth)
        return MergeResult(matching_triton.parents(metric, remove, margin, self.alpha, self.energy))

    def margin_at(self, depth: float) -> float:
        """Returns the margin at a depth: `margin`, or linear from `start` to `end`."""
        if self.margin is not None:
            return self.margin
        depth = math.fabs(depth)  # torch.compile makes a symbolic depth a constant here, as next_below needs
        return self.start * (1 - depth) + self.end * depth

    def energies(self, metric: Tensor, depth: float = 0.0) -> Tensor:
        """Returns the energies (B, N): high inside a large cluster, low for isolated tokens."""
        return self._energies(F.normalize(metric, dim=-1), depth)

    def _energies(self, unit: Tensor, depth: float) -> Tensor:
        return mean_energy(unit, self.margin_at(depth), self.alpha, self.energy)


def mean_energy(unit: Tensor, margin: float, alpha: float = 1.0, energy: str = "eq4") -> Tensor:
    """Returns the energy of every token (B, N), the mean of f over its similarities x to all tokens (eq. 4).

    f(x) = x from the margin m on ("eq4") or x - m ("elu"), and alpha (exp(x - m) - 1) below it. Similarities
    are computed in blocks of rows, each of which stays in a CPU's cache.

    Args:
        unit: (B, N, D) tokens of length 1.
        margin: m.
        alpha: weight of similarities below the margin.
        energy: a name in ENERGIES.
    """
    columns = unit.transpose(1, 2)
    step = _rows_per_block(unit)
    if step >= unit.shape[1]:
        return ENERGIES[energy](unit @ columns, margin, alpha)
    return torch.cat([ENERGIES[energy](rows @ columns, margin, alpha) for rows in unit.split(step, 1)], 1)


def _mean_below(x: Tensor, m: float, alpha: float) -> Tensor:
    """Returns the mean of alpha (exp(x - m) - 1) where x < m, and of 0 elsewhere."""
    return alpha * (x.clamp(max=m).sub_(m).exp_().mean(-1) - 1)


ENERGIES = {  # similarities (B, K, N) to energies (B, K); the two parts are summed separately, without a mask
    "eq4": lambda x, m, alpha: F.threshold(x, next_below(m, x.dtype), 0).mean(-1) + _mean_below(x, m, alpha),
    "elu": lambda x, m, alpha: x.clamp(min=m).mean(-1) - m + _mean_below(x, m, alpha),
}


def next_below(m: float, dtype: torch.dtype) -> float:
    """Returns the largest number of a dtype below m, itself rounded to the dtype.

    F.threshold passes values above its bound, eq. 4 those at the margin too. Computed in Python floats, which
    torch.compile folds into a constant. Similarities lie in [-1, 1], so m is cut to [-2, 2].
    """
    info, m = torch.finfo(dtype), min(max(m, -2.0), 2.0)
    m = round(m / _spacing(m, info)) * _spacing(m, info)
    below = math.nextafter(m, -math.inf)
    return math.floor(below / _spacing(below, info)) * _spacing(below, info)


def _spacing(x: float, info: torch.finfo) -> float:
    """Returns the distance between numbers of a dtype around x."""
    return max(math.ldexp(info.eps, math.frexp(x)[1] - 1), info.smallest_normal * info.eps)


def _rows_per_block(unit: Tensor) -> int:
    """Returns the number of rows of (B, N, N) similarities in a block: a third, or what a cache holds."""
    batch, count, _ = unit.shape
    if batch * count * count <= SMALL:
        return count
    block = CPU_BLOCK if unit.device.type == "cpu" else BLOCK
    return max(min(-(-count // 3), block // (batch * count)), 1)
