"""Merging in the layers of a vision tower.

A pre-hook on the tower makes the state of a forward pass (tower_state.py) and hands it to every layer as a
keyword argument. The attention function captures keys (attention_capture.py), the hooks of a layer merge
(block_merge.py).
Shapes: B images, T tokens with prefix tokens, N without them, D channels.
"""

from functools import partial
from itertools import pairwise
from operator import index
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_pitome.config import MergeConfig
from llava_pitome.hooks.attention_capture import (
    is_switched,
    needs_attention,
    number_layers,
    switch_attention,
)
from llava_pitome.hooks.block_merge import BlockMerge
from llava_pitome.hooks.call_checks import check_feature_layer
from llava_pitome.hooks.current_pass import (
    STATE,
    current_pass,
    enter_attention,
    enter_pass,
    keep,
    kept,
    push_encoded,
)
from llava_pitome.hooks.hook_owner import HookOwner
from llava_pitome.hooks.image_features import probe
from llava_pitome.hooks.input_resize import resize_images
from llava_pitome.hooks.merge_step import MergePoint, MergeStep
from llava_pitome.hooks.tile_call import TileCall
from llava_pitome.hooks.tower_state import EncodedImages, TowerPass, TowerState
from llava_pitome.merge.plan import MergePlan, gather_tokens
from llava_pitome.models.config_checks import check_tower_attention
from llava_pitome.models.parts import ModelParts, trained_copies

KERNELS = (True, False, "triton")  # values of `kernels`: the faster ones, plain PyTorch alone, Triton too


class VisionTowerHooks(HookOwner):
    """The hooks on a vision tower.

    Attributes:
        handle: the MergeHandle that they belong to.
        step: what merges.
        feature_layers: blocks before each of the hidden states that are joined as features.
        earlier_layers: those of them that are not the last.
        newest: the last forward pass of any thread; None before there was one.
    """

    def __init__(
        self,
        handle: Any,
        parts: ModelParts,
        config: MergeConfig,
        kernels: bool | str = False,
        feature_keys: str | None = None,
        feeds_projector: bool = False,
    ):
        """Prepares the hooks.

        Args:
            handle: the MergeHandle that they belong to.
            parts: of the model.
            config: how to merge.
            kernels: a value of KERNELS.
            feature_keys: what the merge after the projector needs of the feature layer's attention: "keys",
                "attention", or None.
            feeds_projector: whether hooks on the projector read what each forward pass leaves.
        """
        self.handle, self.config, self.kernels = handle, config, kernels
        self.patch_size = parts.patch_size
        self.num_layers = parts.num_feature_layers
        self.feature_layers = parts.feature_layers
        self.num_prefix_tokens = parts.num_prefix_tokens
        self.feature_keys, self.feeds_projector = feature_keys, feeds_projector
        self.earlier_layers = set(self.feature_layers) - {self.num_layers}
        self.step = MergeStep(
            config, parts.num_prefix_tokens, kernels == "triton", keeps_results=bool(self.earlier_layers)
        )
        self._num_blocks = len(parts.blocks)
        self._points = [self._point(i) for i in range(self.num_layers)]
        self._captures = [(config.metric == "keys", needs_attention(point.method)) for point in self._points]
        self._blocks = [
            BlockMerge(config.site, partial(self._state, i), self._merge) for i in range(self.num_layers)
        ]
        self._lengths: dict[int, tuple[int, ...]] = {}
        if parts.llava is None or parts.llava.tiling is None:
            self.lengths(config.patches_at(parts.patches))  # known before anything is compiled
        self.newest: TowerPass | None = None

    def install(self, parts: ModelParts, handles: list[RemovableHandle]) -> None:
        """Registers the hooks, appends each to `handles`, and chooses the attention function."""
        on, tower, blocks = handles.append, parts.tower, parts.blocks
        on(tower.register_forward_pre_hook(self._start, with_kwargs=True))
        on(tower.register_forward_hook(self._end, with_kwargs=True, always_call=True))
        attention = [block.attention for block in blocks[: self.num_layers]]
        if not parts.passes_kwargs:
            for module in (copied for found in attention for copied in trained_copies(found)):
                on(module.register_forward_pre_hook(enter_attention, with_kwargs=True))
        number_layers(attention)
        switch_attention(tower)
        if self.config.merges_in_tower:
            for merge, block in zip(self._blocks, blocks):
                merge.install(block, handles)
            for block in blocks[self.num_layers :]:
                on(block.layer.register_forward_pre_hook(self._skip, with_kwargs=True))
        if self.feeds_projector:
            features = blocks[self.num_layers - 1].layer
            on(features.register_forward_hook(self._probe, with_kwargs=True))

    def forget(self) -> None:
        """Drops the last forward pass."""
        self.newest = None

    @property
    def last(self) -> TowerPass | None:
        """This thread's last forward pass, or, where it ran none, the last one of any thread."""
        return kept("tower_pass", self.handle) or self.newest

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
        layer = kwargs.get("output_hidden_states")
        if self.handle.is_whole and layer is not None and not isinstance(layer, bool):
            check_feature_layer(layer, self.feature_layers, self._num_blocks)  # as generate selects it
        if not is_switched(tower):
            check_tower_attention(tower, self.config)
            switch_attention(tower)
        pixels = args[0] if args else kwargs["pixel_values"]
        if self.config.resize is not None:
            pixels = resize_images(pixels, self.config.resize, self.patch_size)
            kwargs = kwargs | {"interpolate_pos_encoding": True}
        size = self.patch_size  # counts depend on the sides: `index` makes them constants of a graph
        patches = (index(pixels.shape[-2]) // size) * (index(pixels.shape[-1]) // size)
        call: TileCall | None = kept("tiles", self.handle)
        if call is not None:
            pixels = call.tiles_to_encode(pixels)
        kwargs = kwargs | {STATE: TowerState(self, patches, call)}
        return ((pixels, *args[1:]), kwargs) if args else (args, kwargs | {"pixel_values": pixels})

    def _probe(self, _layer: nn.Module, _args: tuple, kwargs: dict, output: Tensor) -> None:
        """After the feature layer: notes by what its features can be recognised."""
        state: TowerState | None = kwargs.get(STATE)
        if state is not None:
            state.probes = probe(output.detach()[:, self.num_prefix_tokens :])

    def _end(self, _tower: nn.Module, _args: tuple, kwargs: dict, output: object) -> None:
        """After the tower, also when it raised: keeps what was merged, and what the projector needs."""
        enter_pass(None)
        if output is None:
            return
        state: TowerState = kwargs[STATE]
        missing = [i for i, tokens in enumerate(state.tokens[1:]) if tokens is None]
        if missing or (self.feeds_projector and state.probes is None):
            raise RuntimeError(
                f"layer {missing[0] if missing else self.num_layers - 1} of the vision tower did not merge: "
                "it was replaced after apply, or does not call transformers' attention interface"
            )
        self._shorten_earlier_features(state, output)
        merged = TowerPass(state.patches, [tokens._replace(result=None) for tokens in state.tokens])
        if self.feeds_projector:
            first = self.feature_layers.index(self.num_layers) * state.probes.shape[2]
            found = EncodedImages(merged, state.probes, *self._of_feature_layer(state), first)
            push_encoded(self.handle, found, len(state.probes))
        self.newest = merged
        keep("tower_pass", self.handle, merged)

    def _shorten_earlier_features(self, state: TowerState, output: object) -> None:
        """Merges the hidden states of earlier feature layers as the layers after them merged their own."""
        hidden_states = getattr(output, "hidden_states", None)
        if hidden_states is None or not self.earlier_layers or not state.merges:
            return
        output.hidden_states = tuple(
            self._merged_since(state, i, x) if i in self.earlier_layers and x is not None else x
            for i, x in enumerate(hidden_states)
        )

    def _merged_since(self, state: TowerState, layer: int, x: Tensor) -> Tensor:
        """The hidden states x (B, T, D) before a layer, with all merges from that layer on."""
        for before, after in pairwise(state.tokens[layer:]):
            if after.merge is not None:
                x = self.step.repeat(x, before, after)
        return x

    def _of_feature_layer(self, state: TowerState) -> tuple[Tensor | None, Tensor | None]:
        """Keys and class attention as in EncodedImages."""
        captured, after = state.captured.get(self.num_layers - 1), state.tokens[-1]
        if self.feature_keys is None or captured is None:
            return None, None
        keys, attention = captured.mean_keys(), None
        if self.feature_keys == "attention":
            sizes = state.attention_sizes(self.num_layers - 1)
            attention = captured.class_attention(self.num_prefix_tokens, sizes)
        if after.merge is not None:
            keys = _averaged(keys, after.merge)
            if attention is not None:
                plan = after.plan
                zeros = attention.new_zeros(len(attention), plan.length)
                attention = zeros.scatter_add(1, plan.slot, attention)
        return keys, attention

    def _merge(self, state: TowerState, x: Tensor) -> Tensor:
        """Merges x (B, T, D) in the layer that runs, and writes the tokens after it."""
        i, prefix = state.layer, self.num_prefix_tokens
        captured = state.captured.get(i)
        metric = x if self.config.metric == "hidden" else captured.mean_keys()
        sizes = state.attention_sizes(i)
        inputs = {"class_attention": lambda: captured.class_attention(prefix, sizes)}
        before, after = state.tokens[i], state.tokens[i + 1]
        merged, state.tokens[i + 1] = self.step.merge(
            x, metric, state.lengths[i + 1], before, self._points[i], inputs, after,
            () if state.call is None else state.call.groups,
        )  # fmt: skip
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


def _averaged(x: Tensor, plan: MergePlan) -> Tensor:
    """The mean of the tokens of each slot."""
    found = gather_tokens(x, plan.kept)
    total = torch.zeros_like(found).scatter_add(1, plan.slot.unsqueeze(2).expand_as(x), x)
    counts = x.new_zeros(found.shape[:2]).scatter_add(1, plan.slot, x.new_ones(plan.slot.shape))
    return total / counts.unsqueeze(2)
