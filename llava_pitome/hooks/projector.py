"""Merging once behind the projector, in front of the language model: one hook on the projector's output.

Shapes: I images, N tokens that the projector makes without those in front, M after the merge, D channels.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_pitome.config import MergeConfig
from llava_pitome.hooks.attention_capture import AttentionCapture, wanted
from llava_pitome.hooks.merge_step import MergeStep
from llava_pitome.hooks.vision_tower import VisionTowerHooks
from llava_pitome.merge.plan import MergePlan, gather_tokens
from llava_pitome.methods import METHODS
from llava_pitome.models.parts import TokenState

DEPTH = 1.0  # behind all of the tower


class ProjectorHooks:
    """The hook on a projector, and what the last forward pass left.

    Attributes:
        slot: what is known of the tokens that reach the language model; None before the first pass.
        merger: what merges.
    """

    def __init__(
        self, projector: nn.Module, tower: VisionTowerHooks, front: int, config: MergeConfig, triton: bool
    ):
        """Prepares the hook.

        Args:
            projector: (I, front + N, channels) to (I, front + N, D).
            tower: what the tower in front of it does.
            front: class tokens that the projector is given too, 0 or 1.
            config: how to merge.
            triton: let kernels written in Triton compute, where they can.
        """
        self.projector, self.tower, self.front, self.config = projector, tower, front, config
        self.by_keys = (config.prefix_metric or METHODS[config.method].prefix_metric) == "keys"
        last = tower.blocks[tower.feature - 1]
        self._look = AttentionCapture(last, wanted(config.method, self.by_keys), tower.class_tokens, _always)
        self.merger = MergeStep(config, front, triton)
        self._handles: list[RemovableHandle] = []
        self.slot: TokenState | None = None

    def install(self) -> None:
        """Registers the hooks; before the tower's own, which may hand shorter projections on."""
        self._handles = [*self._look.install(), self.projector.register_forward_hook(self._merge)]

    def remove(self) -> None:
        """Takes the hooks off and forgets the last forward pass."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._look.forget()
        self.slot = None

    def plans(self) -> list[MergePlan]:
        """The merge of the last forward pass; see `merging.trace`."""
        return [self.slot.plan] if self.slot is not None and self.slot.merge is not None else []

    def _merge(self, _module: nn.Module, _args: tuple, output: Tensor) -> Tensor | None:
        """Behind the projector."""
        here = self._arriving(output)
        count = output.shape[1] - self.front
        length = self.config.prefix_length(count, self.tower.patches or count, self.tower.feature)
        if length == count:
            self.slot = here
            return None
        metric = self._keys() if self.by_keys else output
        way = (self.config.method, self.config.parameters, DEPTH)
        offers = {
            "class_attention": self._class_attention,
            "grid": partial(grid, self.tower.patches, self.config),
        }
        merged, self.slot = self.merger.merge(output, metric, length, here, self.slot, way, offers)
        return merged

    def _arriving(self, output: Tensor) -> TokenState:
        """What the tower left of the sizes; of features that did not come from it, nothing is known."""
        sizes = torch.ones(output.shape[:2], device=output.device)
        left = self.tower.slots[-1]
        if left is not None and left.size.shape == sizes[:, self.front :].shape:
            sizes[:, self.front :] = left.size
        return TokenState(sizes, front=self.front)

    def _keys(self) -> Tensor:
        """The keys (I, front + N, C) of the tower's last block, of the tokens that left it."""
        keys, behind = self._look.key(), self.tower.slots[-1]
        if behind.merge is not None:
            keys = _averaged(keys, behind.merge)
        return keys[:, self.tower.class_tokens - self.front :]

    def _class_attention(self) -> Tensor:
        """The class token's attention (I, N) in the tower's last block, of the tokens that left it."""
        found = self._look.class_attention(self.tower.sizes_in(self.tower.feature - 1))
        behind = self.tower.slots[-1]
        if behind.merge is None:
            return found
        return found.new_zeros(len(found), behind.plan.length).scatter_add(1, behind.plan.slot, found)


def _always() -> bool:
    return True


def _averaged(x: Tensor, plan: MergePlan) -> Tensor:
    """The mean of the tokens of each slot."""
    kept = gather_tokens(x, plan.kept)
    total = torch.zeros_like(kept).scatter_add(1, plan.slot.unsqueeze(2).expand_as(x), x)
    counts = x.new_zeros(kept.shape[:2]).scatter_add(1, plan.slot, x.new_ones(plan.slot.shape))
    return total / counts.unsqueeze(2)


def grid(patches: int, config: MergeConfig) -> tuple[int, int]:
    """Rows and columns of the patches that the tower was given.

    Raises:
        ValueError: they are no square and nothing says what they are.
    """
    side = math.isqrt(patches)
    if config.resize is None and side * side != patches:
        raise ValueError(f"{patches} patches are no square grid, which method {config.method!r} needs")
    return config.resize or (side, side)
