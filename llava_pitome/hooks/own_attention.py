"""Attention that a block leaves to this package, by hooks: the block's own runs on one token.

The block's attention module is handed its first token alone; its projections get all of them back and hand
one on; what the output projection is given is the attention over all tokens, computed here.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_pitome.kernels.cpu_attention import attention


class OwnAttention:
    """The hooks on one block's attention; they do nothing unless `start` was called for this pass."""

    def __init__(self, module: nn.Module, projections: tuple[nn.Module, ...], out: nn.Module, heads: int):
        """Prepares hooks.

        Args:
            module: the attention, (hidden (B, T, D), mask or None, ...) to (hidden, weights or None).
            projections: its projections to queries, keys and values.
            out: its output projection.
            heads: number of heads.
        """
        self.module, self.projections, self.out, self.heads = module, projections, out, heads
        self.stop()

    def install(self) -> list[RemovableHandle]:
        """Registers the hooks, behind those that are to see the whole of keys."""
        handles = [self.module.register_forward_pre_hook(self._enter, with_kwargs=True)]
        for i, projection in enumerate(self.projections):
            handles.append(projection.register_forward_pre_hook(self._give))
            handles.append(projection.register_forward_hook(partial(self._keep, i)))
        handles.append(self.out.register_forward_pre_hook(self._attend))
        return handles

    @property
    def intact(self) -> bool:
        """Whether the hooks still sit on what the attention calls; peft may have put other modules there."""
        own = set(self.module.children())
        return self.out in own and own.issuperset(self.projections)

    def start(self, size: Tensor | None) -> None:
        """Computes the next pass here, with sizes (B, T) in patches or plainly."""
        self._on, self._size = True, size

    def stop(self) -> None:
        """Leaves the next pass to the block, and forgets the last."""
        self._on, self._size, self._hidden = False, None, None
        self._projected: list[Tensor | None] = [None] * 3

    def _enter(self, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """In front of the attention: one token goes in."""
        if not self._on:
            return None
        if args:
            self._hidden = args[0]
            return (args[0][:, :1], *args[1:]), kwargs
        self._hidden = kwargs["hidden_states"]
        return args, kwargs | {"hidden_states": self._hidden[:, :1]}

    def _give(self, _module: nn.Module, _args: Any) -> tuple | None:
        """In front of a projection: all tokens after all."""
        return (self._hidden,) if self._on else None

    def _keep(self, i: int, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        """Behind a projection: keeps what it made, and hands the block one token of it."""
        if not self._on:
            return None
        self._projected[i] = output
        return output[:, :1]

    def _attend(self, _module: nn.Module, _args: Any) -> tuple | None:
        """In front of the output projection: attention over all tokens."""
        if not self._on:
            return None
        found = attention(*self._projected, self.heads, self._size)
        self.stop()
        return (found,)
