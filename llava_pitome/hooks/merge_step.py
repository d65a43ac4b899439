"""One merge: from a metric and a hidden state to fewer tokens and their sizes; the same in every place.

Shapes: B images, T tokens with those in front, N without them, M after the merge, D channels.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llava_pitome.config import MergeConfig
from llava_pitome.merge.plan import (
    MergePlan,
    add_prefix_tokens,
    make_plan,
    without_prefix_tokens,
)
from llava_pitome.merge.reduce import MergeResult, full_precision, reduce_tokens
from llava_pitome.methods import METHODS
from llava_pitome.methods.registry import choose
from llava_pitome.models.parts import TokenState

ANOTHER_PASS = (
    "gradient checkpointing ran a block again after another forward pass changed what merges; with "
    "checkpointing on, go backward before the next forward"
)
Offers = Mapping[str, Callable[[], Any]]  # what a place can tell of methods' GIVEN, worked out when asked


class MergeRecord(NamedTuple):
    """One merge, as whoever watches is shown it; tokens in front are left out.

    Attributes:
        metric: (B, N, C) what similarity was measured on, float32 at least.
        plan: where every token went.
        dropped: (B, N) True for tokens that left nothing behind.
        method: who chose, a name in METHODS.
        parameters: the method's own.
        depth: of this merge in [0, 1], as the method was told.
    """

    metric: Tensor
    plan: MergePlan
    dropped: Tensor
    method: str
    parameters: dict[str, Any]
    depth: float


class MergeStep:
    """Merges as a config says.

    Attributes:
        watch: is shown every merge; None: nobody watches, and nothing is worked out for it.
    """

    def __init__(self, config: MergeConfig, front: int, triton: bool):
        """Prepares merging.

        Args:
            config: how to merge.
            front: tokens in front of the patches that never merge: a class token, or none.
            triton: let kernels written in Triton compute, where they can.
        """
        self.config, self.front, self.triton = config, front, triton
        self.watch: Callable[[MergeRecord], None] | None = None

    def merge(
        self,
        x: Tensor,
        metric: Tensor,
        length: int,
        here: TokenState,
        last: TokenState | None,
        way: tuple[str, dict[str, Any], float],
        offers: Offers,
    ) -> tuple[Tensor, TokenState]:
        """Merges once.

        Args:
            x: (B, T, D) the hidden state that becomes shorter.
            metric: (B, T, C) what similarity is measured on.
            length: M, patches that survive.
            here: what is known in front.
            last: what the pass before left behind.
            way: the method, its parameters, and the depth of this merge in [0, 1].
            offers: what the method may need beside the metric.

        Returns:
            The merged hidden state, front tokens first, and what is known behind it.

        Raises:
            RuntimeError: gradient checkpointing runs a block again, and other tokens would merge.
        """
        sizes = here.sizes.to(x.device)
        choice, laid = self._choose(metric.detach(), length, sizes, way, offers)
        if recomputing() and not (last and last.merge and torch.equal(last.merge.slot, laid.slot)):
            raise RuntimeError(ANOTHER_PASS)
        if self.watch is not None:
            self.watch(self._sight(metric.detach(), choice, laid, way))
        merged, sizes = reduce_tokens(x, sizes, laid, choice, self.config.size_weighted, self._triton_now)
        return merged, TokenState(sizes, laid, self.front)

    def _sight(
        self, metric: Tensor, choice: MergeResult, laid: MergePlan, way: tuple[str, dict[str, Any], float]
    ) -> MergeRecord:
        """A merge as it is shown."""
        front = self.front
        gone = torch.ones_like(choice.parent, dtype=torch.bool).scatter(1, laid.kept, False)
        nothing = choice.prunes if choice.weight is None else choice.weight == 0
        return MergeRecord(
            self._wide(metric), without_prefix_tokens(laid, front), (gone & nothing)[:, front:], *way
        )

    def _wide(self, metric: Tensor) -> Tensor:
        """What methods are given of a metric (B, T, C)."""
        return metric[:, self.front :].to(torch.promote_types(metric.dtype, torch.float32))

    @torch.no_grad()
    def _choose(
        self,
        metric: Tensor,
        length: int,
        sizes: Tensor,
        way: tuple[str, dict[str, Any], float],
        offers: Offers,
    ) -> tuple[MergeResult, MergePlan]:
        """Who merges, front tokens included."""
        method, parameters, depth = way
        front = self.front
        offers = {"sizes": lambda: sizes[:, front:], **offers}
        given = {name: offers[name]() for name in METHODS[method].needs}
        metric = self._wide(metric)
        with full_precision(metric.device.type):
            choice = choose(
                metric,
                metric.shape[1] - length,
                method,
                ordered=self.config.order == "method",
                triton=self._triton_now,
                depth=depth,
                **given,
                **parameters,
            )
        choice = _widened(choice, front)
        return choice, make_plan(choice.parent, length + front, choice.order)

    @property
    def _triton_now(self) -> bool:
        """Whether Triton may compute: torch.compile writes kernels of its own."""
        return self.triton and not torch.compiler.is_compiling()


def _widened(choice: MergeResult, front: int) -> MergeResult:
    """The choice with `front` tokens ahead, which keep to themselves."""
    if not front:
        return choice
    rank, weight, mixing = choice.order, choice.weight, choice.mixing
    if rank is not None:
        rank = nn.functional.pad(rank + front, (front, 0))
    if weight is not None:
        weight = nn.functional.pad(weight, (front, 0), value=1)
    if mixing is not None:
        mixing = nn.functional.pad(mixing, (front, 0, front, 0))
        mixing[:, :front, :front] = torch.eye(front, dtype=mixing.dtype, device=mixing.device)
    return choice._replace(
        parent=add_prefix_tokens(choice.parent, front), order=rank, weight=weight, mixing=mixing
    )


def key(keys: Tensor, heads: int) -> Tensor:
    """One key a token (B, T, C): the mean over the heads of (B, T, heads * C), without gradients."""
    wide = torch.promote_types(keys.dtype, torch.float32)
    return keys.detach().unflatten(-1, (heads, -1)).mean(-2, dtype=wide)


def recomputing() -> bool:
    """Whether this runs inside a backward pass, where gradient checkpointing runs a block again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
