"""DCT: cut off the sequence's high frequencies (He et al., Findings of ACL 2023, arXiv:2305.15099).

The Fourier Transformer takes a layer's tokens through a discrete cosine transform along the sequence, keeps
the lowest M frequencies, and makes a sequence of M tokens of them by the inverse transform of that length.
Here the result is scaled so that a sequence of equal tokens stays what it is. No token survives as itself:
parents only say which stretch of the raster a new token stands in for.
"""

import math

import torch
from torch import Tensor

from llava_pitome.methods._common import middle, part_of


def mixed(metric: Tensor, remove: int, *, depth: float = 0.0) -> tuple[Tensor, Tensor]:
    """The middle of each token's stretch (B, N), and what survivors are made of (1, M, N).

    Args:
        metric: (B, N, D); only its shape counts.
        remove: tokens that go, at most N - 1.
        depth: not used by this method.
    """
    count = metric.shape[1]
    length = count - remove
    dtype = torch.promote_types(metric.dtype, torch.float32)
    forth = cosines(length, count, metric.device, dtype)  # (M, N)
    back = cosines(length, length, metric.device, dtype).T  # (M, M)
    mixing = math.sqrt(length / count) * back @ forth  # rows add up to 1
    place = torch.arange(count, device=metric.device)
    parent = middle(part_of(place, count, length), count, length)
    return parent.repeat(len(metric), 1), mixing.unsqueeze(0)


def cosines(rows: int, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The first rows (rows, length) of the orthonormal DCT-II."""
    frequency = torch.arange(rows, device=device).unsqueeze(1)
    place = torch.arange(length, device=device)
    turn = (2 * place + 1) * frequency % (4 * length)  # whole numbers, so that large angles lose no digit
    wave = (turn.to(dtype) * (math.pi / (2 * length))).cos() * math.sqrt(2 / length)
    return wave.masked_fill(frequency == 0, math.sqrt(1 / length))
