"""One merge inside a tower: from a block's keys and hidden state to fewer tokens and their sizes.

Shapes: B images, T tokens with the class token, N without it, M after the merge, D channels.
"""

import torch
from torch import Tensor, nn

from llava_pitome.config import MergeConfig
from llava_pitome.merging import Plan, full_precision, merge, plan, widen
from llava_pitome.methods import match, ordered
from llava_pitome.places.blocks import Slot


class Merger:
    """Merges as a config says."""

    def __init__(self, config: MergeConfig, layers: int, class_tokens: int, triton: bool):
        """Prepares merging.

        Args:
            config: how to merge.
            layers: blocks of the tower, which say how deep one of them lies.
            class_tokens: tokens in front of the patches that never merge, 0 or 1.
            triton: let kernels written in Triton compute, where they can.
        """
        self.config, self.layers, self.class_tokens, self.triton = config, layers, class_tokens, triton

    def key(self, keys: Tensor, heads: int) -> Tensor:
        """One key a token (B, T, D / heads): the mean over the heads of (B, T, D), without gradients."""
        wide = torch.promote_types(keys.dtype, torch.float32)
        return keys.detach().unflatten(-1, (heads, -1)).mean(-2, dtype=wide)

    def merge(
        self, i: int, x: Tensor, keys: Tensor | None, length: int, here: Slot, last: Slot | None
    ) -> tuple[Tensor, Slot]:
        """Merges at block i.

        Args:
            i: which block.
            x: (B, T, D) the hidden state that becomes shorter.
            keys: (B, T, C) one key a token; not looked at where the hidden state is the metric.
            length: M, patches that survive.
            here: what is known in front of the block.
            last: what the pass before left behind the block.

        Returns:
            The merged hidden state, class token in front, and what is known behind the block.

        Raises:
            RuntimeError: gradient checkpointing runs the block again, and other tokens would merge; or the
                keys are missing.
        """
        if self.config.metric == "hidden":
            keys = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        elif keys is None:
            raise RuntimeError(
                f"block {i} made no keys: its key projection was replaced after apply; apply again"
            )
        metric = keys[:, self.class_tokens :]
        laid = self._match(i, metric, length)
        if _recomputing() and not (last and last.merge and torch.equal(last.merge.slot, laid.slot)):
            raise RuntimeError(
                "gradient checkpointing ran a block again after another forward pass changed what merges; "
                "with checkpointing on, go backward before the next forward"
            )
        sizes = here.sizes.to(x.device)
        if self.config.size_weighted:
            merged, sizes = merge(x, sizes, laid, self._triton_now)
        else:
            merged, _ = merge(x, torch.ones_like(sizes), laid, self._triton_now)
            sizes = sizes.new_zeros(len(sizes), laid.length).scatter_add(1, laid.slot, sizes)
        return merged, Slot(sizes, laid, self.class_tokens)

    @torch.no_grad()
    def _match(self, i: int, metric: Tensor, length: int) -> Plan:
        """Who merges at block i, class tokens included, by the metric (B, N, D) of the others."""
        depth, remove = i / self.layers, metric.shape[1] - length
        method, parameters = self.config.method_at(depth)
        with full_precision(metric.device.type):
            if self.config.order != "method":
                parent, order = (
                    match(metric, remove, method, self._triton_now, depth=depth, **parameters),
                    None,
                )
            else:
                parent, order = ordered(metric, remove, method, depth=depth, **parameters)
        front = self.class_tokens
        if order is not None:
            order = nn.functional.pad(order + front, (front, 0))
        return plan(widen(parent, front), length + front, order)

    @property
    def _triton_now(self) -> bool:
        """Whether Triton may compute: torch.compile writes kernels of its own."""
        return self.triton and not torch.compiler.is_compiling()


def _recomputing() -> bool:
    """Whether this runs inside a backward pass, where gradient checkpointing runs a block again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
