"""PiToMe's matching on CUDA: two Triton kernels that never write the (B, N, N) similarities.

Equal to `methods.pitome.PiToMe.merge` up to the order of float32 sums: tokens whose energies or similarities
differ by less than about 1e-6 may be ranked differently. The first call compiles. No call waits for the
GPU, so that CUDA graphs can capture it.
Shapes: B images, N tokens, R = `remove`, D channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# few rows, so that an image of 576 tokens makes 36 programs; tl.dot needs at least 16 channels
TILE = {"ROWS": 16, "COLUMNS": 64, "CHANNELS": 32}


def parents(metric: Tensor, remove: int, margin: float, alpha: float, energy: str) -> Tensor:
    """Returns the token each token merges into: (B, N) int64, itself for the N - R that are kept.

    Args:
        metric: (B, N, D) what similarity is measured on; half precision is matched in float32.
        remove: R, at most N // 2.
        margin: as for `methods.pitome.mean_energy`, which checks nothing either.
        alpha: as `margin`.
        energy: as `margin`.

    Raises:
        ValueError: a metric of another dtype, or `remove` out of range.
    """
    if metric.dtype not in DTYPES:
        raise ValueError(f"metric has dtype {metric.dtype}; allowed are {', '.join(map(str, DTYPES))}")
    batch, count, channels = metric.shape
    if not 0 <= remove <= count // 2:  # the kernels would read after the last token
        raise ValueError(f"remove={remove} does not fit {count} tokens; allowed is 0 to {count // 2}")
    unit = F.normalize(metric.float(), dim=-1).contiguous()
    ranking = mean_energy(unit, margin, alpha, energy).argsort(dim=1, descending=True, stable=True)
    b = (
        ranking[:, 1 : 2 * remove : 2].sort(1).values
    )  # (B, R), so that the first of equals has the lowest index
    parent = torch.arange(count, device=metric.device).repeat(batch, 1)
    with torch.cuda.device_of(unit):
        grid = (triton.cdiv(remove, TILE["ROWS"]), batch)
        _closest[grid](unit, ranking, b, parent, count, remove, channels, **TILE)
    return parent


def mean_energy(unit: Tensor, margin: float, alpha: float = 1.0, energy: str = "eq4") -> Tensor:
    """Returns `pitome.mean_energy` (B, N) of `unit` (B, N, D), float32 and contiguous."""
    batch, count, channels = unit.shape
    out = unit.new_empty(batch, count)
    with torch.cuda.device_of(unit):
        grid = (triton.cdiv(count, TILE["ROWS"]), batch)
        elu = energy == "elu"
        _energies[grid](unit, out, count, channels, float(margin), float(alpha), ELU=elu, **TILE)
    return out


@triton.jit(do_not_specialize=["count"])  # it differs between layers; one compilation serves all
def _energies(
    unit,
    out,
    count,
    channels,
    margin,
    alpha,
    ELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Writes the energies of ROWS tokens of one image; grid (blocks of tokens, B)."""
    image = tl.program_id(1).to(tl.int64)
    unit += image * count * channels
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, count, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = _similarities(unit, row, row < count, column, column < count, channels, CHANNELS)
        below = alpha * (tl.exp(x - margin) - 1)
        f = tl.where(x >= margin, x - margin if ELU else x, below)
        total += tl.sum(tl.where((column < count)[None, :], f, 0.0), 1)
    tl.store(out + image * count + row, total / count, mask=row < count)


@triton.jit(do_not_specialize=["count", "remove"])
def _closest(
    unit,
    ranking,
    b,
    parent,
    count,
    remove,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Writes the most similar b as the parent of ROWS a's of one image; grid (blocks of a's, B).

    `ranking` (B, N) lists tokens by descending energy, every other one of the first 2 R an a; `b` (B, R).
    """
    image = tl.program_id(1).to(tl.int64)
    unit += image * count * channels
    b += image * remove
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    a = tl.load(ranking + image * count + 2 * row, mask=row < remove, other=0)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    index = tl.zeros((ROWS,), tl.int32)
    for start in range(0, remove, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        other = tl.load(b + column, mask=column < remove, other=0)
        x = _similarities(unit, a, row < remove, other, column < remove, channels, CHANNELS)
        x = tl.where((column < remove)[None, :], x, float("-inf"))
        top, at = tl.max(x, 1, return_indices=True)  # the leftmost of equals
        better = top > best  # not where it is equal: an earlier block holds the lower index
        index = tl.where(better, start + at, index)
        best = tl.where(better, top, best)
    closest = tl.load(b + index, mask=row < remove, other=0)
    tl.store(parent + image * count + a, closest, mask=row < remove)


@triton.jit
def _similarities(unit, left, left_mask, right, right_mask, channels, CHANNELS: tl.constexpr):
    """Returns dot products (K, L) of tokens `left` (K) and `right` (L), 0 where a mask is false.

    In full float32: TF32 keeps 10 bits and would rank tokens that differ by less differently.
    """
    x = tl.zeros((left.shape[0], right.shape[0]), tl.float32)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        is_channel = channel < channels
        rows = tl.load(
            unit + left[:, None] * channels + channel[None, :],
            mask=left_mask[:, None] & is_channel[None, :],
            other=0.0,
        )
        columns = tl.load(
            unit + right[None, :] * channels + channel[:, None],
            mask=right_mask[None, :] & is_channel[:, None],
            other=0.0,
        )
        x = tl.dot(rows, columns, x, input_precision="ieee")
    return x
