"""Who attends to whom, for methods that ask: the rows they need, from queries and keys, whatever kernel runs.

Shapes: B sequences, Q queries, T keys, H heads, C channels a head.
"""

import torch
from torch import Tensor

BLOCK = 2**24  # attention weights that are held at a time


def attention(
    queries: Tensor, keys: Tensor, heads: int, key_heads: int, mask: Tensor | None = None
) -> Tensor:
    """Attention of each query to each key, the mean over the heads: (B, Q, T) float32.

    Args:
        queries: (B, Q, H * C), as the projection makes them, or turned by their positions.
        keys: (B, T, H' * C), the same.
        heads: H.
        key_heads: H', of which H is a multiple.
        mask: additive, or False where a query must not look: (B or 1, 1, Q or 1, T).
    """
    return _attention(queries, _prepared(keys, heads, key_heads), heads, mask)


def _prepared(keys: Tensor, heads: int, key_heads: int) -> Tensor:
    """Keys (B, T, H' * C) for every head of the queries: (B, H, T, C) float32."""
    k = keys.detach().unflatten(-1, (key_heads, -1)).transpose(1, 2).float()
    return k.repeat_interleave(heads // key_heads, 1)


def _attention(queries: Tensor, k: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    q = queries.detach().unflatten(-1, (heads, -1)).transpose(1, 2).float()  # (B, H, Q, C)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        lowest = torch.finfo(scores.dtype).min  # a row of -inf has no softmax
        scores = scores + mask.float().clamp(min=lowest)
    return scores.softmax(-1).mean(1)


def received(
    queries: Tensor, keys: Tensor, heads: int, key_heads: int, mask: Tensor | None, asks: Tensor | None
) -> Tensor:
    """Attention that each key gets, the mean over the queries: (B, T) float32, worked out in blocks.

    Args:
        queries: as for `attention`.
        keys: as for `attention`.
        heads: H.
        key_heads: H'.
        mask: as for `attention`.
        asks: (B, Q) False for queries that do not count; None: all do.
    """
    batch, count, _ = queries.shape
    step = max(BLOCK // max(batch * heads * keys.shape[1], 1), 1)
    total = torch.zeros(batch, keys.shape[1], device=keys.device)
    prepared = _prepared(keys, heads, key_heads)
    for first in range(0, count, step):
        part = slice(first, first + step)
        rows = mask if mask is None or mask.shape[2] == 1 else mask[:, :, part]
        found = _attention(queries[:, part], prepared, heads, rows)
        total += (found if asks is None else found.masked_fill(~asks[:, part, None], 0)).sum(1)
    return total / (count if asks is None else asks.sum(1, keepdim=True).clamp(min=1))


def apply_rope(x: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys (B, T, H * C) turned by their positions (RoPE), as Llama and its kin do.

    Args:
        x: as the projection makes them.
        heads: H.
        cos: (B or 1, T, C) of each channel's angle.
        sin: the same.
    """
    x = x.detach().unflatten(-1, (heads, -1))
    first, second = x.chunk(2, -1)
    back = torch.cat([-second, first], -1)
    return (x * cos.unsqueeze(2) + back * sin.unsqueeze(2)).flatten(-2)
