"""One merge, the same in every place: from a metric and hidden states to fewer tokens and their sizes.

Shapes: B images, T tokens with prefix tokens, N without them, M after the merge, D channels.
"""

from collections.abc import Callable, Mapping
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llava_pitome.config import MergeConfig
from llava_pitome.hooks.tile_groups import TileGroup, choose_in_groups
from llava_pitome.merge.plan import (
    MergePlan,
    add_prefix_tokens,
    make_plan,
    without_prefix_tokens,
)
from llava_pitome.merge.reduce import MergeResult, full_precision, reduce_tokens
from llava_pitome.methods import METHODS
from llava_pitome.methods.registry import choose

ANOTHER_PASS = (
    "gradient checkpointing recomputed a layer, and other tokens would merge than in the forward pass: its "
    "inputs, weights or randomness changed in between"
)
InputProviders = Mapping[str, Callable[[], Any]]  # functions that compute a method's inputs, by METHOD_INPUTS


class TokenState(NamedTuple):
    """The tokens before or after a layer.

    Attributes:
        sizes: (B, T) patches that each token stands for, 1 for a prefix token.
        merge: the merge of all T tokens that led there; None where none did.
        num_prefix_tokens: tokens before the patches, which never merge.
        padding: (B, N) True for tokens without prefix tokens that show padding; None where no tile does.
        result: how that merge combined the T tokens; None where nothing has to be merged like them.
    """

    sizes: Tensor
    merge: MergePlan | None = None
    num_prefix_tokens: int = 0
    padding: Tensor | None = None
    result: MergeResult | None = None

    @property
    def patch_sizes(self) -> Tensor:
        """Sizes (B, N) without prefix tokens; where nothing is dropped they add up to the image's patches."""
        return self.sizes[:, self.num_prefix_tokens :]

    @property
    def plan(self) -> MergePlan | None:
        """The merge without prefix tokens."""
        return self.merge and without_prefix_tokens(self.merge, self.num_prefix_tokens)


class MergePoint(NamedTuple):
    """Where a merge happens, and by which method.

    Attributes:
        place: "tower", "prefix" or "decoder".
        layer: index of the tower's or the language model's layer; 0 at the prefix.
        depth: l_i / l in [0, 1], as the method is given it.
        method: a name in METHODS.
        parameters: the method's own.
    """

    place: str
    layer: int
    depth: float
    method: str
    parameters: Mapping[str, Any]


class MergeRecord(NamedTuple):
    """One merge as the callback of `MergeHandle.record` is given it, without prefix tokens.

    Attributes:
        place: as in MergePoint.
        layer: as in MergePoint.
        metric: (B, N, C) what similarity was measured on, float32 at least.
        plan: where every token went.
        dropped: (B, N) True for tokens that are in no average.
        method: as in MergePoint.
        parameters: as in MergePoint.
        depth: as in MergePoint.
    """

    place: str
    layer: int
    metric: Tensor
    plan: MergePlan
    dropped: Tensor
    method: str
    parameters: Mapping[str, Any]
    depth: float


class MergeStep:
    """Merges as a config says.

    Attributes:
        record: called with a MergeRecord after every merge; None records nothing.
        keeps_results: whether a TokenState holds how its tokens were combined, for `repeat`.
    """

    def __init__(
        self, config: MergeConfig, num_prefix_tokens: int, triton: bool, keeps_results: bool = False
    ):
        """Keeps how to merge.

        Args:
            config: how to merge.
            num_prefix_tokens: tokens before the patches that never merge.
            triton: prefer kernels written in Triton.
            keeps_results: as the attribute.
        """
        self.config, self.num_prefix_tokens, self.triton = config, num_prefix_tokens, triton
        self.keeps_results = keeps_results
        self.record: Callable[[MergeRecord], None] | None = None

    def merge(
        self,
        x: Tensor,
        metric: Tensor,
        length: int,
        before: TokenState,
        point: MergePoint,
        inputs: InputProviders,
        previous: TokenState | None = None,
        groups: tuple[TileGroup, ...] = (),
    ) -> tuple[Tensor, TokenState]:
        """Merges once.

        Args:
            x: (B, T, D) the hidden states to shorten.
            metric: (B, T, C) what similarity is measured on.
            length: M, patches that are kept.
            before: the tokens before this merge.
            point: where this is, and the method.
            inputs: what the method may need besides the metric.
            previous: what an earlier run of this merge left in the same forward pass, where gradient
                checkpointing recomputes it.
            groups: of tiles that show padding, where `before` says which tokens do.

        Returns:
            The merged hidden states (B, prefix + M, D), prefix tokens first, and the tokens after the merge.

        Raises:
            RuntimeError: gradient checkpointing recomputes a layer, and other tokens would merge.
        """
        sizes = before.sizes.to(x.device)
        padding = None if before.padding is None else before.padding.to(x.device)
        result, plan = self._choose(metric.detach(), length, sizes, point, inputs, padding, groups)
        recomputes = previous is not None and previous.merge is not None
        if recomputes and not torch.equal(previous.merge.slot, plan.slot):
            raise RuntimeError(ANOTHER_PASS)
        if self.record is not None and not recomputes:
            self.record(self._recorded(metric.detach(), result, plan, point))
        merged, sizes = reduce_tokens(x, sizes, plan, result, self.config.size_weighted, self._uses_triton)
        result = result if self.keeps_results else None
        if padding is not None:
            padding = padding.gather(1, without_prefix_tokens(plan, self.num_prefix_tokens).kept)
        return merged, TokenState(sizes, plan, self.num_prefix_tokens, padding, result)

    def repeat(self, x: Tensor, before: TokenState, after: TokenState) -> Tensor:
        """Merges other hidden states (B, T, D) of the same tokens as an earlier merge did, to (B, M, D).

        Args:
            x: the hidden states.
            before: the tokens before that merge.
            after: what it returned, with its result.
        """
        device = after.merge.slot.device
        x, sizes = x.to(device), before.sizes.to(device)
        return reduce_tokens(
            x, sizes, after.merge, after.result, self.config.size_weighted, self._uses_triton
        )[0]

    @torch.no_grad()
    def _choose(
        self,
        metric: Tensor,
        length: int,
        sizes: Tensor,
        point: MergePoint,
        inputs: InputProviders,
        padding: Tensor | None,
        groups: tuple[TileGroup, ...],
    ) -> tuple[MergeResult, MergePlan]:
        """What the method chooses, prefix tokens included.

        Counts follow from the config and the image's size, so `index` makes them constants of a graph.
        """
        prefix, length = self.num_prefix_tokens, index(length)
        inputs = {"sizes": lambda: sizes[:, prefix:], **inputs}
        metric = self._without_prefix(metric)

        needs = METHODS[point.method].needs

        def decide(metric: Tensor, remove: int, given: dict[str, Any]) -> MergeResult:
            given = {name: given[name] for name in needs}
            return choose(
                metric,
                remove,
                point.method,
                ordered=self.config.order == "method",
                triton=self._uses_triton,
                depth=point.depth,
                **given,
                **point.parameters,
            )

        with full_precision(metric.device.type):
            if padding is None:
                given = {name: inputs[name]() for name in needs}
                result = decide(metric, index(metric.shape[1]) - length, given)
            else:  # the grid is the group's own
                given = {name: inputs[name]() for name in set(needs) - {"grid"}}
                result = choose_in_groups(metric, padding, length, groups, point.layer, given, decide)
        result = _with_prefix(result, prefix)
        return result, make_plan(result.parent, length + prefix, result.order)

    def _without_prefix(self, metric: Tensor) -> Tensor:
        """The metric (B, T, C) as methods are given it: (B, N, C), float32 at least."""
        return metric[:, self.num_prefix_tokens :].to(torch.promote_types(metric.dtype, torch.float32))

    def _recorded(
        self, metric: Tensor, result: MergeResult, plan: MergePlan, point: MergePoint
    ) -> MergeRecord:
        """A merge as callbacks are given it."""
        prefix = self.num_prefix_tokens
        merged_away = torch.ones_like(result.parent, dtype=torch.bool).scatter(1, plan.kept, False)
        uncounted = result.prunes if result.weight is None else result.weight == 0
        return MergeRecord(
            point.place,
            point.layer,
            self._without_prefix(metric),
            without_prefix_tokens(plan, prefix),
            (merged_away & uncounted)[:, prefix:],
            point.method,
            point.parameters,
            point.depth,
        )

    @property
    def _uses_triton(self) -> bool:
        """Whether Triton may compute: torch.compile writes kernels of its own."""
        return self.triton and not torch.compiler.is_compiling()


def _with_prefix(result: MergeResult, prefix: int) -> MergeResult:
    """The result with `prefix` more tokens at the start, which merge with none."""
    if not prefix:
        return result
    order, weight, mixing = result.order, result.weight, result.mixing
    if order is not None:
        order = nn.functional.pad(order + prefix, (prefix, 0))
    if weight is not None:
        weight = nn.functional.pad(weight, (prefix, 0), value=1)
    if mixing is not None:
        mixing = nn.functional.pad(mixing, (prefix, 0, prefix, 0))
        mixing[:, :prefix, :prefix] = torch.eye(prefix, dtype=mixing.dtype, device=mixing.device)
    return result._replace(
        parent=add_prefix_tokens(result.parent, prefix), order=order, weight=weight, mixing=mixing
    )
