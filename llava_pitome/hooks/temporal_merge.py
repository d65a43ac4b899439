"""Merging tokens at the same place in neighbouring frames of a video.

Shapes: V videos, F frames, K tokens of a frame, A = F * K tokens of a video, M after the merge, D channels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from llava_pitome.hooks.packed_tokens import PackedTokens
from llava_pitome.merge.plan import MergePlan, make_plan
from llava_pitome.merge.reduce import MergeResult, average_tokens, reduce_tokens


@torch.no_grad()
def parents_in_time(metric: Tensor, frames: int, length: int) -> Tensor:
    """The token (V, A) that each token merges into: the first of its place in a run of similar frames.

    Of all pairs of tokens at the same place in neighbouring frames the most similar ones join, as many as
    leave `length` tokens.

    Args:
        metric: (V, F * K, D) what similarity is measured on, frame by frame.
        frames: F.
        length: M, from K to F * K.
    """
    videos, count = metric.shape[:2]
    of_frame = count // frames
    unit = F.normalize(metric.float(), dim=-1).unflatten(1, (frames, of_frame))
    similarity = (unit[:, 1:] * unit[:, :-1]).sum(-1).flatten(1)  # (V, (F - 1) * K)
    chosen = similarity.argsort(dim=1, descending=True, stable=True)[:, : count - length]
    joins = torch.zeros(videos, count, dtype=torch.bool, device=metric.device)
    joins.scatter_(1, chosen + of_frame, True)
    position = torch.arange(count, device=metric.device).expand(videos, -1)
    starts = torch.where(joins, 0, position).unflatten(1, (frames, of_frame))
    return starts.cummax(1).values.flatten(1)


@torch.no_grad()
def length_in_time(metric: Tensor, frames: int, total: int) -> int:
    """How many tokens of a video to leave in time, where `total` stay once tokens of a frame merge too.

    Tokens join the same place in the frame before as long as they are more similar to it than tokens of one
    frame are to each other.

    Args:
        metric: (1, F * K, D) as for `parents_in_time`.
        frames: F.
        total: from 1 to F * K.
    """
    count = metric.shape[1]
    unit = F.normalize(metric[0].float(), dim=-1).unflatten(0, (frames, -1))  # (F, K, D)
    in_time = (unit[1:] * unit[:-1]).sum(-1).flatten()
    in_space = (unit @ unit.transpose(1, 2)).tril(-1)[:, 1:]  # of each token but the first, to those before
    of_frame = unit.shape[1]
    is_before = torch.ones(of_frame, of_frame, dtype=torch.bool, device=unit.device).tril(-1)[1:]
    in_space = in_space.masked_fill(~is_before, -2).amax(-1, keepdim=False).flatten()
    similarity = torch.cat([in_time, in_space]).round(decimals=4)  # the same frame twice is a tie
    first = similarity.argsort(descending=True, stable=True)[: count - total]
    return max(count - int((first < len(in_time)).sum()), of_frame)


def merge_neighbouring_frames(
    tokens: PackedTokens, frames: int, length: int
) -> tuple[PackedTokens, MergePlan]:
    """Tokens of videos (V, F * K, D) merged to (V, M, D), see `parents_in_time`, and where each one went."""
    metric = tokens.x if tokens.metric is None else tokens.metric
    parent = parents_in_time(metric.detach(), frames, length)
    plan = make_plan(parent, length)
    x, sizes = reduce_tokens(tokens.x, tokens.sizes, plan, MergeResult(parent))
    metric, attention = tokens.metric, tokens.attention
    if metric is not None:
        metric = average_tokens(metric, tokens.sizes, plan)[0]
    if attention is not None:
        attention = torch.zeros_like(sizes).scatter_add(1, plan.slot, attention.to(sizes.dtype))
    return PackedTokens(x, tokens.position.gather(1, plan.kept), sizes, metric, attention), plan
