"""Merging inside a vision tower, by hooks alone: between attention and MLP, or behind the block.

Slot i holds what is known in front of block i: how many patches each token stands for, and the merge that led
there. Block i reads slot i and writes slot i + 1, so that running a block again (gradient checkpointing,
retries) is harmless.
Shapes: B images, T tokens with the class token, N without it, D channels.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_pitome.config import MergeConfig
from llava_pitome.kernels.attention import pays
from llava_pitome.merging import Plan, merge, plan, size_bias, widen
from llava_pitome.methods import match, ordered
from llava_pitome.places.attention import OwnAttention

KERNELS = (
    True,
    False,
    "triton",
)  # who computes: what is known to be faster, plain PyTorch, Triton on GPUs too


class Block(NamedTuple):
    """The parts of one pre-norm encoder block that merging touches.

    Attributes:
        layer: the whole block, (hidden (B, T, D), attention mask or None, ...) to hidden.
        attention: its attention, (hidden (B, T, D), mask or None, ...) to (hidden, weights or None).
        queries: the projection to queries (B, T, D).
        keys: the projection to keys.
        values: the projection to values.
        out: the projection behind the attention.
        heads: number of attention heads.
        norm: the norm in front of the MLP.
        mlp: the MLP, without its residual.
    """

    layer: nn.Module
    attention: nn.Module
    queries: nn.Module
    keys: nn.Module
    values: nn.Module
    out: nn.Module
    heads: int
    norm: nn.Module
    mlp: nn.Module


class Slot(NamedTuple):
    """What is known in front of a block: sizes (B, N) in patches, and the merge that led there."""

    size: Tensor
    plan: Plan | None = None


class TowerMerging:
    """The hooks on a tower, and what the last forward pass left in its slots.

    Attributes:
        slots: one per block up to the feature layer, and one behind it.
    """

    def __init__(
        self,
        blocks: tuple[Block, ...],
        feature: int,
        class_tokens: int,
        config: MergeConfig,
        kernels: bool | str = False,
        sdpa: bool = True,
    ):
        """Prepares hooks for `blocks`; features are read behind block `feature` - 1.

        Args:
            blocks: every block of the tower, in order.
            feature: number of blocks whose output counts; those behind it feed nothing.
            class_tokens: tokens in front of the patches that never merge, 0 or 1.
            config: how to merge.
            kernels: a value of KERNELS: this package's kernels where they are known to be faster, plain
                PyTorch, or also what is written in Triton.
            sdpa: whether the tower leaves attention to torch, so that a kernel may be chosen for it.
        """
        self.blocks, self.feature, self.class_tokens, self.config = blocks, feature, class_tokens, config
        self.kernels = kernels
        self._attends = bool(kernels) and sdpa
        self._own = [
            OwnAttention(b.attention, (b.queries, b.keys, b.values), b.out, b.heads) for b in blocks[:feature]
        ]
        self._plans: dict[int, tuple[int, ...]] = {}  # lengths by patches
        self._lengths: tuple[int, ...] = ()
        self._handles: list[RemovableHandle] = []
        self._forget()

    def install(self) -> None:
        """Registers the hooks; prepended, because transformers' own record what the block returns."""
        for i, block in enumerate(self.blocks[: self.feature]):
            self._on(block.layer.register_forward_pre_hook(partial(self._enter, i), with_kwargs=True))
            self._on(block.layer.register_forward_hook(partial(self._leave, i), prepend=True))
            if self.config.metric == "keys":
                self._on(block.keys.register_forward_hook(partial(self._keep_keys, i)))
            if self._attends:
                self._handles += self._own[i].install()
            if self.config.site == "attention":
                self._on(block.norm.register_forward_pre_hook(partial(self._before_mlp, i)))
                self._on(block.mlp.register_forward_hook(partial(self._after_mlp, i)))
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
        self.slots: list[Slot | None] = [None] * (self.feature + 1)
        self._keys: list[Tensor | None] = [None] * self.feature
        self._merged: list[Tensor | None] = [None] * self.feature
        self._mlp: list[Tensor | None] = [None] * self.feature
        for own in self._own:
            own.stop()

    def lengths(self, patches: int) -> tuple[int, ...]:
        """Patches before the first block and after each one, up to the feature layer."""
        if patches not in self._plans:
            self._plans[patches] = self.config.lengths(patches, self.feature)
        return self._plans[patches]

    def plans(self) -> list[Plan]:
        """The merges of the last forward pass, in order; see `merging.trace`."""
        return [slot.plan for slot in self.slots if slot is not None and slot.plan is not None]

    def merge_alone(self, i: int, keys: Tensor, x: Tensor) -> Tensor:
        """What merging at block i costs, for measuring: from its keys (B, T, D) to the merged x (B, T, D)."""
        if not self._merges(i):
            return x
        self._keep_keys(i, self.blocks[i].keys, (), keys)
        return self._merge(i, x)

    def _on(self, handle: RemovableHandle) -> None:
        self._handles.append(handle)

    def _merges(self, i: int) -> bool:
        return self._lengths[i] != self._lengths[i + 1]

    def _enter(self, i: int, _layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """In front of block i: starts the slots, hands sizes on, and biases attention by log size."""
        hidden, rest = _hidden(args, kwargs)
        if i == 0:
            count = hidden.shape[1] - self.class_tokens
            self._lengths = self.lengths(count)
            self.slots[0] = Slot(torch.ones(hidden.shape[0], count, device=hidden.device))
        if not self._merges(i):
            self.slots[i + 1] = Slot(self.slots[i].size)
        weighted = self.config.proportional and self._lengths[i] != self._lengths[0]
        mask = rest[0] if rest else kwargs.get("attention_mask")
        self._own[i].stop()
        if self._attends_here(hidden, mask):
            self._own[i].start(self._whole(self.slots[i].size) if weighted else None)
        elif weighted:
            bias = size_bias(self._whole(self.slots[i].size.to(hidden.device)), hidden.dtype)
            bias = bias if mask is None else mask + bias
            return ((hidden, bias, *rest[1:]), kwargs) if rest else (args, kwargs | {"attention_mask": bias})
        return None

    def _attends_here(self, hidden: Tensor, mask: Tensor | None) -> bool:
        """Whether this package's attention takes the block's place: never where nothing merges."""
        return (
            self._attends
            and mask is None
            and self._lengths[0] != self._lengths[-1]
            and not torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
            and pays(hidden)
        )

    def _whole(self, size: Tensor) -> Tensor:
        """Sizes (B, T) of all tokens from those of the patches (B, N): a class token is one."""
        return nn.functional.pad(size, (self.class_tokens, 0), value=1)

    def _keep_keys(self, i: int, _module: nn.Module, _args: tuple, keys: Tensor) -> None:
        """Behind the key projection: one key a token, the mean over the heads."""
        if self._merges(i):
            heads = keys.detach().unflatten(-1, (self.blocks[i].heads, -1))
            self._keys[i] = heads.mean(-2, dtype=torch.promote_types(keys.dtype, torch.float32))

    def _before_mlp(self, i: int, _module: nn.Module, args: tuple) -> tuple | None:
        """In front of the norm: what goes into the MLP is merged."""
        if not self._merges(i):
            return None
        self._merged[i] = self._merge(i, args[0])
        return (self._merged[i], *args[1:])

    def _after_mlp(self, i: int, _module: nn.Module, _args: tuple, output: Tensor) -> Tensor | None:
        """Behind the MLP: keeps its output, and hands the block a zero to add to its unmerged residual."""
        if not self._merges(i):
            return None
        self._mlp[i] = output
        return output.new_zeros(())

    def _leave(self, i: int, _layer: nn.Module, _args: tuple, output: Tensor) -> Tensor | None:
        """Behind block i: the merged hidden state stands where the block's own was."""
        if not self._merges(i):
            return None
        if self.config.site == "block":
            merged = self._merge(i, output)
        else:
            merged = self._merged[i] + self._mlp[i]
            if output.requires_grad and not merged.requires_grad:
                raise RuntimeError(
                    "gradient checkpointing with use_reentrant=True hides the merged tokens from autograd; "
                    "use gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
        self._merged[i] = self._mlp[i] = self._keys[i] = None
        return merged

    def _merge(self, i: int, x: Tensor) -> Tensor:
        """Merges x (B, T, D) at block i and writes slot i + 1."""
        if self.config.metric == "hidden":
            metric = x[:, self.class_tokens :].detach().float()
        else:
            metric = self._keys[i][:, self.class_tokens :]
        laid = self._match(i, metric)
        if _recomputing() and not self._same(i, laid):
            raise RuntimeError(
                "gradient checkpointing ran a block again after another forward pass changed what merges; "
                "with checkpointing on, go backward before the next forward"
            )
        size = self.slots[i].size.to(x.device)
        weight = self._whole(size)
        if not self.config.size_weighted:
            weight = torch.ones_like(weight)
        merged, sizes = merge(x, weight, widen(laid, self.class_tokens), self._triton)
        if self.config.size_weighted:
            sizes = sizes[:, self.class_tokens :]
        else:
            sizes = size.new_zeros(len(size), laid.length).scatter_add(1, laid.slot, size)
        self.slots[i + 1] = Slot(sizes, laid)
        return merged

    @property
    def _triton(self) -> bool:
        """Whether Triton may compute: torch.compile writes kernels of its own."""
        return self.kernels == "triton" and not torch.compiler.is_compiling()

    @torch.no_grad()
    def _match(self, i: int, metric: Tensor) -> Plan:
        """Who merges at block i, by the metric (B, N, D)."""
        depth = i / len(self.blocks)
        method, parameters = self.config.method_at(depth)
        remove, length = self._lengths[i] - self._lengths[i + 1], self._lengths[i + 1]
        with _full_precision(metric.device.type):
            if self.config.order == "method":
                parent, order = ordered(metric, remove, method, depth=depth, **parameters)
                return plan(parent, length, order)
            return plan(match(metric, remove, method, self._triton, depth=depth, **parameters), length)

    def _same(self, i: int, laid: Plan) -> bool:
        """Whether the last forward pass merged alike at block i."""
        before = self.slots[i + 1]
        return before is not None and before.plan is not None and torch.equal(before.plan.slot, laid.slot)

    def _idle(self, _layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """In front of a block behind the feature layer: one token, since nothing reads what comes of it."""
        if self._lengths[0] == self._lengths[-1]:
            return None
        hidden, rest = _hidden(args, kwargs)
        if args:
            return (hidden[:, :1], *rest), kwargs
        return args, kwargs | {"hidden_states": hidden[:, :1]}


def _full_precision(kind: str) -> AbstractContextManager:
    """Autocast off where it is on, since it would match in half precision."""
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def installed(blocks: tuple[Block, ...]) -> TowerMerging | None:
    """The hooks that are on a tower, or None; a copy of a merging model carries a copy of them."""
    for hook in blocks[0].layer._forward_pre_hooks.values():
        if isinstance(hook, partial) and isinstance(getattr(hook.func, "__self__", None), TowerMerging):
            return hook.func.__self__
    return None


def _recomputing() -> bool:
    """Whether this runs inside a backward pass, where gradient checkpointing runs a block again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _hidden(args: tuple, kwargs: dict) -> tuple[Tensor, tuple]:
    """The hidden state that a block is called with, and the positional arguments behind it."""
    return (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
