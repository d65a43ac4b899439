"""A merge as data: the plan of which token goes where, and what follows from it.

A merge is one integer tensor `parent` (B, N): the token each token merges into, itself when it is kept.
Shapes: B images, N tokens before, M tokens after, D channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class MergePlan(NamedTuple):
    """Where every token goes.

    Attributes:
        slot: (B, N) output position of each input token, in range(length).
        length: M, the number of kept tokens, the same for every image of the batch.
        kept: (B, M) the input position of the token kept at each output position.
        gone: (B, N - M) the input positions of the tokens that merge into another.
    """

    slot: Tensor
    length: int
    kept: Tensor
    gone: Tensor


def make_plan(parent: Tensor, length: int, order: Tensor | None = None) -> MergePlan:
    """Returns the output position of every token.

    Args:
        parent: (B, N) the token each token merges into.
        length: M, the number of kept tokens. It follows from the schedule; counting would synchronize with
            a GPU.
        order: (B, N) kept tokens are sorted by this rank; None keeps raster order.
    """
    positions = torch.arange(parent.shape[1], device=parent.device)
    is_gone = parent != positions  # (B, N)
    key = is_gone.to(torch.uint8) if order is None else order.masked_fill(is_gone, order.shape[1])
    permutation = key.argsort(dim=1, stable=True)  # kept tokens first
    inverse = torch.empty_like(permutation).scatter_(1, permutation, positions.expand_as(permutation))
    return MergePlan(inverse.gather(1, parent), length, permutation[:, :length], permutation[:, length:])


def add_prefix_tokens(parent: Tensor, num_prefix_tokens: int) -> Tensor:
    """Returns parents (B, P + N) of a sequence that starts with P more tokens, which are kept."""
    if not num_prefix_tokens:
        return parent
    prefix = torch.arange(num_prefix_tokens, device=parent.device).expand(len(parent), -1)
    return torch.cat([prefix, parent + num_prefix_tokens], 1)


def without_prefix_tokens(plan: MergePlan, num_prefix_tokens: int) -> MergePlan:
    """Returns the plan of the tokens after the first P, all of which are kept."""
    slot, kept = (x[:, num_prefix_tokens:] - num_prefix_tokens for x in (plan.slot, plan.kept))
    return MergePlan(slot, plan.length - num_prefix_tokens, kept, plan.gone - num_prefix_tokens)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Returns the tokens (B, K, D) of x (B, N, D) at `index` (B, K).

    A single index_select on flat rows is much faster than `gather`.
    """
    rows = x.reshape(-1, x.shape[2]).index_select(0, flat_index(index, x.shape[1]))
    return rows.view(*index.shape, x.shape[2])


def flat_index(index: Tensor, count: int) -> Tensor:
    """Returns positions (B, K) within rows of `count` as positions (B * K,) within all rows."""
    if len(index) == 1:
        return index.view(-1)
    start = torch.arange(len(index), device=index.device) * count
    return (index + start.unsqueeze(1)).view(-1)


def unmerge(x: Tensor, plan: MergePlan) -> Tensor:
    """Copies each merged token (B, M, D) back to all tokens it stands for: (B, N, D)."""
    return gather_tokens(x, plan.slot)


def trace(plans: Sequence[MergePlan]) -> Tensor:
    """Returns the final slot (B, N), in range(M) of the last plan, of each patch after successive merges.

    Raises:
        ValueError: `plans` is empty.
    """
    if not plans:
        raise ValueError("plans is empty: trace needs at least one plan")
    slot = plans[0].slot
    for later in plans[1:]:
        slot = later.slot.gather(1, slot)
    return slot


def compose(second: Tensor, plan: MergePlan) -> Tensor:
    """Returns the parents (B, N) of two merges in one; `second` (B, M) are parents of the plan's outputs."""
    return plan.kept.gather(1, second).gather(1, plan.slot)


def log_size_bias(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns log s of sizes (B, N) as an additive attention mask (B, 1, 1, N).

    With it attention is proportional: a token counts as often as the patches it stands for (PiToMe, section
    3.2).
    """
    return size.log().to(dtype)[:, None, None, :]
