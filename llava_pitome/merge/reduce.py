"""What is left when some tokens go: averages, or what else a method makes of those who join.

Shapes: B images, N tokens before, M tokens after, D channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from llava_pitome.merge.plan import MergePlan, average_tokens, full_precision, gather_tokens


class MergeResult(NamedTuple):
    """What a method has chosen: who joins whom, and what counts for how much in the token that comes of it.

    Attributes:
        parent: (B, N) the token that each token folds into, itself when it survives.
        weight: (B, N) how much of each token counts in its average, beside its size; None: all of it. 0
            drops a token.
        mixing: (B or 1, M, N) what each survivor is made of where that is no average of its own tokens; in
            raster order of the survivors. None: it is.
        rank: (B, N) how the method's authors lay survivors out; None: raster order.
        prunes: those who go leave nothing behind, and survivors stay as they are.
        keeps_norm: an average is stretched to the longest of its tokens.
    """

    parent: Tensor
    weight: Tensor | None = None
    mixing: Tensor | None = None
    rank: Tensor | None = None
    prunes: bool = False
    keeps_norm: bool = False


def reduce_tokens(
    x: Tensor,
    sizes: Tensor,
    plan: MergePlan,
    choice: MergeResult,
    size_weighted: bool = True,
    triton: bool = False,
) -> tuple[Tensor, Tensor]:
    """The tokens (B, N, D) that a choice leaves, and the patches they stand for: (B, M, D) and (B, M).

    `merge` where everybody counts; what is dropped counts in no size either. A mixing holds whatever the
    sizes are; they follow the parents.

    Args:
        x: the tokens.
        sizes: (B, N) patches that each stands for.
        plan: the layout of the choice.
        choice: of which `parent` and `rank` are in the plan already.
        size_weighted: let tokens count by their sizes.
        triton: as for `merge`.
    """
    if choice.prunes:
        return gather_tokens(x, plan.kept), sizes.gather(1, plan.kept)
    counted = sizes if choice.weight is None else sizes * choice.weight
    wide = torch.promote_types(x.dtype, torch.float32)
    if choice.mixing is not None:
        with full_precision(x.device.type):
            return (choice.mixing.to(wide) @ x.to(wide)).to(x.dtype), _totals(counted, plan)
    average = x.to(wide) if choice.keeps_norm else x  # what is stretched yet is not to be rounded twice
    if size_weighted:
        merged, total = average_tokens(average, counted, plan, triton)
    else:
        weight = torch.ones_like(sizes) if choice.weight is None else choice.weight
        merged, total = average_tokens(average, weight, plan, triton)[0], _totals(counted, plan)
    if choice.keeps_norm:
        merged = _stretched(merged, average, plan, choice.weight).to(x.dtype)
    return merged, total


def _totals(sizes: Tensor, plan: MergePlan) -> Tensor:
    """The sizes (B, N) of each slot added up: (B, M)."""
    return sizes.new_zeros(len(sizes), plan.length).scatter_add(1, plan.slot, sizes)


def _stretched(merged: Tensor, x: Tensor, plan: MergePlan, weight: Tensor | None) -> Tensor:
    """Merged tokens (B, M, D) at the norm of the longest token (B, N, D) in them that has any weight.

    Gradients pass through the norms. Where no two were averaged, nothing is stretched and no bit changes.
    """
    norms = x.norm(dim=-1)
    counts = torch.ones_like(norms) if weight is None else (weight > 0).to(x.dtype)
    blank = norms.new_zeros(merged.shape[:2])
    longest = blank.scatter_reduce(1, plan.slot, norms * counts, "amax")
    own = merged.norm(dim=-1)
    stretches = (blank.scatter_add(1, plan.slot, counts) > 1) & (own > 0)
    factor = torch.where(stretches, longest, 1.0) / torch.where(stretches, own, 1.0)
    return merged * factor.unsqueeze(2)
