"""Attention maps for methods that need them, computed for the rows they need, whatever kernel the model runs.

Shapes: B sequences, Q queries, T keys, H heads, H' heads of the keys, C channels a head.
"""

import torch
from torch import Tensor

BLOCK = 2**24  # attention weights that are computed at a time


def attention(queries: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of each query to each key, the mean over the heads: (B, Q, T) float32.

    Args:
        queries: (B, H, Q, C), with their positions where the model rotates them.
        keys: (B, H', T, C), the same; H is a multiple of H'.
        mask: additive, or False where a key is hidden: (B or 1, 1, Q or 1, T).
    """
    return _attention(queries, _for_every_head(keys, queries.shape[1]), mask)


def _for_every_head(keys: Tensor, heads: int) -> Tensor:
    """Keys (B, H', T, C) for every head of the queries: (B, H, T, C) float32."""
    return keys.detach().float().repeat_interleave(heads // keys.shape[1], 1)


def _attention(queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    queries = queries.detach().float()
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(2, 3)
    lowest = torch.finfo(scores.dtype).min  # a row of -inf has no softmax
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, lowest)
    elif mask is not None:
        scores = scores + mask.float().clamp(min=lowest)
    return scores.softmax(-1).mean(1)


def received(queries: Tensor, keys: Tensor, mask: Tensor | None, counts: Tensor | None) -> Tensor:
    """Attention that each key receives, the mean over the queries: (B, T) float32, computed in blocks.

    Args:
        queries: as for `attention`.
        keys: as for `attention`.
        mask: as for `attention`.
        counts: (B, Q) False for queries that do not count, such as padding; None: all do.
    """
    batch, heads, count, _ = queries.shape
    step = max(BLOCK // max(batch * heads * keys.shape[2], 1), 1)
    total = torch.zeros(batch, keys.shape[2], device=keys.device)
    keys = _for_every_head(keys, heads)
    for first in range(0, count, step):
        part = slice(first, first + step)
        rows = mask if mask is None or mask.shape[2] == 1 else mask[:, :, part]
        found = _attention(queries[:, :, part], keys, rows)
        total += (found if counts is None else found.masked_fill(~counts[:, part, None], 0)).sum(1)
    return total / (count if counts is None else counts.sum(1, keepdim=True).clamp(min=1))


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys (B, H, T, C) rotated by their positions, as Llama does.

    Args:
        x: without positions.
        cos: (B or 1, T, C) of each channel's angle.
        sin: the same.
    """
    first, second = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat([-second, first], -1) * sin.unsqueeze(1)
