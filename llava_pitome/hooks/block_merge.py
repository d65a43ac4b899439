"""A merge inside a block, by hooks alone: between attention and MLP, or behind the block.

Between them: what goes into the MLP is merged in front of its norm, the MLP's output is kept and the block
handed a zero to add to its own, longer residual, and the block's output is replaced by the merged sum.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_pitome.models.parts import BlockParts


class BlockMerge:
    """The hooks on one block; they do nothing in a pass in which the block does not merge."""

    def __init__(
        self, block: BlockParts, site: str, merges: Callable[[], bool], merge: Callable[[Tensor], Tensor]
    ):
        """Prepares hooks.

        Args:
            block: where to merge.
            site: "attention", between attention and MLP, or "block", behind it.
            merges: whether it does in this pass.
            merge: from the hidden state (B, T, D) to the merged one.
        """
        self.block, self.site, self.merges, self.merge = block, site, merges, merge
        self.forget()

    def forget(self) -> None:
        """Drops what a pass that did not come to its end may have left."""
        self._merged: Tensor | None = None
        self._mlp: Tensor | None = None

    def install(self) -> list[RemovableHandle]:
        """Registers the hooks; prepended, because transformers' own record what the block returns."""
        handles = [self.block.layer.register_forward_hook(self._leave, prepend=True)]
        if self.site == "attention":
            handles.append(self.block.norm.register_forward_pre_hook(self._before_mlp))
            handles.append(self.block.mlp.register_forward_hook(self._after_mlp))
        return handles

    def _before_mlp(self, _module: nn.Module, args: tuple) -> tuple | None:
        """In front of the norm: what goes into the MLP is merged."""
        if not self.merges():
            return None
        self._merged = self.merge(args[0])
        return (self._merged, *args[1:])

    def _after_mlp(self, _module: nn.Module, _args: tuple, output: Tensor) -> Tensor | None:
        """Behind the MLP: keeps its output, and hands the block a zero to add to its unmerged residual."""
        if not self.merges():
            return None
        self._mlp = output
        return output.new_zeros(())

    def _leave(self, _layer: nn.Module, _args: tuple, output: Tensor) -> Tensor | None:
        """Behind the block: the merged hidden state stands where the block's own was."""
        if not self.merges():
            return None
        if self.site == "block":
            return self.merge(output)
        merged = self._merged + self._mlp
        if output.requires_grad and not merged.requires_grad:
            raise RuntimeError(
                "gradient checkpointing with use_reentrant=True hides the merged tokens from autograd; "
                "use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        self.forget()
        return merged
