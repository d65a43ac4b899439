"""Merging inside a vision tower, by hooks alone: between attention and MLP, or behind the block.

Slot i holds what is known in front of block i: how many patches each token stands for, and the merge that led
there. Block i reads slot i and writes slot i + 1, so that running a block again (gradient checkpointing,
retries) is harmless.
Shapes: B images, T tokens with the class token, N without it, D channels.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_pitome.config import MergeConfig
from llava_pitome.hooks import attention_capture as looks
from llava_pitome.hooks.block_merge import BlockMerge
from llava_pitome.hooks.merge_step import MergeStep
from llava_pitome.hooks.own_attention import OwnAttention
from llava_pitome.kernels.cpu_attention import pays
from llava_pitome.merge.plan import MergePlan, log_size_bias
from llava_pitome.models.parts import BlockParts, TokenState, hidden_of

KERNELS = (True, False, "triton")  # what is known to be faster, plain PyTorch alone, and Triton too


class VisionTowerHooks:
    """The hooks on a tower, and what the last forward pass left in its slots.

    Attributes:
        slots: one per block up to the feature layer, and one behind it.
        merger: what merges, wherever it is.
    """

    def __init__(
        self,
        blocks: tuple[BlockParts, ...],
        feature: int,
        class_tokens: int,
        config: MergeConfig,
        kernels: bool | str = False,
        sdpa: Callable[[], bool] = bool,
    ):
        """Prepares hooks for `blocks`; features are read behind block `feature` - 1.

        Args:
            blocks: every block of the tower, in order.
            feature: number of blocks whose output counts; those behind it feed nothing.
            class_tokens: tokens in front of the patches that never merge, 0 or 1.
            config: how to merge.
            kernels: a value of KERNELS: this package's kernels where they are known to be faster, plain
                PyTorch, or also what is written in Triton.
            sdpa: tells whether the tower leaves attention to torch, so that a kernel may be chosen for it.
        """
        self.blocks, self.feature, self.class_tokens, self.config = blocks, feature, class_tokens, config
        self.kernels = kernels
        self.merger = MergeStep(config, class_tokens, kernels == "triton")
        self._sdpa = sdpa
        self._looks = [self._look(i, block) for i, block in enumerate(blocks[:feature])]
        self._inside = [
            BlockMerge(block, config.site, partial(self._merges, i), partial(self._merge, i))
            for i, block in enumerate(blocks[:feature])
        ]
        self._own = [
            OwnAttention(b.attention, (b.queries, b.keys, b.values), b.out, b.heads) for b in blocks[:feature]
        ]
        self._plans: dict[int, tuple[int, ...]] = {}  # lengths by patches
        self._lengths: tuple[int, ...] = ()
        self._handles: list[RemovableHandle] = []
        self._forget()

    def _look(self, i: int, block: BlockParts) -> looks.AttentionCapture:
        method = self._way(i)[0]
        wanted = looks.wanted(method, self.config.metric == "keys")
        return looks.AttentionCapture(block, wanted, self.class_tokens, partial(self._merges, i))

    def install(self) -> None:
        """Registers the hooks."""
        for i, block in enumerate(self.blocks[: self.feature]):
            self._on(block.layer.register_forward_pre_hook(partial(self._enter, i), with_kwargs=True))
            self._handles += self._looks[i].install()
            if self.kernels:
                self._handles += self._own[i].install()
            self._handles += self._inside[i].install()
        for block in self.blocks[self.feature :]:
            self._on(block.layer.register_forward_pre_hook(self._idle, with_kwargs=True))

    def remove(self) -> None:
        """Takes every hook off and forgets the last forward pass."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def _forget(self) -> None:
        """Empties every place in which a forward pass leaves something."""
        self.slots: list[TokenState | None] = [None] * (self.feature + 1)
        for part in (*self._looks, *self._inside):
            part.forget()
        for own in self._own:
            own.stop()

    def lengths(self, patches: int) -> tuple[int, ...]:
        """Patches before the first block and after each one, up to the feature layer."""
        if patches not in self._plans:
            self._plans[patches] = self.config.lengths(patches, self.feature)
        return self._plans[patches]

    def plans(self) -> list[MergePlan]:
        """The merges of the last forward pass, in order; see `merging.trace`."""
        return [slot.plan for slot in self.slots if slot is not None and slot.merge is not None]

    @property
    def patches(self) -> int:
        """Patches in front of the first block, in the last forward pass; 0 before there was one."""
        return self._lengths[0] if self._lengths else 0

    def merge_alone(self, i: int, keys: Tensor, x: Tensor) -> Tensor:
        """What merging at block i costs, for measuring: from its keys (B, T, D) to the merged x (B, T, D).

        Raises:
            RuntimeError: the method needs more than the keys.
        """
        if not self._merges(i):
            return x
        self._looks[i].see(keys)
        return self._merge(i, x)

    def _on(self, handle: RemovableHandle) -> None:
        self._handles.append(handle)

    def _way(self, i: int) -> tuple:
        """The method at block i, its parameters, and how deep the block lies."""
        depth = i / len(self.blocks)
        return (*self.config.method_at(depth), depth)

    def _merges(self, i: int) -> bool:
        return self._lengths[i] != self._lengths[i + 1]

    def _enter(self, i: int, _layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """In front of block i: starts the slots, hands sizes on, and biases attention by log size."""
        hidden, rest = hidden_of(args, kwargs)
        if i == 0:
            self._lengths = self.lengths(hidden.shape[1] - self.class_tokens)
            ones = torch.ones(hidden.shape[:2], device=hidden.device)
            self.slots[0] = TokenState(ones, front=self.class_tokens)
        if not self._merges(i):
            self.slots[i + 1] = self.slots[i]._replace(merge=None)
        sizes = self.sizes_in(i)
        sizes = None if sizes is None else sizes.to(hidden.device)
        mask = rest[0] if rest else kwargs.get("attention_mask")
        self._own[i].stop()
        if self._attends_here(i, hidden, mask):
            self._own[i].start(sizes)
        elif sizes is not None:
            bias = log_size_bias(sizes, hidden.dtype)
            bias = bias if mask is None else mask + bias
            return ((hidden, bias, *rest[1:]), kwargs) if rest else (args, kwargs | {"attention_mask": bias})
        return None

    def sizes_in(self, i: int) -> Tensor | None:
        """The sizes (B, T) that weigh block i's attention; None where it is not weighed."""
        weighted = self.config.proportional and self._lengths[i] != self._lengths[0]
        return self.slots[i].sizes if weighted else None

    def _attends_here(self, i: int, hidden: Tensor, mask: Tensor | None) -> bool:
        """Whether this package's attention takes the place of block i's: never where nothing merges."""
        return (
            bool(self.kernels)
            and mask is None
            and self._lengths[0] != self._lengths[-1]
            and not torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
            and not self.blocks[i].attention.training  # dropout
            and pays(hidden)
            and self._sdpa()
            and self._own[i].intact
        )

    def _merge(self, i: int, x: Tensor) -> Tensor:
        """Merges x (B, T, D) at block i and writes slot i + 1."""
        seen, sizes = self._looks[i], self.sizes_in(i)
        metric = x if self.config.metric == "hidden" else seen.key()
        offers = {"class_attention": partial(seen.class_attention, sizes)}
        length, here, last = self._lengths[i + 1], self.slots[i], self.slots[i + 1]
        merged, self.slots[i + 1] = self.merger.merge(x, metric, length, here, last, self._way(i), offers)
        return merged

    def _idle(self, _layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """In front of a block behind the feature layer: one token, since nothing reads what comes of it."""
        if self._lengths[0] == self._lengths[-1]:
            return None
        hidden, rest = hidden_of(args, kwargs)
        if args:
            return (hidden[:, :1], *rest), kwargs
        return args, kwargs | {"hidden_states": hidden[:, :1]}
