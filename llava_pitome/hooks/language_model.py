"""Merging image tokens inside the language model during prefill.

A layer that merges does so after its own attention, so that the KV cache of later layers is really shorter.
The cache of the first layer is never changed: positions, masks and `get_seq_length` are read from it. The
state of a forward pass (forward_state.py) is made before the language model and handed to its layers as a
keyword argument.
Shapes: B prompts, T tokens, I images over all prompts, n tokens an image, D channels.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_pitome import token_schedule
from llava_pitome.config import MergeConfig
from llava_pitome.hooks import kv_cache, prompt_layout
from llava_pitome.hooks.attention_capture import AttentionSwitch
from llava_pitome.hooks.block_merge import BlockMerge
from llava_pitome.hooks.forward_state import ForwardState
from llava_pitome.hooks.image_features import ImageFeatures
from llava_pitome.hooks.kv_cache import CacheSettings, SegmentCache
from llava_pitome.hooks.llm_attention_capture import LayerAttention, ProjectionCapture
from llava_pitome.hooks.merge_step import STATE, MergePoint, MergeStep, TokenState, current_pass, enter_pass
from llava_pitome.hooks.projector import grid
from llava_pitome.merge.plan import gather_tokens
from llava_pitome.models.hf_language_model import cache_in
from llava_pitome.models.parts import LanguageModelParts


class LanguageModelHooks:
    """The hooks on a language model.

    Attributes:
        last: the state of the last forward pass; None before there was one.
        step: what merges.
    """

    def __init__(
        self,
        llm: LanguageModelParts,
        config: MergeConfig,
        features: ImageFeatures,
        patches: Callable[[], int],
        triton: bool,
    ):
        """Prepares the hooks.

        Args:
            llm: the parts of the language model.
            config: how to merge.
            features: what is known of the images that were encoded last.
            patches: of these images; 0: none were encoded.
            triton: prefer kernels written in Triton.
        """
        self.llm = llm._replace(multimodal=None)  # which may be the model itself, that must be freed
        self.config, self.features, self.patches = config, features, patches
        self.layers = config.merging_layers
        self.step = MergeStep(config, 0, triton)
        self._settings = CacheSettings(
            (0, *(i + 1 for i in self.layers)), config.positions, config.llm_proportional
        )
        by_keys = config.metric == "keys"
        self._captures = [
            ProjectionCapture(llm, s, llm.blocks[i], config.method, by_keys, self)
            for s, i in enumerate(self.layers)
        ]
        self._blocks = [
            BlockMerge(llm.blocks[i], config.site, partial(self._state, s), partial(self._merge, s))
            for s, i in enumerate(self.layers)
        ]
        self._attention: AttentionSwitch | None = None
        if config.llm_proportional:
            self._attention = AttentionSwitch(llm.model.config, [block.attention for block in llm.blocks])
        self._handles: list[RemovableHandle] = []
        self._images: tuple[Tensor, int] | None = None
        self.last: ForwardState | None = None

    def install(self, multimodal: nn.Module) -> None:
        """Registers the hooks; `multimodal` is what is called with prompts and images."""
        if not self.config.reaches_llm:
            return
        llm, on = self.llm, self._handles.append
        on(multimodal.register_forward_pre_hook(self._find_images, with_kwargs=True))
        on(multimodal.register_forward_hook(self._end_call, always_call=True))
        on(llm.model.register_forward_pre_hook(self._start, with_kwargs=True))
        on(llm.model.register_forward_hook(self._end, with_kwargs=True))
        on(llm.norm.register_forward_hook(self._restore_length, prepend=True))
        if self.config.positions == "original":
            on(llm.rotary.register_forward_pre_hook(self._set_positions, with_kwargs=True))
        for i, block in enumerate(llm.blocks):
            on(block.layer.register_forward_pre_hook(partial(self._before_layer, i), with_kwargs=True))
        for s, (capture, block) in enumerate(zip(self._captures, self._blocks)):
            enter = partial(self._before_attention, s)
            on(block.block.attention.register_forward_pre_hook(enter, with_kwargs=True))
            capture.install(self._handles)
            block.install(self._handles)
        self._choose_attention()

    def _choose_attention(self) -> None:
        """Log sizes go into masks; where the attention implementation takes none, into its keys."""
        if self._attention is None or self.llm.adapter.takes_masks:
            return
        if not self._attention.is_installed:
            self._attention.install()

    def remove(self) -> None:
        """Removes all of it, and drops the last forward pass."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._attention is not None:
            self._attention.remove()
        self._images = self.last = None

    @property
    def tokens(self) -> list[TokenState | None]:
        """The images' tokens before the first merge of the last prefill, and after each."""
        return [] if self.last is None else self.last.tokens

    def segment(self, layer: int) -> int:
        """The number of merges before a layer."""
        return sum(merging < layer for merging in self.layers)

    def _grid(self) -> tuple[int, int]:
        return grid(self.patches(), self.config)

    def _state(self, s: int) -> ForwardState | None:
        """The state of the forward pass that runs, if the layer after segment s merges in it."""
        state = current_pass(self)
        return state if state is not None and state.has_images and state.segment == s else None

    def _find_images(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before the multimodal module: which tokens of the prompts are image tokens."""
        self._images = None
        inputs = _by_name(module, args, kwargs)
        self.llm.adapter.check_inputs(inputs)
        if self.llm.image_token is None:
            return
        count = self.llm.adapter.tokens_per_image(inputs, self.patches())
        ids, cache = inputs.get("input_ids"), cache_in(inputs)
        if ids is None and (count is not None or not kv_cache.has_state(cache)):
            raise ValueError("merging in the language model needs input_ids, which say where the images are")
        if count is not None:
            self._images = (ids == self.llm.image_token, count)

    def _end_call(self, *_args: Any) -> None:
        """After the multimodal module, also when it raised."""
        self._images = None
        enter_pass(None)

    def _start(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before the language model: starts a forward pass."""
        inputs = _by_name(module, args, kwargs)
        self.llm.adapter.check_inputs(inputs)
        self._choose_attention()
        hidden, mask, cache = inputs.get("inputs_embeds"), inputs.get("attention_mask"), cache_in(inputs)
        if hidden is None:  # called by itself, with ids: no images
            hidden = inputs["input_ids"]
        batch, length = hidden.shape[:2]
        known = None if cache is None else kv_cache.load_state(cache, self._settings, batch)
        real = None if mask is None or length == 1 else mask[:, -length:].bool()
        state = ForwardState(self, len(self._settings.first_layers), length, known)
        images = self._images
        if self.llm.image_token is None and inputs.get("inputs_embeds") is not None:
            images = self.features.locate(hidden)
        if images is not None and bool(images[0].any()):
            is_image, count = images
            real = real if real is None else real.to(hidden.device)
            prefix = self.llm.num_feature_prefix_tokens
            layout = prompt_layout.locate(is_image.to(hidden.device), count, prefix, real)
            seen = 0 if cache is None else cache.get_seq_length()
            before = mask[:, :seen].bool() if mask is not None and seen else None
            before = None if before is None or bool(before.all()) else before
            sizes, kept = self.features.lookup(hidden, layout.images)
            state.start_with_images(layout, sizes, SegmentCache(seen, before), self.config.llm_proportional)
            if self.config.positions == "original" and kept is not None:
                state.set_original_positions(kept, self.patches())
        else:
            state.start_without_images(length, None if real is None or bool(real.all()) else real)
        enter_pass(state)
        return args, kwargs | {STATE: state}

    def _set_positions(self, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before the rotary embedding: image tokens get the positions of their patches."""
        state = current_pass(self)
        if state is None:
            return None
        if len(args) > 1:
            return (args[0], state.position_ids(args[1]), *args[2:]), kwargs
        return args, kwargs | {"position_ids": state.position_ids(kwargs["position_ids"])}

    def _before_layer(
        self, i: int, _layer: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        """Before layer i: the mask and the positions of the tokens that remain."""
        state: ForwardState | None = kwargs.get(STATE)
        if state is None:
            return None
        enter_pass(state)
        s = state.segment = self.segment(i)
        hidden = args[0] if args else kwargs["hidden_states"]
        state.check_shape(s, hidden)
        if state.past is None:
            return None
        mask = state.mask(s, kwargs.get("attention_mask"), hidden, self.llm.adapter)
        kwargs = kwargs | {"attention_mask": mask} | state.positions(s, kwargs)
        if i in self.layers and state.has_images:
            cached = partial(self.llm.adapter.cached_keys, cache_in(kwargs), i)
            state.attention[s] = LayerAttention(
                None, None, state.layouts[s], mask, kwargs["position_embeddings"], cached,
                state.past[s].length, self._grid,
            )  # fmt: skip
        return args, kwargs

    def _before_attention(self, s: int, _module: nn.Module, _args: tuple, kwargs: dict) -> None:
        """Before the attention of a layer that merges, also where gradient checkpointing recomputes it."""
        state: ForwardState | None = kwargs.get(STATE)
        enter_pass(state)
        if state is not None:
            state.segment = s

    def _merge(self, s: int, state: ForwardState, hidden: Tensor) -> Tensor:
        """The merge after segment s: hidden states (B, T, D) to (B, T', D)."""
        i, config = self.layers[s], self.config
        state.check_shape(s, hidden)
        layout = state.layouts[s].to(hidden.device)
        attention = state.attention[s]._replace(
            layout=layout,
            queries=state.projected.pop((s, 0), None),
            keys=state.projected.pop((s, 1), None),
        )
        source = hidden.detach() if config.metric == "hidden" else attention.mean_keys()
        x, metric = (y.flatten(0, 1)[layout.images] for y in (hidden, source))
        length = token_schedule.kept_tokens(x.shape[1], config.decoder[i], f"decoder[{i}]")
        point = MergePoint("decoder", i, i / len(self.llm.blocks), config.method, config.parameters)
        inputs = attention.inputs(source)
        merged, tokens = self.step.merge(
            x, metric, length, state.tokens[s], point, inputs, state.tokens[s + 1]
        )
        short = prompt_layout.shorten(layout, tokens.merge)
        state.enter_segment(s + 1, short.after, tokens, config.llm_proportional)
        return prompt_layout.replace(hidden, short, merged)

    def _restore_length(self, _module: nn.Module, _args: tuple, output: Tensor) -> Tensor | None:
        """After the last norm: every token of the prompt gets the output of the token it merged into."""
        state = current_pass(self)
        layout = None if state is None else state.layouts[-1]
        if layout is None or layout.current is None:
            return None
        return gather_tokens(output, layout.current.to(output.device))

    def _end(self, _module: nn.Module, _args: tuple, kwargs: dict, output: Any) -> None:
        """After the language model: keeps the state with the cache."""
        state: ForwardState = kwargs[STATE]
        cache = cache_in(output)
        if cache is not None and state.past is not None:
            kv_cache.save_state(cache, state.cache_state(self._settings))
        if not torch.is_grad_enabled():  # gradient checkpointing may run layers again
            state.release()
        self.last = state
        enter_pass(None)


def _by_name(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """All that a module is called with, by name."""
    return dict(zip(inspect.signature(module.forward).parameters, args)) | kwargs if args else kwargs
