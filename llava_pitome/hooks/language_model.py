"""Merging the image's tokens inside the language model during prefill, by hooks alone.

A layer that merges does so behind its own attention, so that the KV cache of the layers behind it is really
shorter. The first layer's cache is never touched: positions, masks and `get_seq_length` are read from it.
Stretch s are the layers behind s merges.
Shapes: B prompts, T tokens, I images over all prompts, n tokens an image, D channels.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_pitome import token_schedule as schedule
from llava_pitome.config import MergeConfig
from llava_pitome.hooks import kv_cache as pasts
from llava_pitome.hooks import prompt_layout as prompts
from llava_pitome.hooks.attention_capture import AttentionCapture, wanted
from llava_pitome.hooks.block_merge import BlockMerge
from llava_pitome.hooks.forward_state import ForwardState
from llava_pitome.hooks.image_features import ImageFeatures
from llava_pitome.hooks.kv_cache import SegmentCache
from llava_pitome.hooks.layer_attention import LayerAttention
from llava_pitome.hooks.merge_step import MergeStep
from llava_pitome.hooks.projector import grid
from llava_pitome.merge.plan import gather_tokens
from llava_pitome.models.language_model_parts import LanguageModelParts
from llava_pitome.models.parts import TokenState, hidden_of


class LanguageModelHooks:
    """The hooks on a language model, and what the last forward pass left.

    Attributes:
        merger: what merges, wherever it is.
    """

    def __init__(
        self,
        llm: LanguageModelParts,
        config: MergeConfig,
        arrivals: ImageFeatures,
        patches: Callable[[], int],
        triton: bool,
    ):
        """Prepares hooks.

        Args:
            llm: where.
            config: how to merge.
            arrivals: what is known of the tokens that the projector handed on.
            patches: of the pictures that were encoded last; 0: none were.
            triton: let kernels written in Triton compute, where they can.
        """
        self.llm, self.config, self.arrivals, self.patches = llm, config, arrivals, patches
        self.layers = config.merging_layers
        self.merger = MergeStep(config, 0, triton)
        self._looks = [
            AttentionCapture(
                llm.blocks[i], wanted(config.method, config.metric == "keys"), 0, self._has_images
            )
            for i in self.layers
        ]
        self._inside = [
            BlockMerge(llm.blocks[i], config.site, partial(self._merges, s), partial(self._merge, s))
            for s, i in enumerate(self.layers)
        ]
        self._handles: list[RemovableHandle] = []
        self._forget()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do, so that no hook is needed."""
        return not self.config.reaches_llm

    def install(self) -> None:
        """Registers the hooks."""
        if self.idle:
            return
        llm, on = self.llm, self._handles.append
        on(llm.outer.register_forward_pre_hook(self._look_for_images, with_kwargs=True))
        on(llm.outer.register_forward_hook(self._done, always_call=True))
        on(llm.model.register_forward_pre_hook(self._begin, with_kwargs=True))
        on(llm.model.register_forward_hook(self._end))
        on(llm.norm.register_forward_hook(self._restore, prepend=True))
        if self.config.positions == "original":
            on(llm.rotary.register_forward_pre_hook(self._turn, with_kwargs=True))
        for i, block in enumerate(llm.blocks):
            on(block.layer.register_forward_pre_hook(partial(self._enter, i), with_kwargs=True))
        for look, inside in zip(self._looks, self._inside):
            self._handles += [*look.install(), *inside.install()]

    def remove(self) -> None:
        """Takes every hook off and forgets the last forward pass."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def _forget(self) -> None:
        self._images: tuple[Tensor, int] | None = None
        self._pass: ForwardState | None = None
        self._asked: list[LayerAttention | None] = [None] * len(self.layers)
        for part in (*self._looks, *self._inside):
            part.forget()

    @property
    def slots(self) -> list[TokenState | None]:
        """What is known of the images' tokens behind each merge of the last prefill, the first in front."""
        return [] if self._pass is None else self._pass.slots

    def _stretch(self, i: int) -> int:
        """The number of merges in front of layer i."""
        return sum(layer < i for layer in self.layers)

    @property
    def _firsts(self) -> tuple[int, ...]:
        """The first layer of each stretch."""
        return (0, *(i + 1 for i in self.layers))

    @property
    def _way(self) -> tuple[str, bool]:
        """What else passes over one cache must have in common."""
        return self.config.positions, self.config.llm_proportional

    def _grid(self) -> tuple[int, int]:
        return grid(self.patches(), self.config)

    def _has_images(self) -> bool:
        return self._pass is not None and self._pass.has_images

    def _look_for_images(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """In front of the whole: which tokens of the prompts are an image's."""
        self._images = None
        given = _named(module, args, kwargs)
        self.llm.check(given)
        if self.llm.image_token is None:
            return
        each = self.llm.image_tokens(given, self.patches())
        ids, cache = given.get("input_ids"), given.get("past_key_values")
        if ids is None and (each is not None or getattr(cache, pasts.NAME, None) is None):
            raise ValueError("merging in the language model needs input_ids, which say where the images are")
        if each is None:
            return
        self._images = (ids == self.llm.image_token, each)

    def _done(self, *_args: Any) -> None:
        self._images = None

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """In front of the language model: what is known of this pass, and of those before it."""
        kwargs = _named(module, args, kwargs)
        self.llm.check(kwargs)
        hidden, cache, given = (kwargs.get(k) for k in ("inputs_embeds", "past_key_values", "attention_mask"))
        if hidden is None:  # called by itself, with ids: no images
            hidden = kwargs["input_ids"]
        batch, length = hidden.shape[:2]
        memory = None if cache is None else pasts.recall(cache, self._firsts, self._way, batch)
        real = None if given is None or length == 1 else given[:, -length:].bool()
        now = ForwardState(len(self._firsts), length, memory)
        images = self._images
        if self.llm.image_token is None and kwargs.get("inputs_embeds") is not None:
            images = self.arrivals.found(hidden)
        if images is not None and bool(images[0].any()):
            is_image, each = images
            real = real if real is None else real.to(hidden.device)
            prompt = prompts.find(is_image.to(hidden.device), each, self.llm.front, real)
            seen = 0 if cache is None else cache.get_seq_length()
            before = given[:, :seen].bool() if given is not None and seen else None
            before = None if before is None or bool(before.all()) else before
            sizes, places = self.arrivals.of(hidden, prompt.images)
            now.begin(prompt, sizes, SegmentCache(seen, before), self.config.llm_proportional)
            if self.config.positions == "original" and places is not None:
                now.place(places, self.patches())
        else:
            now.go_on(length, None if real is None or bool(real.all()) else real)
        self._pass = now

    def _turn(self, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """In front of the angles: image tokens get the positions of their patches."""
        if len(args) > 1:
            return (args[0], self._pass.turned(args[1]), *args[2:]), kwargs
        return args, kwargs | {"position_ids": self._pass.turned(kwargs["position_ids"])}

    def _enter(self, i: int, _layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """In front of layer i: the mask and the positions of the tokens that are left."""
        s, now = self._stretch(i), self._pass
        hidden, _ = hidden_of(args, kwargs)
        now.check(s, hidden, kwargs["position_embeddings"][0])
        if now.past is None:
            return None
        mask = now.mask(s, kwargs.get("attention_mask"), hidden, self.llm.plain())
        kwargs = kwargs | {"attention_mask": mask} | now.angles(s, kwargs)
        if i in self.layers and now.has_images:
            cached = partial(self.llm.cached_keys, kwargs.get("past_key_values"), i)
            turns, before = kwargs["position_embeddings"], now.past[s].length
            self._asked[s] = LayerAttention(
                self._looks[s], now.prompts[s], mask, turns, cached, before, self._grid
            )
        return args, kwargs

    def _merges(self, s: int) -> bool:
        return self._has_images()

    def _merge(self, s: int, hidden: Tensor) -> Tensor:
        """The merge behind stretch s: hidden (B, T, D) to (B, T', D)."""
        now, i, config = self._pass, self.layers[s], self.config
        now.check(s, hidden)
        prompt = now.prompts[s].to(hidden.device)
        source = hidden.detach() if config.metric == "hidden" else self._looks[s].key()
        x, metric = (y.flatten(0, 1)[prompt.images] for y in (hidden, source))
        length = schedule.kept_tokens(x.shape[1], config.decoder[i], f"decoder[{i}]")
        way = (config.method, config.parameters, i / len(self.llm.blocks))
        offers = self._asked[s]._replace(prompt=prompt).offers(source)
        merged, slot = self.merger.merge(x, metric, length, now.slots[s], now.slots[s + 1], way, offers)
        short = prompts.shorten(prompt, slot.merge)
        now.enter(s + 1, short.after, slot, config.llm_proportional)
        return prompts.replace(hidden, short, merged)

    def _restore(self, _module: nn.Module, _args: tuple, output: Tensor) -> Tensor | None:
        """Behind the last norm: every token of the prompts finds what it, or what it merged into, became."""
        prompt = self._pass.prompts[-1]
        if prompt is None or prompt.into is None:
            return None
        return gather_tokens(output, prompt.into.to(output.device))

    def _end(self, _module: nn.Module, _args: tuple, output: Any) -> None:
        """Behind the language model: the cache is told what it holds."""
        cache = getattr(output, "past_key_values", None)
        if cache is not None and self._pass.past is not None:
            pasts.remember(cache, self._pass.end(self._firsts, self._way))
        if not torch.is_grad_enabled():  # gradient checkpointing may run what is inside a layer again
            self._asked = [None] * len(self.layers)
            self._pass.forget_masks()
        for part in (*self._looks, *self._inside):
            part.forget()


def _named(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """All that a module is called with, by name."""
    return dict(zip(inspect.signature(module.forward).parameters, args)) | kwargs if args else kwargs
