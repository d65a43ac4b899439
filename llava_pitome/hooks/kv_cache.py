"""The state kept with a KV cache whose layers differ in length, and the attention masks that follow from it.

A cache has the length of its layers, but not which of their tokens are padding. That is kept as an attribute
of the cache, and so is copied with it; generate, beams and later turns find it there. Whoever changes the
cache's tensors meanwhile (crops, reorders or moves them, or puts a cache together from others) leaves them
different from a few that were noted, and the state is used only where it still holds.
A segment is the layers between two merges, which all see tokens of one length.
Shapes: B prompts, P tokens in the cache, T tokens of this forward pass, H heads, C channels a head.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava_pitome.hooks.prompt_layout import PromptLayout
from llava_pitome.merge.plan import gather_tokens

NAME = "token_merging"  # the attribute
NOTED = 8  # tokens of a forward pass whose keys are noted, besides those of images
ANOTHER_CONFIG = "this cache was filled under another merge config; start with a fresh one"
UNKNOWN = (
    "this cache was not filled by this model under the merge config that is applied, or its tensors were "
    "changed since: where its tokens merged is unknown; start with a fresh one"
)


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


class NotedKeys(NamedTuple):
    """A few keys of the first layer, by which the prompts of a cache are recognised.

    Attributes:
        all: (B, H, P, C) the layer's keys as the last forward pass left them.
        positions: (B, K) of the tokens whose keys are noted.
        keys: (B, K, C) theirs, of the first head.
    """

    all: Tensor
    positions: Tensor
    keys: Tensor

    def rows(self, keys: Tensor) -> Tensor | None:
        """Which of the noted prompts each row of the first layer's keys (B', H, P', C) holds: (B',).

        None where the keys are the very ones that the last forward pass left. A cache may have been cropped
        since, and its rows reordered, selected or repeated.

        Raises:
            RuntimeError: a row holds none of them.
        """
        if keys is self.all:
            return None
        now, noted = keys.detach()[:, 0], self.keys.to(keys.device)
        if now.shape[2] != noted.shape[2] or now.dtype != noted.dtype:
            raise RuntimeError(UNKNOWN)
        positions = self.positions.to(keys.device)
        is_there = positions < now.shape[1]
        found = now[:, positions.clamp(max=now.shape[1] - 1)]  # (B', B, K, C)
        same = ((found == noted).all(3) | ~is_there).all(2)  # (B', B)
        if not bool(same.any(1).all()):
            raise RuntimeError(UNKNOWN)
        own = torch.eye(*same.shape, dtype=torch.bool, device=same.device) & same
        return (same.to(torch.uint8) + own).argmax(1)  # its own place first, where prompts are alike

    def extended(self, keys: Tensor, more: Tensor | None) -> "NotedKeys":
        """With the layer's keys after one more forward pass, noted also at `more` (B, K')."""
        if more is None:
            return self._replace(all=keys)
        later = note_keys(keys, more)
        positions = torch.cat([self.positions.to(keys.device), later.positions], 1)
        return NotedKeys(keys, positions, torch.cat([self.keys.to(keys.device), later.keys], 1))

    def selected(self, rows: Tensor, length: int) -> "NotedKeys":
        """The noted keys of some prompts among the first `length` tokens, where later ones were cropped."""
        positions, keys = _select(self.positions, rows), _select(self.keys, rows)
        is_there = positions < length
        return self._replace(
            positions=positions.where(is_there, positions[:, :1]),
            keys=keys.where(is_there.unsqueeze(2), keys[:, :1]),
        )


def note_keys(keys: Tensor, positions: Tensor) -> NotedKeys:
    """Notes the first layer's keys (B, H, P, C) at positions (B, K)."""
    positions = positions.to(keys.device)
    return NotedKeys(keys, positions, gather_tokens(keys.detach()[:, 0].contiguous(), positions))


def positions_to_note(first: int, length: int, layout: PromptLayout | None, rows: int) -> Tensor:
    """Positions (B, K) in a cache of tokens whose keys tell prompts apart: evenly spread, and two an image.

    Args:
        first: tokens in the cache before the forward pass.
        length: T.
        layout: where the images are; None: there are none.
        rows: B.
    """
    spread = sorted({i * (length - 1) // (NOTED - 1) for i in range(NOTED)})
    device = "cpu" if layout is None else layout.images.device
    found = torch.tensor(spread, device=device).expand(rows, -1)
    if layout is not None:
        each = torch.zeros(rows, max(layout.counts), 2, dtype=torch.long, device=device)
        ends = layout.images[:, [0, -1]] % length  # (I, 2)
        slot = [i for count in layout.counts for i in range(count)]
        each[layout.row, torch.tensor(slot, device=device)] = ends
        found = torch.cat([found, each.flatten(1)], 1)
    return found + first


def _select(x: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if x is None else x[rows.to(x.device)]


class CacheState(NamedTuple):
    """The state kept with a cache.

    Attributes:
        settings: of the config that filled it.
        segments: what is known of each segment; None where nothing has merged.
        croppable: tokens after the last image, which may be cropped.
        shift: (B, 1) by how much position ids exceed the cache's length; None: they are not.
        noted: by what the cache is recognised.
    """

    settings: CacheSettings
    segments: tuple[SegmentCache, ...] | None
    croppable: int
    shift: Tensor | None
    noted: NotedKeys

    def selected(self, rows: Tensor, length: int) -> "CacheState":
        """The state of some of the prompts, whose first `length` tokens are left in the first layer."""
        segments = self.segments and tuple(segment.selected(rows) for segment in self.segments)
        shift, noted = _select(self.shift, rows), self.noted.selected(rows, length)
        return self._replace(segments=segments, shift=shift, noted=noted)


def load_state(cache: Any, settings: CacheSettings, batch: int) -> CacheState | None:
    """The state kept with a cache, less what was cropped since; None for an empty cache.

    Args:
        cache: with `get_seq_length(layer)`.
        settings: of the config that is applied.
        batch: B.

    Raises:
        RuntimeError: the cache was filled under another config or elsewhere, its tensors were changed, it
            holds another number of prompts, or an image in it was cropped.
    """
    state: CacheState | None = getattr(cache, NAME, None)
    if cache.get_seq_length() == 0:  # it is new, or was reset
        vars(cache).pop(NAME, None)
        return None
    if state is None:
        _check_plain_layers(cache, settings)
        return None
    if state.segments is not None and state.settings != settings:
        raise RuntimeError(ANOTHER_CONFIG)
    keys = cache.layers[0].keys
    if len(keys) != batch:
        raise RuntimeError(
            f"this cache holds {len(keys)} prompts and is used for {batch}: give a prompt for each"
        )
    rows = state.noted.rows(keys)
    if rows is not None:
        state = state.selected(rows, keys.shape[2])
    if state.segments is None:
        return state
    cropped = state.segments[0].length - cache.get_seq_length()
    segments = []
    for segment, layer in zip(state.segments, settings.first_layers):
        length = cache.get_seq_length(layer)
        if length > segment.length:
            raise RuntimeError(
                f"layer {layer} of this cache holds {length} tokens, but {segment.length} are known to it: "
                "it was filled while nothing merged, or under another merge config"
            )
        if segment.length - length != cropped or cropped > state.croppable:
            raise RuntimeError(
                f"layer {layer} of this cache lost {segment.length - length} tokens, but only "
                f"{state.croppable} come after its last image: tokens that merged cannot be cropped"
            )
        segments.append(segment if length == segment.length else segment.cropped(length))
    return state._replace(segments=tuple(segments), croppable=state.croppable - cropped)


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
    """Raises RuntimeError for a cache that a config which reaches the language model filled."""
    if cache is not None and has_merged(cache) and cache.get_seq_length():
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
