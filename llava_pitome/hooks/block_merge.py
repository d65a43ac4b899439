"""A merge inside a transformer block: between attention and MLP, or after the block.

Between attention and MLP: a pre-hook on the second norm merges what goes into the MLP, a hook on the MLP
keeps its output and hands the block a zero to add to the longer residual, and a hook on the block returns
the merged sum.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_pitome.hooks.hook_owner import HookOwner
from llava_pitome.models.parts import BlockParts, trained_copies

REPLACED = (
    "{} was replaced after apply, so that its tokens could not merge as the others do: make such changes "
    "first, or apply again"
)


class BlockMerge(HookOwner):
    """The hooks of one block. They do nothing in a forward pass in which the block does not merge."""

    def __init__(self, site: str, state: Callable[[], Any], merge: Callable[[Any, Tensor], Tensor]):
        """Prepares the hooks.

        Args:
            site: "attention", between attention and MLP, or "block", after it.
            state: the state of this forward pass, where the block merges in it; None otherwise. Its
                `pending` is a dict for values that the hooks of a block pass to each other.
            merge: from the state and hidden states (B, T, D) to merged ones.
        """
        self.site, self.state, self.merge = site, state, merge

    def install(self, block: BlockParts, handles: list[RemovableHandle]) -> None:
        """Registers the hooks on a block, and appends each to `handles`.

        That on the block comes first among the block's own, because transformers' hooks record its output.
        """
        for layer in trained_copies(block.layer):
            handles.append(layer.register_forward_hook(self._after_block, prepend=True))
        if self.site == "attention":
            handles.append(block.norm.register_forward_pre_hook(self._before_norm))
            handles.append(block.mlp.register_forward_hook(self._after_mlp))

    def _before_norm(self, _module: nn.Module, args: tuple) -> tuple | None:
        state = self.state()
        if state is None:
            return None
        merged = self.merge(state, args[0])
        state.pending["merged"] = merged
        return (merged, *args[1:])

    def _after_mlp(self, _module: nn.Module, _args: tuple, output: Tensor) -> Tensor | None:
        state = self.state()
        if state is None:
            return None
        state.pending["mlp"] = output
        return output.new_zeros(())

    def _after_block(self, _layer: nn.Module, _args: tuple, output: Tensor) -> Tensor | None:
        state = self.state()
        if state is None:
            return None
        if self.site == "block":
            return self.merge(state, output)
        merged, mlp = state.pending.pop("merged", None), state.pending.pop("mlp", None)
        if merged is None or mlp is None:
            raise RuntimeError(REPLACED.format("the norm or the MLP of a layer that is to merge"))
        merged = merged + mlp
        if output.requires_grad and not merged.requires_grad:
            raise RuntimeError(
                "gradient checkpointing with use_reentrant=True hides the merged tokens from autograd; "
                "use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        return merged
