"""The state kept with a KV cache whose layers differ in length, and the attention masks that follow from it.

A cache has the length of its layers, but not which of their tokens are padding. That is kept as an attribute
of the cache, and so is copied with it; generate, beams and later turns find it there. A segment is the
layers between two merges, which all see tokens of one length.
Shapes: B prompts, P tokens in the cache, T tokens of this forward pass.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

NAME = "token_merging"  # the attribute


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

    def cropped(self, length: int) -> "SegmentCache":
        """The first `length` tokens."""
        real, bias = (x if x is None else x[:, :length] for x in (self.real, self.bias))
        return SegmentCache(length, real, bias)


class CacheSettings(NamedTuple):
    """What of a config must be the same in all forward passes over one cache."""

    first_layers: tuple[int, ...]
    positions: str
    llm_proportional: bool


class CacheState(NamedTuple):
    """The state kept with a cache.

    Attributes:
        settings: of the config that filled it.
        segments: what is known of each segment.
        croppable: tokens after the last image, which may be cropped.
        shift: (B, 1) by how much position ids exceed the cache's length; None: they are not.
    """

    settings: CacheSettings
    segments: tuple[SegmentCache, ...]
    croppable: int
    shift: Tensor | None = None


def load_state(cache: Any, settings: CacheSettings, batch: int) -> CacheState | None:
    """The state kept with a cache, less what was cropped since; None where nothing has merged in it.

    Args:
        cache: with `get_seq_length(layer)`.
        settings: of the config that is applied.
        batch: B.

    Raises:
        RuntimeError: the cache was filled under another config, its prompts were selected or repeated, or an
            image in it was cropped.
    """
    state = getattr(cache, NAME, None)
    if state is None:
        return None
    if cache.get_seq_length() == 0:  # it was reset
        delattr(cache, NAME)
        return None
    if state.settings != settings:
        raise RuntimeError("this cache was filled under another merge config; start with a fresh one")
    cropped = state.segments[0].length - cache.get_seq_length()
    segments = []
    for segment, layer in zip(state.segments, settings.first_layers):
        length = cache.get_seq_length(layer)
        if length > segment.length:
            raise RuntimeError(
                f"layer {layer} of this cache holds {length} tokens, but {segment.length} are known to it: "
                "it was filled while nothing merged, or under another merge config"
            )
        rows = next((len(x) for x in (segment.real, segment.bias, state.shift) if x is not None), batch)
        if rows != batch:
            raise RuntimeError(
                f"this cache was filled for {rows} prompts and is used for {batch}: select or repeat prompts "
                "before prefill"
            )
        if segment.length - length != cropped or cropped > state.croppable:
            raise RuntimeError(
                f"layer {layer} of this cache lost {segment.length - length} tokens, but only "
                f"{state.croppable} come after its last image: tokens that merged cannot be cropped"
            )
        segments.append(segment if length == segment.length else segment.cropped(length))
    return CacheState(settings, tuple(segments), state.croppable - cropped, state.shift)


def save_state(cache: Any, state: CacheState) -> None:
    """Keeps on a cache what `load_state` returns."""
    setattr(cache, NAME, state)


def has_state(cache: Any) -> bool:
    """Whether tokens have merged in a cache."""
    return getattr(cache, NAME, None) is not None


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
