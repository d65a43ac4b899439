"""Helpers shared by methods: the highest scores, evenly spaced positions, the most similar kept token.

Shapes: B images, N tokens before, M tokens after, K some of them, D channels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from llava_pitome.merge.plan import gather_tokens
from llava_pitome.merge.reduce import MergeResult


def highest(score: Tensor, count: int) -> Tensor:
    """Returns the positions (B, count) of the highest scores (B, N), ascending; ties go to the lower."""
    return score.argsort(dim=1, descending=True, stable=True)[:, :count].sort(1).values


def complement(index: Tensor, count: int) -> Tensor:
    """Returns the positions (B, count - K) of `count` that are not in `index` (B, K), ascending."""
    is_in = torch.zeros(len(index), count, dtype=torch.uint8, device=index.device).scatter(1, index, 1)
    return is_in.argsort(dim=1, stable=True)[:, : count - index.shape[1]]


def segment_of(position: Tensor, length: int, segments: int | Tensor) -> Tensor:
    """Returns the segment of each position when `length` positions are cut as evenly as possible."""
    return ((position + 1) * segments - 1) // length


def segment_middle(segment: Tensor, length: int, segments: int | Tensor) -> Tensor:
    """Returns the middle position of each segment, the lower of two."""
    return (segment * length // segments + (segment + 1) * length // segments - 1) // 2


def evenly_spaced(length: int, count: int, device: torch.device) -> Tensor:
    """Returns `count` of `length` positions (count,), ascending: the middles of as many even segments."""
    return segment_middle(torch.arange(count, device=device), length, count)


def most_similar(metric: Tensor, kept: Tensor) -> Tensor:
    """Returns the parents (B, N) of tokens (B, N, D) that merge into the most similar of `kept` (B, M).

    `kept` is ascending, so that ties go to the lower index; a kept token is its own parent.
    """
    unit = F.normalize(metric, dim=-1)
    scores = unit @ gather_tokens(unit, kept).transpose(1, 2)  # (B, N, M)
    return kept.gather(1, scores.argmax(-1)).scatter(1, kept, kept)


def prune(kept: Tensor, count: int) -> MergeResult:
    """Returns the decision that keeps the tokens `kept` (B, M), ascending, of `count` and drops the others.

    For provenance, the parent of a dropped token is the kept token before it, or the first.
    """
    positions = torch.arange(count, device=kept.device).repeat(len(kept), 1)
    is_kept = torch.zeros_like(positions).scatter_(1, kept, kept)
    return MergeResult(torch.maximum(is_kept.cummax(1).values, kept[:, :1]), prunes=True)
