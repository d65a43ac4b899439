"""Reduces hidden states by a merge: averages, pruned tokens, or linear combinations.

Shapes: B images, N tokens before, M tokens after, R = N - M, D channels.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava_pitome.kernels import supports_triton
from llava_pitome.merge.plan import MergePlan, flat_index, gather_tokens


class MergeResult(NamedTuple):
    """A method's decision: which token merges into which, and how the tokens of a group are combined.

    Attributes:
        parent: (B, N) the token each token merges into, itself when it is kept.
        weight: (B, N) weight of each token in its group's average, multiplied by its size; 0 drops a token.
            None: 1 for all.
        mixing: (B or 1, M, N) rows of coefficients for methods whose outputs are no group averages, one row
            a kept token in raster order. None: averages.
        order: (B, N) rank by which kept tokens are sorted. None: raster order.
        prunes: kept tokens stay unchanged and all others are dropped.
        keeps_norm: an average is scaled to the norm of the longest token of its group.
    """

    parent: Tensor
    weight: Tensor | None = None
    mixing: Tensor | None = None
    order: Tensor | None = None
    prunes: bool = False
    keeps_norm: bool = False


def reduce_tokens(
    x: Tensor,
    sizes: Tensor,
    plan: MergePlan,
    result: MergeResult,
    size_weighted: bool = True,
    triton: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns the merged tokens (B, M, D) and the patches (B, M) they stand for.

    Dropped tokens count in no size. Mixing coefficients do not depend on sizes.

    Args:
        x: (B, N, D) tokens.
        sizes: (B, N) patches that each token stands for.
        plan: the plan made of `result.parent` and `result.order`.
        result: how tokens are combined.
        size_weighted: weight tokens by their sizes.
        triton: use the Triton kernel where it supports the tensors.
    """
    if result.prunes:
        return gather_tokens(x, plan.kept), sizes.gather(1, plan.kept)
    counted = sizes if result.weight is None else sizes * result.weight
    wide = torch.promote_types(x.dtype, torch.float32)
    if result.mixing is not None:
        with full_precision(x.device.type):
            return (result.mixing.to(wide) @ x.to(wide)).to(x.dtype), _sum_by_slot(counted, plan)
    tokens = x.to(wide) if result.keeps_norm else x  # rounded once, after scaling
    if size_weighted:
        merged, total = average_tokens(tokens, counted, plan, triton)
    else:
        weight = torch.ones_like(sizes) if result.weight is None else result.weight
        merged, total = average_tokens(tokens, weight, plan, triton)[0], _sum_by_slot(counted, plan)
    if result.keeps_norm:
        merged = _scale_to_longest(merged, tokens, plan, result.weight).to(x.dtype)
    return merged, total


def average_tokens(x: Tensor, size: Tensor, plan: MergePlan, triton: bool = False) -> tuple[Tensor, Tensor]:
    """Averages the tokens (B, N, D) of each slot, weighted by the patches (B, N) they stand for.

    Sums run in float32 at least, since a slot can collect hundreds of half-precision tokens. The result is
    deterministic on GPUs: no float is added by atomics.

    Args:
        x: (B, N, D) tokens.
        size: (B, N) weights.
        plan: where tokens go.
        triton: use the Triton kernel where it supports `x`.

    Returns:
        The merged tokens (B, M, D) in the dtype of `x`, and their sizes (B, M).
    """
    weight = size.to(torch.promote_types(x.dtype, torch.float32))
    total = _sum_by_slot(weight, plan)
    share = weight / total.gather(1, plan.slot)  # (B, N), exactly 1 for a token alone in its slot
    if triton and supports_triton(x):
        from llava_pitome.kernels.average_triton import average

        return average(x, share, plan), total.to(size.dtype)
    average = _Average.apply if x.requires_grad else _average
    with full_precision(x.device.type):
        return average(x, share, plan.slot, plan.kept, plan.gone), total.to(size.dtype)


def _average(x: Tensor, share: Tensor, slot: Tensor, kept: Tensor, gone: Tensor) -> Tensor:
    """Returns the sum over each slot of share (B, N) times token (B, N, D): (B, M, D).

    Kept tokens are copied. Then slots of several tokens are overwritten by their sums: one small matrix
    product an image, over the R tokens that are gone instead of all N. The product multiplies an image's
    other tokens by 0, so that an infinite one spoils the sums of its image.
    """
    out = gather_tokens(x, kept)  # (B, M, D)
    if not gone.shape[1]:
        return out
    target = slot.gather(1, gone)  # (B, R), with repeats
    target_kept = kept.gather(1, target)  # (B, R) the kept tokens of these slots
    weights = (target.unsqueeze(2) == target.unsqueeze(1)) * share.gather(1, gone).unsqueeze(1)
    own = gather_tokens(x, target_kept).to(share.dtype) * share.gather(1, target_kept).unsqueeze(2)
    sums = torch.baddbmm(own, weights, gather_tokens(x, gone).to(share.dtype))  # (B, R, D)
    index = flat_index(target, out.shape[1])  # a repeated slot is written the same sum again
    out.view(-1, x.shape[2]).index_put_((index,), sums.to(x.dtype).view(-1, x.shape[2]))
    return out


class _Average(torch.autograd.Function):
    """`_average` with its gradient; autograd's own would count repeated slots twice."""

    @staticmethod
    def forward(x: Tensor, share: Tensor, slot: Tensor, kept: Tensor, gone: Tensor) -> Tensor:
        """Computes `_average`."""
        return _average(x, share, slot, kept, gone)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Saves the shares and slots."""
        ctx.save_for_backward(inputs[1], inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Returns each token's gradient: its share of its slot's."""
        share, slot = ctx.saved_tensors
        return (gather_tokens(grad, slot) * share.unsqueeze(2)).to(grad.dtype), None, None, None, None


def full_precision(device_type: str) -> AbstractContextManager:
    """Returns a context without autocast, which would match and average in half precision."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _sum_by_slot(sizes: Tensor, plan: MergePlan) -> Tensor:
    """Returns the sum of the sizes (B, N) in each slot: (B, M).

    Whole numbers below 2**24 sum exactly in every order, so that atomics do no harm.
    """
    return sizes.new_zeros(len(sizes), plan.length).scatter_add(1, plan.slot, sizes)


def _scale_to_longest(merged: Tensor, x: Tensor, plan: MergePlan, weight: Tensor | None) -> Tensor:
    """Scales merged tokens (B, M, D) to the norm of the longest token (B, N, D) of their group with a weight.

    Gradients pass through the norms. A token that is no average of several keeps every bit.
    """
    norms = x.norm(dim=-1)
    counts = torch.ones_like(norms) if weight is None else (weight > 0).to(x.dtype)
    zeros = norms.new_zeros(merged.shape[:2])
    longest = zeros.scatter_reduce(1, plan.slot, norms * counts, "amax")
    own = merged.norm(dim=-1)
    is_scaled = (zeros.scatter_add(1, plan.slot, counts) > 1) & (own > 0)
    factor = torch.where(is_scaled, longest, 1.0) / torch.where(is_scaled, own, 1.0)
    return merged * factor.unsqueeze(2)
