"""Merging image tokens inside the language model during prefill.

A layer that merges does so after its own attention, so that the KV cache of later layers is really shorter.
The cache of the first layer is never changed: positions, masks and `get_seq_length` are read from it. The
state of a forward pass (forward_state.py) is made before the language model and handed to its layers as a
keyword argument.
Shapes: B prompts, T tokens, I images over all prompts, n tokens an image, D channels.
"""

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_pitome import token_schedule
from llava_pitome.config import MergeConfig
from llava_pitome.hooks import kv_cache, prompt_layout
from llava_pitome.hooks.attention_capture import is_switched, number_layers, switch_attention
from llava_pitome.hooks.block_merge import REPLACED, BlockMerge
from llava_pitome.hooks.current_pass import STATE, current_pass, enter_pass, keep, kept
from llava_pitome.hooks.forward_state import ForwardState
from llava_pitome.hooks.hook_owner import HookOwner
from llava_pitome.hooks.image_features import RecordedImages, find_images
from llava_pitome.hooks.kv_cache import CacheSettings, SegmentCache
from llava_pitome.hooks.llm_attention_capture import LayerAttention, ProjectionCapture
from llava_pitome.hooks.merge_step import MergePoint, MergeStep, TokenState
from llava_pitome.hooks.projector import ProjectorHooks, grid
from llava_pitome.hooks.prompt_layout import PromptLayout
from llava_pitome.merge.plan import gather_tokens
from llava_pitome.models.hf_language_model import (
    attention_implementation,
    cache_in,
    check_attention,
    takes_masks,
)
from llava_pitome.models.parts import LanguageModelParts


class PromptImages(NamedTuple):
    """Where the image tokens of a call's prompts are.

    Attributes:
        is_image: (B, T) True at every image token.
        tokens: of an image, prefix tokens included; of each image in order, where they differ.
    """

    is_image: Tensor
    tokens: int | list[int]


class LanguageModelHooks(HookOwner):
    """The hooks on a language model.

    Attributes:
        handle: the MergeHandle that they belong to.
        step: what merges.
        newest: the tokens of the last forward pass of any thread, as in `tokens`.
    """

    def __init__(
        self,
        handle: Any,
        llm: LanguageModelParts,
        config: MergeConfig,
        projector: ProjectorHooks,
        triton: bool,
    ):
        """Prepares the hooks.

        Args:
            handle: the MergeHandle that they belong to.
            llm: the parts of the language model.
            config: how to merge.
            projector: the hooks on the projector before it, which record images.
            triton: prefer kernels written in Triton.
        """
        self.handle, self.config, self.projector = handle, config, projector
        self.layers = config.merging_layers
        self.step = MergeStep(config, 0, triton)
        self._adapter, self._image_token, self._video_token = llm.adapter, llm.image_token, llm.video_token
        self._num_prefix_tokens, self._num_layers = llm.num_feature_prefix_tokens, len(llm.blocks)
        self._settings = CacheSettings(
            (0, *(i + 1 for i in self.layers)), config.positions, config.llm_proportional
        )
        self._must_run = {*range(len(llm.blocks)), "norm"}
        if config.positions == "original":
            self._must_run.add("rotary embedding")
        by_keys = config.metric == "keys"
        self._captures = [
            ProjectionCapture(self, llm.adapter, s, config.method, by_keys) for s in range(len(self.layers))
        ]
        self._blocks = [
            BlockMerge(config.site, partial(self._state, s), partial(self._merge, s))
            for s in range(len(self.layers))
        ]
        self.newest: tuple[TokenState | tuple[TokenState, ...] | None, ...] = ()

    def install(self, llm: LanguageModelParts, handles: list[RemovableHandle]) -> None:
        """Registers the hooks, and appends each to `handles`."""
        on = handles.append
        on(llm.multimodal.register_forward_pre_hook(self._find_images, with_kwargs=True))
        on(llm.multimodal.register_forward_hook(self._end_call, always_call=True))
        on(llm.model.register_forward_pre_hook(self._start, with_kwargs=True))
        on(llm.model.register_forward_hook(self._end, with_kwargs=True))
        on(llm.norm.register_forward_hook(self._restore_length, prepend=True))
        if self.config.positions == "original":
            on(llm.rotary.register_forward_pre_hook(self._set_positions, with_kwargs=True))
        for i, block in enumerate(llm.blocks):
            on(block.layer.register_forward_pre_hook(partial(self._before_layer, i), with_kwargs=True))
        for s, (i, capture, merge) in enumerate(zip(self.layers, self._captures, self._blocks)):
            enter = partial(self._before_attention, s)
            on(llm.blocks[i].attention.register_forward_pre_hook(enter, with_kwargs=True))
            capture.install(llm.blocks[i], handles)
            merge.install(llm.blocks[i], handles)
        if self.config.llm_proportional:
            number_layers([block.attention for block in llm.blocks])
        self._choose_attention(llm.model)

    def _choose_attention(self, model: nn.Module) -> None:
        """Log sizes go into masks; where the attention implementation takes none, into its keys."""
        base = attention_implementation(model.config)
        if self.config.llm_proportional and not takes_masks(base) and not is_switched(model):
            switch_attention(model)

    def forget(self) -> None:
        """Drops the last forward pass."""
        self.newest = ()

    @property
    def tokens(self) -> tuple[TokenState | tuple[TokenState, ...] | None, ...]:
        """The images' tokens before the first merge of the last prefill, and after each.

        Several where images have different numbers of tokens, one for those of each number. Of this
        thread's last forward pass, or, where it ran none, of the last one of any thread.
        """
        return kept("language_pass", self.handle) or self.newest

    def segment(self, layer: int) -> int:
        """The number of merges before a layer."""
        return sum(merging < layer for merging in self.layers)

    def _state(self, s: int) -> ForwardState | None:
        """The state of the forward pass that runs, if the layer after segment s merges in it."""
        state = current_pass(self)
        return state if state is not None and state.has_images and state.segment == s else None

    def _find_images(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before the multimodal module: which tokens of the prompts are image tokens."""
        keep("prompt", self.handle, None)
        inputs = _by_name(module, args, kwargs)
        check_attention(self._adapter.language_model(module))
        self._adapter.check_inputs(inputs)
        if self._image_token is None:
            return
        ids, cache = inputs.get("input_ids"), cache_in(inputs)
        count = self._image_tokens(inputs)
        if ids is None and (count is not None or cache is None or not kv_cache.has_merged(cache)):
            raise ValueError("merging in the language model needs input_ids, which say where the images are")
        if count is not None:
            is_image = ids == self._image_token
            if self._video_token is not None:
                is_image = is_image | (ids == self._video_token)
            keep("prompt", self.handle, PromptImages(is_image, count))

    def _image_tokens(self, inputs: dict[str, Any]) -> int | list[int] | None:
        """Tokens of each image in a call of the multimodal module; None where it gets no image.

        Where a prompt holds videos, these are its images. Features that were encoded before the call may have
        been cut where a prompt is prefilled in chunks, so that their own length says less than the record of
        their images.
        """
        encoded = inputs.get("mm_encoder_outputs") or {}
        images, videos = (encoded.get(kind) for kind in ("image", "video"))
        if self._adapter.tiling is None:
            if images is None:
                return self._adapter.tokens_per_image(inputs)
            first = images.pooler_output[0]
            known = [record.length for record in self.projector.images() if record.starts_with(first)]
            return known[0] if known else len(first)
        counts = self._adapter.image_tokens(inputs)
        if images is not None:
            counts[0] = self._lengths(images.pooler_output)
        if videos is not None:
            counts[1] = self._lengths(videos.pooler_output)
        if not any(counts):
            return None
        ids = inputs.get("input_ids")
        if ids is None or not all(counts):
            return counts[0] or counts[1]
        return _in_order(ids, (self._image_token, self._video_token), counts)

    def _lengths(self, features: Sequence[Tensor]) -> list[int]:
        """Tokens of each image in features that were encoded before, which may be cut or joined."""
        found, records = [], self.projector.images()
        for part in features:
            while len(part):
                known = [r.length for r in records if r.starts_with(part)]
                length = len(part) if len(part) in known or not known else known[0]
                found.append(length)
                part = part[length:]
        return found

    def _end_call(self, _module: nn.Module, _args: tuple, output: Any) -> None:
        """After the multimodal module, also when it raised."""
        images: PromptImages | None = kept("prompt", self.handle)
        keep("prompt", self.handle, None)
        enter_pass(None)
        if output is not None and images is not None and bool(images.is_image.any()):
            raise RuntimeError(REPLACED.format("the language model"))

    def _start(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before the language model: starts a forward pass."""
        inputs = _by_name(module, args, kwargs)
        check_attention(module)
        self._adapter.check_inputs(inputs)
        self._choose_attention(module)
        hidden, mask, cache = inputs.get("inputs_embeds"), inputs.get("attention_mask"), cache_in(inputs)
        if hidden is None:  # called by itself, with ids: no images
            hidden = inputs["input_ids"]
        batch, length = hidden.shape[:2]
        known = None if cache is None else kv_cache.load_state(cache, self._settings, batch, mask)
        real = None if mask is None or length == 1 else mask[:, -length:].bool()
        state = ForwardState(
            self, len(self._settings.first_layers), length, known,
            attention_implementation(module.config),
        )  # fmt: skip
        images: PromptImages | None = kept("prompt", self.handle)
        keep("prompt", self.handle, None)
        if self._image_token is None and inputs.get("inputs_embeds") is not None:
            images = self._located(hidden)
        if images is not None and bool(images.is_image.any()):
            real = real if real is None else real.to(hidden.device)
            is_image = images.is_image.to(hidden.device)
            layout = prompt_layout.locate(is_image, images.tokens, self._num_prefix_tokens, real)
            seen = 0 if cache is None else cache.get_seq_length()
            before = mask[:, :seen].bool() if mask is not None and seen else None
            before = None if before is None or bool(before.all()) else before
            self._add_images(state, hidden, layout, SegmentCache(seen, before))
        else:
            state.start_without_images(length, None if real is None or bool(real.all()) else real)
        enter_pass(state)
        return args, kwargs | {STATE: state}

    def _located(self, hidden: Tensor) -> PromptImages | None:
        """Where prompts (B, T, D) that come without ids hold the images that were encoded last."""
        for record in self.projector.images():
            is_image = record.locate(hidden)
            if bool(is_image.any()):
                return PromptImages(is_image, record.length)
        return None

    def _add_images(
        self, state: ForwardState, hidden: Tensor, layout: PromptLayout, before: SegmentCache
    ) -> None:
        """Adds to a forward pass the images of its prompts (B, T, D), and what their tokens stand for.

        Raises:
            RuntimeError: tokens merged before the language model, and the features are not those of an image
                that was encoded last.
        """
        found = self._recorded(hidden, layout)
        if found is None:
            if self.config.merges_in_tower or self.config.merges_in_prefix:
                raise RuntimeError(
                    "the features of an image in this prompt are not those of the images that were encoded "
                    "last, so it is unknown what their tokens stand for; encode the images of a prompt right "
                    "before it"
                )
            counts = [torch.full((len(x),), x.shape[1], device=x.device) for x in layout.images]
            state.start_with_images(layout, [None] * len(counts), before, counts, False)
            return
        sizes, kept_tokens, patches = zip(*found)
        state.start_with_images(layout, sizes, before, patches, self.config.llm_proportional)
        if self.config.positions == "original" and any(x is not None for x in kept_tokens):
            own = [
                torch.arange(images.shape[1], device=images.device).expand_as(images) if x is None else x
                for images, x in zip(layout.images, kept_tokens)
            ]
            state.set_original_positions(own)

    def _recorded(self, hidden: Tensor, layout: PromptLayout) -> list[RecordedImages] | None:
        """What is known of each group of images of some prompts (B, T, D); None where one is unknown."""
        records = self.projector.images()
        found = [find_images(records, hidden, images) for images in layout.images]
        return None if any(x is None for x in found) else found

    def _set_positions(self, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before the rotary embedding: image tokens get the positions of their patches."""
        state = current_pass(self)
        if state is None:
            return None
        state.ran.add("rotary embedding")
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
        state.ran.add(i)
        hidden = args[0] if args else kwargs["hidden_states"]
        state.check_shape(s, hidden)
        if state.past is None:
            return None
        mask = state.mask(s, kwargs.get("attention_mask"), hidden)
        kwargs = kwargs | {"attention_mask": mask} | state.positions(s, kwargs)
        if i in self.layers and state.has_images:
            cached = partial(self._adapter.cached_keys, cache_in(kwargs), i)
            state.attention[s] = LayerAttention(
                None, None, state.layouts[s], mask, kwargs["position_embeddings"], cached,
                state.past[s].length, partial(grid, state.patches, self.config),
            )  # fmt: skip
        return args, kwargs

    def _before_attention(self, s: int, module: nn.Module, _args: tuple, kwargs: dict) -> None:
        """Before the attention of a layer that merges, also where gradient checkpointing recomputes it."""
        state: ForwardState | None = kwargs.get(STATE)
        enter_pass(state)
        if state is not None:
            state.segment, state.projections = s, self._adapter.projections(module)

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
        point = MergePoint("decoder", i, i / self._num_layers, config.method, config.parameters)
        before, after = state.tokens[s], state.tokens[s + 1]
        merged, tokens = [], []
        for g, images in enumerate(layout.images):
            x, metric = (y.flatten(0, 1)[images] for y in (hidden, source))
            length = token_schedule.kept_tokens(x.shape[1], config.decoder[i], f"decoder[{i}]")
            inputs = attention._replace(group=g).inputs(source)
            previous = None if after is None else after[g]
            made = self.step.merge(x, metric, length, before[g], point, inputs, previous)
            merged.append(made[0])
            tokens.append(made[1])
        short = prompt_layout.shorten(layout, [own.merge for own in tokens])
        state.enter_segment(s + 1, short.after, tuple(tokens), config.llm_proportional)
        return prompt_layout.replace(hidden, short, merged)

    def _restore_length(self, _module: nn.Module, _args: tuple, output: Tensor) -> Tensor | None:
        """After the last norm: every token of the prompt gets the output of the token it merged into."""
        state = current_pass(self)
        if state is None:
            return None
        state.ran.add("norm")
        layout = state.layouts[-1]
        if layout is None or layout.current is None:
            return None
        return gather_tokens(output, layout.current.to(output.device))

    def _end(self, _module: nn.Module, _args: tuple, kwargs: dict, output: Any) -> None:
        """After the language model: keeps the state with the cache."""
        state: ForwardState = kwargs[STATE]
        enter_pass(None)
        missing = sorted(map(str, self._must_run - state.ran))
        if missing:
            what = missing[0] if missing[0].isalpha() or " " in missing[0] else f"layer {missing[0]}"
            raise RuntimeError(REPLACED.format(f"the {what} of the language model"))
        cache = cache_in(output)
        if cache is not None and cache.get_seq_length():  # gradient checkpointing leaves it empty
            kv_cache.save_state(cache, state.cache_state(self._settings, cache))
        tokens = tuple(own[0] if own is not None and len(own) == 1 else own for own in state.tokens)
        self.newest = tokens
        keep("language_pass", self.handle, tokens)


def _in_order(ids: Tensor, tokens: Sequence[int], counts: Sequence[list[int]]) -> list[int]:
    """The tokens of images and videos in the order of prompts (B, T), each of which holds one kind.

    Args:
        ids: the prompts.
        tokens: placeholders of images and of videos.
        counts: tokens of each image, and of each video, in order.
    """
    found: list[int] = []
    following = [iter(lengths) for lengths in counts]
    totals = [(ids == token).sum(1).tolist() for token in tokens]
    for row in zip(*totals):
        for kind, left in enumerate(row):
            while left > 0:
                length = next(following[kind], left)
                found.append(length)
                left -= length
    return found


def _by_name(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """All that a module is called with, by name."""
    return dict(zip(inspect.signature(module.forward).parameters, args)) | kwargs if args else kwargs
