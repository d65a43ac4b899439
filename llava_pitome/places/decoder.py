"""Merging the image's tokens inside the language model during prefill, by hooks alone.

A layer that merges does so behind its own attention, so that the KV cache of the layers behind it is really
shorter. The first layer's cache is never touched: positions, masks and `get_seq_length` are read from it.
Stretch s are the layers behind s merges; everything about it is in slot s of its list.
Shapes: B prompts, T tokens, I images over all prompts, n tokens an image, D channels.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_pitome import schedule
from llava_pitome.config import MergeConfig
from llava_pitome.merging import rows
from llava_pitome.places import past as pasts
from llava_pitome.places import prompt as prompts
from llava_pitome.places.arrivals import Arrivals
from llava_pitome.places.asked import Asked
from llava_pitome.places.blocks import Block, Slot, hidden_of
from llava_pitome.places.inside import Inside
from llava_pitome.places.looks import Looking, wanted
from llava_pitome.places.merger import ANOTHER_PASS, Merger
from llava_pitome.places.past import Memory, Past
from llava_pitome.places.prefix import grid
from llava_pitome.places.prompt import Prompt


class Llm(NamedTuple):
    """The parts of a language model in a LLaVA that merging touches.

    Attributes:
        outer: the module around it, called with input_ids and the pictures.
        model: it itself, called with inputs_embeds, attention_mask and past_key_values.
        blocks: its layers.
        norm: the norm behind the last one.
        rotary: from hidden states and position_ids (B or 1, T) to the angles that turn queries and keys.
        image_token: the id of the image placeholder.
        front: tokens in front of each image's patches that never merge.
        image_tokens: from what `outer` is called with, and the patches of the pictures encoded last, to the
            tokens of each image; None: no picture.
        cached_keys: from a cache, a layer and a number of tokens to their keys (B, H, P, C).
        plain: whether its attention kernel is causal by itself where it is given no mask.
        check: raises ValueError for a cache, mask or kernel that cannot work in a call of either module.
    """

    outer: nn.Module
    model: nn.Module
    blocks: tuple[Block, ...]
    norm: nn.Module
    rotary: nn.Module
    image_token: int
    front: int
    image_tokens: Callable[[dict, int], int | None]
    cached_keys: Callable[[Any, int, int], Tensor]
    plain: Callable[[], bool]
    check: Callable[[dict], None]


class DecoderMerging:
    """The hooks on a language model, and what the last forward pass left.

    Attributes:
        slots: what is known of the images' tokens behind each merge of the last prefill, the first in front.
    """

    def __init__(
        self,
        llm: Llm,
        config: MergeConfig,
        arrivals: Arrivals,
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
        self._merger = Merger(config, 0, triton)
        self._looks = [
            Looking(llm.blocks[i], wanted(config.method, config.metric == "keys"), 0, self._has_images)
            for i in self.layers
        ]
        self._inside = [
            Inside(llm.blocks[i], config.site, partial(self._merges, s), partial(self._merge, s))
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
        self._past: tuple[Past, ...] | None = None
        self._open = 0
        self._before: Tensor | None = None
        self._shift: Tensor | None = None
        self._places: Tensor | None = None
        self._now: list[Past | None] = []
        self._masks: list[Tensor | None] = []
        self._prompts: list[Prompt | None] = []
        self._asked: list[Asked | None] = [None] * len(self.layers)
        self.slots: list[Slot | None] = []
        for part in (*self._looks, *self._inside):
            part.forget()

    @property
    def _stretches(self) -> int:
        return len(self.layers) + 1

    def _stretch(self, i: int) -> int:
        """The number of merges in front of layer i."""
        return sum(layer < i for layer in self.layers)

    @property
    def _firsts(self) -> tuple[int, ...]:
        """The first layer of each stretch."""
        return (0, *(i + 1 for i in self.layers))

    def _grid(self) -> tuple[int, int]:
        return grid(self.patches(), self.config)

    def _has_images(self) -> bool:
        return bool(self._prompts) and self._prompts[0] is not None

    def _look_for_images(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """In front of the whole: which tokens of the prompts are an image's."""
        self._images = None
        given = _named(module, args, kwargs)
        self.llm.check(given)
        each = self.llm.image_tokens(given, self.patches())
        if each is None:
            return
        if (ids := given.get("input_ids")) is None:
            raise ValueError("merging in the language model needs input_ids, which say where the images are")
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
        seen = 0 if cache is None else cache.get_seq_length()
        real = None if given is None or length == 1 else given[:, -length:].bool()
        self._prompts = [None] * self._stretches
        self.slots = [None] * self._stretches
        memory = None if cache is None else pasts.recall(cache, self._firsts, batch)
        self._past, self._open, self._shift, self._places = None, 0, None, None
        if memory is not None:
            self._past, self._open, self._shift = memory.past, memory.open + length, memory.shift
        self._before = self._shift
        if self._images is not None and bool(self._images[0].any()):
            self._prompts[0] = prompts.find(*self._images, self.llm.front, real)
            self._open = prompts.behind(self._prompts[0])
            self._arrive(self._prompts[0], hidden)
            if self._past is None:
                before = given[:, :seen].bool() if given is not None and seen else None
                before = None if before is None or bool(before.all()) else before
                self._past = (Past(seen, before),) * self._stretches
        elif real is not None and self._past is not None and bool(real.all()):
            real = None
        self._now, self._masks = [None] * self._stretches, [None] * self._stretches
        if self._past is not None:
            bias = self._bias(0) if self._has_images() else None
            for s in range(self._stretches if not self._has_images() else 1):
                known = self._prompts[0].real if self._has_images() else real
                self._set(s, length, known, bias, hidden)

    def _arrive(self, prompt: Prompt, hidden: Tensor) -> None:
        """The sizes and places (I, n) of the images' tokens as the projector made them."""
        features = hidden.flatten(0, 1)[prompt.images]
        sizes = self.arrivals.sizes(features)
        sizes = torch.ones(prompt.images.shape) if sizes is None else sizes
        self.slots[0] = Slot(sizes.to(prompt.images.device))
        if self.config.positions == "original" and self.arrivals.merged:
            self._places = self.arrivals.places(features)
            missing = self.patches() - prompt.images.shape[1]
            more = missing * torch.tensor(prompt.counts, device=hidden.device).unsqueeze(1)
            self._shift = more if self._before is None else self._before + more

    def _turn(self, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """In front of the angles: image tokens get the positions of their patches."""
        positions = args[1] if len(args) > 1 else kwargs["position_ids"]
        if self._before is not None:
            positions = positions + self._before.to(positions.device)
        if self._places is not None:
            positions = prompts.unpacked(self._prompts[0], positions, self._places, self.patches())
        if len(args) > 1:
            return (args[0], positions, *args[2:]), kwargs
        return args, kwargs | {"position_ids": positions}

    def _bias(self, s: int) -> Tensor | None:
        """Log sizes (B, T) of the tokens in stretch s, 0 for text; None where attention is not weighed."""
        if not self.config.llm_proportional or (s == 0 and not self.arrivals.merged):
            return None
        prompt = self._prompts[s]
        bias = torch.zeros(prompt.shape, device=prompt.images.device)
        bias.view(-1)[prompt.images.flatten()] = self.slots[s].sizes.log().flatten()
        return bias

    def _set(self, s: int, length: int, real: Tensor | None, bias: Tensor | None, like: Tensor) -> None:
        """What the cache of stretch s holds with this pass, and the mask that follows."""
        self._now[s] = self._past[s].grown(length, real, bias)
        self._masks[s] = None
        if s:
            dtype = like.dtype if like.is_floating_point() else next(self.llm.norm.parameters()).dtype
            self._masks[s] = pasts.mask(self._now[s], length, self.llm.plain(), dtype, like.device)

    def _enter(self, i: int, _layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """In front of layer i: the mask and the positions of the tokens that are left."""
        s = self._stretch(i)
        if self._past is None:
            return None
        hidden, _ = hidden_of(args, kwargs)
        self._check_pass(s, hidden)
        changed = {}
        if s == 0:
            if self._now[0].bias is not None:
                given = kwargs.get("attention_mask")
                changed["attention_mask"] = pasts.biased(
                    given, self._now[0], hidden.shape[1], hidden.dtype, hidden.device
                )
        else:
            mask = self._masks[s]
            changed["attention_mask"] = None if mask is None else pasts.cast(mask, hidden)
            prompt = self._prompts[s]
            if prompt is not None and prompt.origin is not None:
                changed |= self._positions(prompt.origin, kwargs)
        kwargs = kwargs | changed
        if i in self.layers and self._has_images():
            cached = partial(self.llm.cached_keys, kwargs.get("past_key_values"), i)
            mask, turns = kwargs.get("attention_mask"), kwargs["position_embeddings"]
            self._asked[s] = Asked(
                self._looks[s], self._prompts[s], mask, turns, cached, self._past[s].length, self._grid
            )
        return args, kwargs

    def _check_pass(self, s: int, hidden: Tensor) -> None:
        """Raises RuntimeError where gradient checkpointing runs a layer of an earlier pass again."""
        prompt = self._prompts[s]
        if prompt is not None and prompt.shape != hidden.shape[:2]:
            raise RuntimeError(ANOTHER_PASS)

    def _positions(self, origin: Tensor, kwargs: dict) -> dict[str, Any]:
        """Every token keeps the position that it had in front of the first layer."""
        cos, sin = kwargs["position_embeddings"]
        origin = origin.to(cos.device)
        batch = len(origin)
        found = {
            "position_embeddings": tuple(
                rows(x.expand(batch, -1, -1).contiguous(), origin) for x in (cos, sin)
            )
        }
        if (ids := kwargs.get("position_ids")) is not None:
            found["position_ids"] = ids.expand(batch, -1).gather(1, origin.to(ids.device))
        return found

    def _merges(self, s: int) -> bool:
        return self._has_images()

    def _merge(self, s: int, hidden: Tensor) -> Tensor:
        """The merge behind stretch s: hidden (B, T, D) to (B, T', D)."""
        i, prompt, config = self.layers[s], self._prompts[s].to(hidden.device), self.config
        self._check_pass(s, hidden)
        source = hidden.detach() if config.metric == "hidden" else self._looks[s].key()
        x, metric = (y.flatten(0, 1)[prompt.images] for y in (hidden, source))
        length = schedule.left(x.shape[1], config.decoder[i], f"decoder[{i}]")
        way = (config.method, config.parameters, i / len(self.llm.blocks))
        last = self.slots[s + 1]
        offers = self._asked[s]._replace(prompt=prompt).offers(source)
        merged, slot = self._merger.merge(x, metric, length, self.slots[s], last, way, offers)
        short = prompts.shorten(prompt, slot.merge)
        self.slots[s + 1], self._prompts[s + 1] = slot, short.after
        bias = self._bias(s + 1)
        self._set(s + 1, short.after.shape[1], short.after.real, bias, hidden)
        return prompts.replace(hidden, short, merged)

    def _restore(self, _module: nn.Module, _args: tuple, output: Tensor) -> Tensor | None:
        """Behind the last norm: every token of the prompts finds what it, or what it merged into, became."""
        prompt = self._prompts[-1] if self._prompts else None
        if prompt is None or prompt.into is None:
            return None
        return rows(output, prompt.into.to(output.device))

    def _end(self, _module: nn.Module, _args: tuple, output: Any) -> None:
        """Behind the language model: the cache is told what it holds."""
        cache = getattr(output, "past_key_values", None)
        if cache is not None and self._past is not None:
            pasts.remember(cache, Memory(self._firsts, tuple(self._now), self._open, self._shift))
        if not torch.is_grad_enabled():  # gradient checkpointing may run what is inside a layer again
            self._asked, self._masks = [None] * len(self.layers), [None] * self._stretches
        for part in (*self._looks, *self._inside):
            part.forget()


def _named(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """All that a module is called with, by name."""
    return dict(zip(inspect.signature(module.forward).parameters, args)) | kwargs if args else kwargs
