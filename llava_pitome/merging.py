"""A merge as data, and what follows from it: average, unmerge, trace.

A merge is one integer tensor `parent` (B, N): the token that each token folds into, itself when it survives.
Shapes: B images, N tokens before, M tokens after, D channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """Where every token goes.

    Attributes:
        slot: (B, N) output position of each input token, in range(length).
        length: M, the tokens that survive, the same for every image of the batch.
    """

    slot: Tensor
    length: int


def plan(parent: Tensor, length: int, order: Tensor | None = None) -> Plan:
    """The output position of every token: raster order, unless `order` (B, N) ranks otherwise.

    `length` is how many tokens survive; it is passed because the schedule knows it and a GPU would have to be
    asked.
    """
    here = torch.arange(parent.shape[1], device=parent.device)
    survives = parent == here  # (B, N)
    if order is None:
        rank = survives.cumsum(1) - 1
    else:
        key = order.masked_fill(~survives, order.shape[1])  # the merged ones behind every survivor
        rank = key.argsort(dim=1, stable=True).argsort(dim=1)
    return Plan(rank.gather(1, parent), length)


def merge(x: Tensor, size: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Average the tokens (B, N, D) that share a slot, weighted by the patches (B, N) they stand for.

    Returns the merged tokens (B, M, D) in the dtype of `x` and their sizes (B, M). Sums run in float32 at
    least: a slot can collect hundreds of half-precision tokens.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = size.to(wide)
    total = weight.new_zeros(x.shape[0], plan.length).scatter_add(1, plan.slot, weight)  # (B, M)
    share = weight / total.gather(1, plan.slot)  # (B, N), exactly 1 for a token that stays alone
    index = plan.slot.unsqueeze(-1).expand_as(x)
    merged = x.new_zeros(x.shape[0], plan.length, x.shape[2], dtype=wide)
    merged = merged.scatter_add(1, index, x.to(wide) * share.unsqueeze(-1))
    return merged.to(x.dtype), total.to(size.dtype)


def unmerge(x: Tensor, plan: Plan) -> Tensor:
    """Gives every input token what its slot holds: (B, M, D) back to (B, N, D)."""
    return x.gather(1, plan.slot.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def trace(plans: Sequence[Plan]) -> Tensor:
    """Which token each patch ended up in after several merges: (B, N) into the last M.

    Raises:
        ValueError: no merge is given, so that there is nothing to trace.
    """
    if not plans:
        raise ValueError("no merge to trace: give at least one plan")
    slot = plans[0].slot
    for later in plans[1:]:
        slot = later.slot.gather(1, slot)
    return slot


def size_bias(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Proportional attention's log s (the paper, section 3.2) as an additive attention mask (B, 1, 1, N)."""
    return size.log().to(dtype)[:, None, None, :]


def compose(first: Tensor, second: Tensor, plan: Plan) -> Tensor:
    """One parent (B, N) for two merges: `second` (B, M) was matched on what `first` left under `plan`."""
    survivors = torch.zeros_like(second).scatter(1, plan.slot, first)  # (B, M) which token each slot is
    return survivors.gather(1, second).gather(1, plan.slot)
