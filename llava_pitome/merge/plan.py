"""A merge as data, and what follows from it: average, unmerge, trace.

A merge is one integer tensor `parent` (B, N): the token that each token folds into, itself when it survives.
Shapes: B images, N tokens before, M tokens after, D channels.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava_pitome.kernels import triton_takes


class MergePlan(NamedTuple):
    """Where every token goes.

    Attributes:
        slot: (B, N) output position of each input token, in range(length).
        length: M, the tokens that survive, the same for every image of the batch.
        kept: (B, M) the survivor that stands at each output position.
        gone: (B, N - M) the tokens that fold into another.
    """

    slot: Tensor
    length: int
    kept: Tensor
    gone: Tensor


def make_plan(parent: Tensor, length: int, order: Tensor | None = None) -> MergePlan:
    """The output position of every token: raster order, unless `order` (B, N) ranks otherwise.

    `length` is how many tokens survive; it is passed because the schedule knows it and a GPU would have to be
    asked.
    """
    here = torch.arange(parent.shape[1], device=parent.device)
    goes = parent != here  # (B, N)
    key = goes.to(torch.uint8) if order is None else order.masked_fill(goes, order.shape[1])
    laid = key.argsort(dim=1, stable=True)  # survivors in front
    rank = torch.empty_like(laid).scatter_(1, laid, here.expand_as(laid))
    return MergePlan(rank.gather(1, parent), length, laid[:, :length], laid[:, length:])


def average_tokens(x: Tensor, size: Tensor, plan: MergePlan, triton: bool = False) -> tuple[Tensor, Tensor]:
    """Average the tokens (B, N, D) that share a slot, weighted by the patches (B, N) they stand for.

    Returns the merged tokens (B, M, D) in the dtype of `x` and their sizes (B, M). Sums run in float32 at
    least: a slot can collect hundreds of half-precision tokens. The result does not depend on the order in
    which a GPU's threads come by: no float is added by scattered atomics. `triton` prefers a GPU kernel.
    """
    weight = size.to(torch.promote_types(x.dtype, torch.float32))
    # whole numbers, whose sum in floats is exact in every order (below 2**24 patches)
    total = weight.new_zeros(x.shape[0], plan.length).scatter_add(1, plan.slot, weight)  # (B, M)
    share = weight / total.gather(1, plan.slot)  # (B, N), exactly 1 for a token that stays alone
    if triton and triton_takes(x):
        from llava_pitome.kernels.average_triton import average

        return average(x, share, plan), total.to(size.dtype)
    average = _Average.apply if x.requires_grad else _average
    with full_precision(x.device.type):
        return average(x, share, plan.slot, plan.kept, plan.gone), total.to(size.dtype)


def _average(x: Tensor, share: Tensor, slot: Tensor, kept: Tensor, gone: Tensor) -> Tensor:
    """The sum over each slot of share (B, N) times token (B, N, D), computed for slots that collect several.

    Survivors are copied, which is most of the work; then the slots that `gone` tokens fold into are written
    over with their sums, one small matrix product an image: R = N - M rows instead of N. The product gives
    the other tokens of an image the weight 0, so that an infinite one spoils its image's sums.
    """
    out = gather_tokens(x, kept)  # (B, M, D)
    if not gone.shape[1]:
        return out
    target = slot.gather(1, gone)  # (B, R) slots that collect, some of them several times
    heir = kept.gather(1, target)  # (B, R) the survivors of these slots
    weights = (target.unsqueeze(2) == target.unsqueeze(1)) * share.gather(1, gone).unsqueeze(1)
    own = gather_tokens(x, heir).to(share.dtype) * share.gather(1, heir).unsqueeze(2)
    summed = torch.baddbmm(own, weights, gather_tokens(x, gone).to(share.dtype))  # (B, R, D)
    where = _flat(target, out.shape[1])  # the same slot twice is written the same sum twice
    out.view(-1, x.shape[2]).index_put_((where,), summed.to(x.dtype).view(-1, x.shape[2]))
    return out


class _Average(torch.autograd.Function):
    """`_average` with its gradient; torch's own would count a slot that is written twice twice."""

    @staticmethod
    def forward(x: Tensor, share: Tensor, slot: Tensor, kept: Tensor, gone: Tensor) -> Tensor:
        """(B, N, D), (B, N) and a plan's tensors to (B, M, D)."""
        return _average(x, share, slot, kept, gone)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keeps what the gradient needs."""
        ctx.save_for_backward(inputs[1], inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Each token is given its slot's gradient by its share."""
        share, slot = ctx.saved_tensors
        return (gather_tokens(grad, slot) * share.unsqueeze(2)).to(grad.dtype), None, None, None, None


def full_precision(kind: str) -> AbstractContextManager:
    """Autocast off where it is on for a kind of device: it would match and average in half precision."""
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def add_prefix_tokens(parent: Tensor, front: int) -> Tensor:
    """Parents (B, front + N) of a sequence with `front` tokens before these, which keep to themselves."""
    if not front:
        return parent
    ahead = torch.arange(front, device=parent.device).expand(len(parent), -1)
    return torch.cat([ahead, parent + front], 1)


def without_prefix_tokens(plan: MergePlan, front: int) -> MergePlan:
    """The plan without the first `front` tokens, which keep to themselves."""
    slot, kept = plan.slot[:, front:] - front, plan.kept[:, front:] - front
    return MergePlan(slot, plan.length - front, kept, plan.gone - front)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """The tokens at `index` (B, K) of x (B, N, D): (B, K, D). One flat index_select: gather is far slower."""
    picked = x.reshape(-1, x.shape[2]).index_select(0, _flat(index, x.shape[1]))
    return picked.view(*index.shape, x.shape[2])


def _flat(index: Tensor, count: int) -> Tensor:
    """Positions (B, K) within rows of `count` as positions (B * K,) within all rows."""
    if len(index) == 1:
        return index.view(-1)
    start = torch.arange(len(index), device=index.device) * count
    return (index + start.unsqueeze(1)).view(-1)


def unmerge(x: Tensor, plan: MergePlan) -> Tensor:
    """Gives every input token what its slot holds: (B, M, D) back to (B, N, D)."""
    return gather_tokens(x, plan.slot)


def trace(plans: Sequence[MergePlan]) -> Tensor:
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


def log_size_bias(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Proportional attention's log s (the paper, section 3.2) as an additive attention mask (B, 1, 1, N)."""
    return size.log().to(dtype)[:, None, None, :]


def compose(second: Tensor, plan: MergePlan) -> Tensor:
    """One parent (B, N) for two merges: `second` (B, M) was matched on what `plan` left."""
    return plan.kept.gather(1, second).gather(1, plan.slot)
