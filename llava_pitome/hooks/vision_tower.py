"""Merging in the layers of a vision tower.

A pre-hook on the tower makes the state of a forward pass and hands it to every layer as a keyword argument.
Layer i reads entry i of the state and writes entry i + 1, so that running a layer again (gradient
checkpointing, retries) is harmless. The attention function captures keys (attention_capture.py), the hooks
of a layer merge (block_merge.py).
Shapes: B images, T tokens with prefix tokens, N without them, D channels.
"""

from functools import partial
from operator import index

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_pitome.config import MergeConfig
from llava_pitome.hooks.attention_capture import AttentionSwitch, CapturedAttention, needs_attention
from llava_pitome.hooks.block_merge import BlockMerge
from llava_pitome.hooks.input_resize import resize_images
from llava_pitome.hooks.merge_step import (
    STATE,
    MergePoint,
    MergeStep,
    TokenState,
    current_pass,
    enter_pass,
    keep_encoded,
)
from llava_pitome.merge.plan import MergePlan
from llava_pitome.models.hf_llava import check_tower_attention
from llava_pitome.models.parts import ModelParts

KERNELS = (True, False, "triton")  # values of `kernels`: the faster ones, plain PyTorch alone, Triton too


class TowerState:
    """The state of one forward pass through a vision tower.

    Attributes:
        owner: the hooks that made it.
        patches: of an image, before the first layer.
        lengths: patches before the first layer and after each, up to the feature layer.
        tokens: the tokens before each of these layers, and after the last.
        captured: what the attention of a layer computed, until the merge that needs it.
        pending: values that the hooks of a block pass to each other.
    """

    def __init__(self, owner: "VisionTowerHooks", patches: int):
        """Starts a forward pass."""
        self.owner, self.patches, self.lengths = owner, patches, owner.lengths(patches)
        self.tokens: list[TokenState | None] = [None] * len(self.lengths)
        self.captured: dict[int, CapturedAttention] = {}
        self.pending: dict[str, Tensor] = {}
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
            self.tokens[0] = TokenState(ones, num_prefix_tokens=self.owner.num_prefix_tokens)
        if not self.merges_at(layer):
            self.tokens[layer + 1] = self.tokens[layer]._replace(merge=None)
        keys, queries = self.owner.captures(layer, self.merges_at(layer))
        if keys or queries:
            self.captured[layer] = CapturedAttention(query if queries else None, key)
        sizes = self.attention_sizes(layer)
        return None if sizes is None else sizes.to(query.device).log()

    def attention_sizes(self, layer: int) -> Tensor | None:
        """The sizes (B, T) that weight a layer's attention; None where it is not weighted."""
        weighted = self.owner.config.proportional and self.lengths[layer] != self.lengths[0]
        return self.tokens[layer].sizes if weighted else None

    def plans(self) -> list[MergePlan]:
        """The merges of this forward pass, in order, without prefix tokens."""
        return [tokens.plan for tokens in self.tokens if tokens is not None and tokens.merge is not None]


class VisionTowerHooks:
    """The hooks on a vision tower.

    Attributes:
        last: the state of the last forward pass; None before there was one.
        step: what merges.
    """

    def __init__(
        self,
        parts: ModelParts,
        config: MergeConfig,
        kernels: bool | str = False,
        feature_keys: str | None = None,
        feeds_projector: bool = False,
    ):
        """Prepares the hooks.

        Args:
            parts: of the model.
            config: how to merge.
            kernels: a value of KERNELS.
            feature_keys: what the merge after the projector needs of the feature layer's attention: "keys",
                "attention", or None.
            feeds_projector: whether hooks on the projector read the state of each forward pass.
        """
        self.config, self.kernels = config, kernels
        self.patch_size = parts.patch_size
        self.num_layers = parts.num_feature_layers
        self.num_prefix_tokens = parts.num_prefix_tokens
        self.feature_keys, self.feeds_projector = feature_keys, feeds_projector
        self.step = MergeStep(config, parts.num_prefix_tokens, kernels == "triton")
        self.attention = AttentionSwitch(
            parts.tower.config,
            [block.attention for block in parts.blocks[: self.num_layers]],
            parts.passes_kwargs,
        )
        self._later_layers = [block.layer for block in parts.blocks[self.num_layers :]]
        self._num_blocks = len(parts.blocks)
        self._points = [self._point(i) for i in range(self.num_layers)]
        self._captures = [(config.metric == "keys", needs_attention(point.method)) for point in self._points]
        self._blocks = [
            BlockMerge(block, config.site, partial(self._state, i), self._merge)
            for i, block in enumerate(parts.blocks[: self.num_layers])
        ]
        seen = config.patches_at(parts.patches)
        self._lengths = {seen: config.lengths(seen, self.num_layers)}  # known before anything is compiled
        self._handles: list[RemovableHandle] = []
        self.last: TowerState | None = None

    def install(self, tower: nn.Module) -> None:
        """Registers the hooks and the attention function.

        The tower is not kept, so that a model that merges can be freed.
        """
        on = self._handles.append
        on(tower.register_forward_pre_hook(self._start, with_kwargs=True))
        on(tower.register_forward_hook(self._end, with_kwargs=True, always_call=True))
        self.attention.install()
        if not self.config.merges_in_tower:
            return
        for block in self._blocks:
            block.install(self._handles)
        for layer in self._later_layers:
            on(layer.register_forward_pre_hook(self._skip, with_kwargs=True))

    def remove(self) -> None:
        """Removes all of it, and drops the last forward pass."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.attention.remove()
        self.last = None
        keep_encoded(None)

    def lengths(self, patches: int) -> tuple[int, ...]:
        """Patches before the first layer and after each, up to the feature layer."""
        if patches not in self._lengths:
            self._lengths[patches] = self.config.lengths(patches, self.num_layers)
        return self._lengths[patches]

    def captures(self, layer: int, merges: bool) -> tuple[bool, bool]:
        """Whether keys, and queries too, of a layer are needed after its attention."""
        keys, queries = self._captures[layer] if merges else (False, False)
        if layer == self.num_layers - 1 and self.feature_keys is not None:
            keys, queries = True, queries or self.feature_keys == "attention"
        return keys or queries, queries

    def _point(self, layer: int) -> MergePoint:
        depth = layer / self._num_blocks
        return MergePoint("tower", layer, depth, *self.config.method_at(depth))

    def _state(self, layer: int) -> TowerState | None:
        """The state of the forward pass that runs, if this layer merges in it."""
        state = current_pass(self)
        return state if state is not None and state.layer == layer and state.merges_at(layer) else None

    def _start(self, tower: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before the tower: resizes the images and starts a forward pass."""
        if not self.attention.is_installed:
            check_tower_attention(tower, self.config)
            self.attention.install()
        pixels = args[0] if args else kwargs["pixel_values"]
        if self.config.resize is not None:
            pixels = resize_images(pixels, self.config.resize, self.patch_size)
            kwargs = kwargs | {"interpolate_pos_encoding": True}
        size = (
            self.patch_size
        )  # of the sides, `index` makes constants under torch.compile: counts depend on them
        patches = (index(pixels.shape[-2]) // size) * (index(pixels.shape[-1]) // size)
        kwargs = kwargs | {STATE: TowerState(self, patches)}
        return ((pixels, *args[1:]), kwargs) if args else (args, kwargs | {"pixel_values": pixels})

    def _end(self, _tower: nn.Module, _args: tuple, kwargs: dict, output: object) -> None:
        """After the tower, also when it raised: keeps the state for what follows."""
        enter_pass(None)
        if output is None:
            return
        state: TowerState = kwargs[STATE]
        if state.tokens[-1] is None:
            raise RuntimeError(
                "a layer of the vision tower did not call transformers' attention interface, so that its "
                "tokens could not merge"
            )
        if self.feature_keys is None:
            state.captured.clear()
        if self.feeds_projector:
            keep_encoded(state)
        self.last = state

    def _merge(self, state: TowerState, x: Tensor) -> Tensor:
        """Merges x (B, T, D) in the layer that runs, and writes the tokens after it."""
        i, prefix = state.layer, self.num_prefix_tokens
        captured = state.captured.get(i)
        metric = x if self.config.metric == "hidden" else captured.mean_keys()
        sizes = state.attention_sizes(i)
        inputs = {"class_attention": lambda: captured.class_attention(prefix, sizes)}
        before, after = state.tokens[i], state.tokens[i + 1]
        merged, state.tokens[i + 1] = self.step.merge(
            x, metric, state.lengths[i + 1], before, self._points[i], inputs, after
        )
        if i < self.num_layers - 1:
            state.captured.pop(i, None)
        return merged

    def _skip(self, _layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before a layer after the feature layer: one token, since nothing reads its output."""
        state = kwargs.get(STATE)
        if state is None or not state.merges:
            return None
        if args:
            return (args[0][:, :1], *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"][:, :1]}
