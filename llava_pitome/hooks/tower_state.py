"""The state of one forward pass through a vision tower, and what is left of it.

Layer i reads entry i of the state and writes entry i + 1, so that running a layer again (gradient
checkpointing, retries) is harmless.
Shapes: B images, T tokens with prefix tokens, N without them, H heads, C channels a head, K tokens compared.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava_pitome.hooks.attention_capture import CapturedAttention
from llava_pitome.hooks.block_merge import REPLACED
from llava_pitome.hooks.current_pass import enter_pass
from llava_pitome.hooks.merge_step import TokenState
from llava_pitome.merge.plan import MergePlan


class TowerPass:
    """What one forward pass through a vision tower merged.

    Attributes:
        patches: of an image, before the first layer.
        tokens: the tokens before each layer up to the feature layer, and after the last.
    """

    def __init__(self, patches: int, tokens: Sequence[TokenState | None]):
        """Keeps both."""
        self.patches, self.tokens = patches, tuple(tokens)

    def plans(self) -> list[MergePlan]:
        """The merges, in order, without prefix tokens."""
        return [tokens.plan for tokens in self.tokens if tokens is not None and tokens.merge is not None]


class EncodedImages(NamedTuple):
    """What a vision tower leaves for the merge after the projector.

    Attributes:
        tower: the merges of the pass.
        probes: (B, K, D) of the last feature layer, by which the projector recognises the features.
        keys: (B, T, C) of the feature layer, the mean of the heads and of the tokens that merged there; None
            where they are not needed.
        class_attention: (B, N) of the feature layer, summed over the tokens that merged there; None as for
            `keys`.
        first_channel: of that layer among the features, where those of several layers are joined.
    """

    tower: TowerPass
    probes: Tensor
    keys: Tensor | None
    class_attention: Tensor | None
    first_channel: int = 0


class TowerState:
    """The state of one forward pass through a vision tower.

    Attributes:
        owner: the VisionTowerHooks that made it.
        patches: of an image, before the first layer.
        call: the TileCall whose tiles are encoded; None where an image is one tile.
        lengths: patches before the first layer and after each, up to the feature layer.
        tokens: the tokens before each of these layers, and after the last.
        captured: what the attention of a layer computed, until the merge that needs it.
        pending: values that the hooks of a block pass to each other.
        probes: of the features, once the feature layer has run.
    """

    def __init__(self, owner: Any, patches: int, call: Any = None):
        """Starts a forward pass.

        Args:
            owner: the VisionTowerHooks that makes it.
            patches: of an image, before the first layer.
            call: the TileCall whose tiles are encoded; None where an image is one tile.
        """
        self.owner, self.patches, self.call = owner, patches, call
        self.lengths = owner.lengths(patches) if call is None else call.schedule.lengths
        self.tokens: list[TokenState | None] = [None] * len(self.lengths)
        self.captured: dict[int, CapturedAttention] = {}
        self.pending: dict[str, Tensor] = {}
        self.probes: Tensor | None = None
        self.layer = 0

    @property
    def merges(self) -> bool:
        """Whether any layer merges in this forward pass."""
        return self.lengths[0] != self.lengths[-1]

    @property
    def uses_kernel(self) -> bool:
        """Whether this package's attention kernel may compute: never where nothing merges."""
        return bool(self.owner.kernels) and self.merges

    def merges_at(self, layer: int) -> bool:
        """Whether a layer merges in this forward pass."""
        return self.lengths[layer] != self.lengths[layer + 1]

    def before_attention(self, layer: int, query: Tensor, key: Tensor) -> Tensor | None:
        """Captures what merges need, and returns the log sizes (B, T) that weight the layer's attention.

        Args:
            layer: its index.
            query: (B, H, T, C).
            key: (B, H, T, C).
        """
        enter_pass(self)
        self.layer = layer
        if layer == 0:  # and not where the pass starts, which torch.compile would make a graph of its own
            ones = torch.ones(len(query), query.shape[2], device=query.device)
            padding = None if self.call is None else self.call.padding(query.device)
            self.tokens[0] = TokenState(ones, num_prefix_tokens=self.owner.num_prefix_tokens, padding=padding)
        if self.tokens[layer] is None:
            raise RuntimeError(REPLACED.format(f"layer {layer - 1} of the vision tower"))
        if not self.merges_at(layer):
            self.tokens[layer + 1] = self.tokens[layer]._replace(merge=None, result=None)
        keys, queries = self.owner.captures(layer, self.merges_at(layer))
        if keys or queries:
            self.captured[layer] = CapturedAttention(query if queries else None, key)
        sizes = self.attention_sizes(layer)
        return None if sizes is None else sizes.to(query.device).log()

    def attention_sizes(self, layer: int) -> Tensor | None:
        """The sizes (B, T) that weight a layer's attention; None where it is not weighted."""
        weighted = self.owner.config.proportional and self.lengths[layer] != self.lengths[0]
        return self.tokens[layer].sizes if weighted else None
