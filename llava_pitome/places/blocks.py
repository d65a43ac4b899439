"""The parts of an encoder block that merging touches, and what is known in front of it."""

from typing import NamedTuple

from torch import Tensor, nn

from llava_pitome.merging import Plan, narrow


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
    """What is known in front of a block.

    Attributes:
        sizes: (B, T) patches that each token stands for, 1 for a class token.
        merge: the merge of all T tokens that led there, None where none did.
        front: class tokens in front of the patches, which stay where they are.
    """

    sizes: Tensor
    merge: Plan | None = None
    front: int = 0

    @property
    def size(self) -> Tensor:
        """Sizes (B, N) without class tokens; they add up to the patches of the image."""
        return self.sizes[:, self.front :]

    @property
    def plan(self) -> Plan | None:
        """The merge without class tokens."""
        return self.merge and narrow(self.merge, self.front)


def hidden_of(args: tuple, kwargs: dict) -> tuple[Tensor, tuple]:
    """The hidden state that a block is called with, and the positional arguments behind it."""
    return (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
