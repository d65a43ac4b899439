"""The state kept with a KV cache whose layers differ in length, and the attention masks that follow from it.

A cache has the length of its layers, but not which of their tokens are padding. That is kept as an attribute
of the cache, and so is copied with it; generate, beams and later turns find it there. It is used for the
prompts that it was kept for, which are recognised by their keys (cache_identity.py). A segment is the layers
between two merges, which all see tokens of one length.
Shapes: B prompts, P tokens in the cache, T tokens of this forward pass.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava_pitome.hooks.cache_identity import UNKNOWN, CacheIdentity

NAME = "token_merging"  # the attribute
ANOTHER_CONFIG = "this cache was filled under another merge config; start with a fresh one"


class SegmentCache(NamedTuple):
    """What the cache holds in the layers of one segment.

    Attributes:
        length: P.
        real: (B, P) False for padding; None: there is none.
        bias: (B, P) log sizes that are added to the scores of each key; None: none are.
    """

    length: int = 0
    real: Tensor | None = None
    bias: Tensor | None = None

    def extended(self, length: int, real: Tensor | None, bias: Tensor | None) -> "SegmentCache":
        """With `length` more tokens at the end."""
        return SegmentCache(
            self.length + length,
            _concatenated(self.real, real, self.length, length, torch.bool, 1),
            _concatenated(self.bias, bias, self.length, length, None, 0),
        )

    def selected(self, rows: Tensor) -> "SegmentCache":
        """Some of the prompts."""
        return self._replace(real=_select(self.real, rows), bias=_select(self.bias, rows))

    def cropped(self, length: int) -> "SegmentCache":
        """The first `length` tokens."""
        real, bias = (x if x is None else x[:, :length] for x in (self.real, self.bias))
        return SegmentCache(length, real, bias)


class CacheSettings(NamedTuple):
    """What of a config must be the same in all forward passes over one cache."""

    first_layers: tuple[int, ...]
    positions: str
    llm_proportional: bool


def _select(x: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if x is None else x[rows.to(x.device)]


class CacheState(NamedTuple):
    """The state kept with a cache.

    Attributes:
        settings: of the config that filled it.
        segments: what is known of each segment; None where nothing has merged.
        croppable: tokens after the last image, which may be cropped.
        shift: (B, 1) by how much position ids exceed the cache's length; None: they are not.
        identity: by what the prompts are recognised.
    """

    settings: CacheSettings
    segments: tuple[SegmentCache, ...] | None
    croppable: int
    shift: Tensor | None
    identity: CacheIdentity

    def selected(self, rows: Tensor) -> "CacheState":
        """The state of some of the prompts."""
        segments = self.segments and tuple(segment.selected(rows) for segment in self.segments)
        return self._replace(segments=segments, shift=_select(self.shift, rows))


def load_state(
    cache: Any, settings: CacheSettings, batch: int, attention_mask: Tensor | None
) -> CacheState | None:
    """The state kept with a cache, less what was cropped since; None for an empty cache.

    Args:
        cache: with `get_seq_length(layer)`.
        settings: of the config that is applied.
        batch: B.
        attention_mask: (B, P + T), or None.

    Raises:
        RuntimeError: the cache was filled under another config or elsewhere, its tensors were changed, it
            holds other prompts than the batch, or an image in it was cropped.
    """
    state: CacheState | None = getattr(cache, NAME, None)
    if cache.get_seq_length() == 0:  # it is new, or was reset
        vars(cache).pop(NAME, None)
        return None
    if state is None or (state.segments is None and state.identity.has_more(cache)):
        _check_plain_layers(cache, settings)
        return None
    if state.segments is not None and state.settings != settings:
        raise RuntimeError(ANOTHER_CONFIG)
    rows = len(cache.layers[0].keys)
    if rows != batch:
        raise RuntimeError(f"this cache holds {rows} prompts and is used for {batch}: give a prompt for each")
    if state.segments is not None:
        state = _cropped(cache, state)
    is_changed = not state.identity.is_unchanged(cache)
    if is_changed:
        state = state.selected(state.identity.rows(cache))
    if state.segments is not None and attention_mask is not None:
        known = state.segments[0]
        if is_changed or attention_mask.shape[1] > known.length + 1:  # a step of generation goes on as before
            _check_mask(known, attention_mask)
    return state


def _cropped(cache: Any, state: CacheState) -> CacheState:
    """The state of what is left in a cache.

    Raises:
        RuntimeError: layers hold more tokens than are known, or lost some of an image, or different numbers.
    """
    first_layers = state.settings.first_layers
    cropped = state.segments[0].length - cache.get_seq_length()
    segments = []
    for s, segment in enumerate(state.segments):
        for layer in range(first_layers[s], (*first_layers, len(cache.layers))[s + 1]):
            length = cache.get_seq_length(layer)
            if length > segment.length:
                raise RuntimeError(
                    f"layer {layer} of this cache holds {length} tokens, but {segment.length} are known to "
                    "it: it was filled while nothing merged, or under another merge config"
                )
            if segment.length - length != cropped or cropped > state.croppable:
                raise RuntimeError(
                    f"layer {layer} of this cache lost {segment.length - length} tokens, but only "
                    f"{state.croppable} come after its last image: tokens that merged cannot be cropped"
                )
        segments.append(segment.cropped(segment.length - cropped) if cropped else segment)
    return state._replace(segments=tuple(segments), croppable=state.croppable - cropped)


def _check_mask(known: SegmentCache, attention_mask: Tensor) -> None:
    """Raises RuntimeError where a mask (B, P + T) hides other tokens of the cache than its padding."""
    given = attention_mask[:, : known.length].bool()
    real = torch.ones_like(given) if known.real is None else known.real.to(given.device)
    if not torch.equal(given, real):
        raise RuntimeError(
            "attention_mask hides other tokens of this cache than when it was filled: select, repeat and "
            "reorder its rows as those of the cache"
        )


def _check_plain_layers(cache: Any, settings: CacheSettings) -> None:
    """Raises RuntimeError for a cache without state that may hold merged tokens.

    Where a config merges in the language model alone, without sizes and positions that differ, layers of one
    length hold none: a model that did not merge filled it.
    """
    lengths = {layer.get_seq_length() for layer in cache.layers}
    if len(lengths) > 1 or settings.positions != "packed" or settings.llm_proportional:
        raise RuntimeError(UNKNOWN)


def save_state(cache: Any, state: CacheState) -> None:
    """Keeps on a cache what `load_state` returns."""
    setattr(cache, NAME, state)


def has_merged(cache: Any) -> bool:
    """Whether tokens have merged in a cache."""
    state: CacheState | None = getattr(cache, NAME, None)
    return state is not None and state.segments is not None


def check_plain(cache: Any) -> None:
    """Raises RuntimeError for a cache in which tokens have merged, or whose layers differ in length."""
    if cache is None or not cache.get_seq_length():
        return
    lengths = {layer.get_seq_length() for layer in getattr(cache, "layers", ())}
    if has_merged(cache) or (len(lengths) > 1 and type(cache).__name__ == "DynamicCache"):
        raise RuntimeError(ANOTHER_CONFIG)


def mask(
    now: SegmentCache, queries: int, is_causal: bool, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """The additive attention mask (B or 1, 1, T, P + T) of the last `queries` tokens of `now`.

    None where the kernel needs none: a single query that sees everything, or, where the kernel is causal
    without a mask (`is_causal`), a first forward pass without padding or bias.
    """
    total = now.length
    if now.real is None and now.bias is None and (queries == 1 or (is_causal and queries == total)):
        return None
    position = torch.arange(total, device=device)
    visible = position <= position[total - queries :, None]  # (T, P + T)
    visible = visible[None, None]
    if now.real is not None:
        visible = visible & now.real.to(device)[:, None, None]
    scores = torch.zeros((), dtype=dtype, device=device)
    if now.bias is not None:
        scores = now.bias.to(device, dtype)[:, None, None]
    return torch.where(visible, scores, torch.finfo(dtype).min)


def cast(mask: Tensor, like: Tensor) -> Tensor:
    """A mask in the dtype and on the device of `like`, without infinities from a wider dtype."""
    if mask.dtype != like.dtype:
        mask = mask.to(like.dtype).clamp(min=torch.finfo(like.dtype).min)
    return mask.to(like.device)


def biased(
    mask_given: Tensor | None, now: SegmentCache, queries: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A model's own attention mask with the bias of `now` added; None becomes a causal one."""
    if mask_given is None:
        return mask(now, queries, False, dtype, device)
    bias = now.bias.to(mask_given.device, dtype)[:, None, None]
    if mask_given.dtype == torch.bool:
        return torch.where(mask_given, bias, torch.finfo(dtype).min)
    return (mask_given + bias).clamp(min=torch.finfo(dtype).min)


def padding_mask(now: SegmentCache, batch: int, device: torch.device) -> Tensor:
    """The padding mask (B, P + T) that flash attention takes.

    There is one even without padding: without a mask transformers takes position ids with gaps, which
    merged tokens have, for packed sequences.
    """
    if now.real is not None:
        return now.real.to(device)
    return torch.ones(batch, now.length, dtype=torch.bool, device=device)


def _concatenated(
    first: Tensor | None, second: Tensor | None, p: int, t: int, dtype: torch.dtype | None, fill: int
) -> Tensor | None:
    """(B, p) and (B, t) as (B, p + t), either of which may be None for `fill` everywhere."""
    if first is None and second is None:
        return None
    known = first if first is not None else second
    dtype = dtype or known.dtype
    parts = [
        x.to(known.device)
        if x is not None
        else torch.full((len(known), n), fill, dtype=dtype, device=known.device)
        for x, n in ((first, p), (second, t))
    ]
    return torch.cat(parts, 1)
