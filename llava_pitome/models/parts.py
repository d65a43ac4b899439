"""The parts of a transformer block that merging touches, and what is known in front of it."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from llava_pitome.merge.plan import MergePlan, without_prefix_tokens


class BlockParts(NamedTuple):
    """The parts of one pre-norm block, of a tower or a language model, that merging touches.

    Attributes:
        layer: the whole block, (hidden (B, T, D), attention mask or None, ...) to hidden.
        attention: its attention, (hidden (B, T, D), mask or None, ...) to (hidden, weights or None).
        queries: the projection to queries (B, T, heads x channels).
        keys: the projection to keys (B, T, key_heads x channels).
        values: the projection to values.
        out: the projection behind the attention.
        heads: number of attention heads.
        key_heads: number of heads of the keys, of which `heads` is a multiple.
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
    key_heads: int
    norm: nn.Module
    mlp: nn.Module


class LlavaParts(NamedTuple):
    """What a LLaVA has around the blocks of its tower.

    Attributes:
        tower: the vision tower's module, under any wrapper of its own.
        feature_layer: which of the tower's hidden states are the features; several where it is a list.
        first_read: whether their first token is among what the projector is given.
        projector: the module behind the tower.
        llm: the language model, without its head; None where it is not transformers'.
        outer: what is called with prompts and pictures, around both; None as for `llm`.
        image_token: the id that stands in a prompt once for every image token; None where a prompt has one
            mark for each picture, in whose place the model puts what the projector made.
    """

    tower: nn.Module
    feature_layer: int | list[int]
    first_read: bool
    projector: nn.Module
    llm: nn.Module | None
    outer: nn.Module | None
    image_token: int | None


class ModelParts(NamedTuple):
    """The parts of a model that merging needs.

    Attributes:
        model: the model inside all wrappers.
        tower: the vision tower's module.
        blocks: every encoder block of the tower, in order.
        feature: number of blocks whose output counts.
        class_tokens: tokens in front of the patches, 0 or 1.
        patch_size: pixels across one patch.
        patches: patches of an image at the tower's own size.
        sdpa: tells whether the tower's attention is left to torch, so that a kernel may be chosen for it.
        front: class tokens among an image's features, 0 or 1.
        whole: what is around the tower; None for a tower alone.
    """

    model: nn.Module
    tower: nn.Module
    blocks: tuple[BlockParts, ...]
    feature: int
    class_tokens: int
    patch_size: int
    patches: int
    sdpa: Callable[[], bool]
    front: int
    whole: LlavaParts | None


class TokenState(NamedTuple):
    """What is known in front of a block.

    Attributes:
        sizes: (B, T) patches that each token stands for, 1 for a class token.
        merge: the merge of all T tokens that led there, None where none did.
        front: class tokens in front of the patches, which stay where they are.
    """

    sizes: Tensor
    merge: MergePlan | None = None
    front: int = 0

    @property
    def size(self) -> Tensor:
        """Sizes (B, N) without class tokens; where nothing is dropped they add up to the image's patches."""
        return self.sizes[:, self.front :]

    @property
    def plan(self) -> MergePlan | None:
        """The merge without class tokens."""
        return self.merge and without_prefix_tokens(self.merge, self.front)


def hidden_of(args: tuple, kwargs: dict) -> tuple[Tensor, tuple]:
    """The hidden state that a block is called with, and the positional arguments behind it."""
    return (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
