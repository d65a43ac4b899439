"""What a KV cache whose layers differ in length has to remember, and the attention masks that follow.

A cache says how long its layers are, not which of their tokens are padding. That is kept as an attribute of
the cache itself, and so is copied with it; generate, beams and later turns find it there.
Shapes: B prompts, P tokens in the cache, T tokens of this pass.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

NAME = "token_merging"  # the attribute


class SegmentCache(NamedTuple):
    """What is in the cache of the layers between two merges.

    Attributes:
        length: P.
        real: (B, P) False for padding; None: there is none.
        bias: (B, P) added to the scores of each key; None: nothing is.
    """

    length: int = 0
    real: Tensor | None = None
    bias: Tensor | None = None

    def grown(self, length: int, real: Tensor | None, bias: Tensor | None) -> "SegmentCache":
        """With `length` further tokens behind."""
        return SegmentCache(
            self.length + length,
            _joined(self.real, real, self.length, length, torch.bool, 1),
            _joined(self.bias, bias, self.length, length, None, 0),
        )

    def cut(self, length: int) -> "SegmentCache":
        """The first `length` tokens, as where a cache was cropped."""
        real, bias = (x if x is None else x[:, :length] for x in (self.real, self.bias))
        return SegmentCache(length, real, bias)


class CacheState(NamedTuple):
    """What a cache remembers.

    Attributes:
        first_layers: the first layer of each stretch.
        way: what of the config passes over one cache must have in common.
        past: what is known of each stretch.
        open: tokens behind the last image, which may be cropped.
        shift: (B, 1) by how much positions are ahead of what the cache's length says; None: they are not.
    """

    first_layers: tuple[int, ...]
    way: tuple[str, bool]
    past: tuple[SegmentCache, ...]
    open: int
    shift: Tensor | None = None


def recall(cache: Any, first_layers: tuple[int, ...], way: tuple[str, bool], batch: int) -> CacheState | None:
    """What a cache remembers, less what was cropped since; None where nothing has merged in it.

    Args:
        cache: with `get_seq_length(layer)`.
        first_layers: the first layer of each stretch.
        way: as in `Memory`.
        batch: B.

    Raises:
        RuntimeError: the cache was filled under another config, its prompts were picked or repeated, or an
            image in it was cropped.
    """
    memory = getattr(cache, NAME, None)
    if memory is None:
        return None
    if cache.get_seq_length() == 0:  # it was reset
        delattr(cache, NAME)
        return None
    if (memory.first_layers, memory.way) != (first_layers, way):
        raise RuntimeError("this cache was filled under another merge config; start with a fresh one")
    gone = memory.past[0].length - cache.get_seq_length()
    found = []
    for stretch, layer in zip(memory.past, first_layers):
        there = cache.get_seq_length(layer)
        if there > stretch.length:
            raise RuntimeError(
                f"layer {layer} of this cache holds {there} tokens, but {stretch.length} are known to it: it "
                "was filled while nothing merged, or under another merge config"
            )
        rows = next((len(x) for x in (stretch.real, stretch.bias, memory.shift) if x is not None), batch)
        if rows != batch:
            raise RuntimeError(
                f"this cache was filled for {rows} prompts and is used for {batch}: pick or repeat prompts "
                "before prefill"
            )
        if stretch.length - there != gone or gone > memory.open:
            raise RuntimeError(
                f"layer {layer} of this cache lost {stretch.length - there} tokens, but only {memory.open} "
                "stand behind its last image: tokens that merged cannot be cropped"
            )
        found.append(stretch if there == stretch.length else stretch.cut(there))
    return CacheState(first_layers, way, tuple(found), memory.open - gone, memory.shift)


def remember(cache: Any, memory: CacheState) -> None:
    """Keeps on a cache what `recall` will ask for."""
    setattr(cache, NAME, memory)


def mask(
    now: SegmentCache, queries: int, plain: bool, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """The attention mask (B or 1, 1, T, P + T) of the last `queries` tokens of `now`, additive.

    None where the kernel needs none: a single query that sees everything, or, where `plain` says that the
    kernel is causal by itself, a first pass without padding or bias.
    """
    total = now.length
    if now.real is None and now.bias is None and (queries == 1 or (plain and queries == total)):
        return None
    here = torch.arange(total, device=device)
    sees = here <= here[total - queries :, None]  # (T, P + T)
    sees = sees[None, None]
    if now.real is not None:
        sees = sees & now.real.to(device)[:, None, None]
    scores = torch.zeros((), dtype=dtype, device=device)
    if now.bias is not None:
        scores = now.bias.to(device, dtype)[:, None, None]
    return torch.where(sees, scores, torch.finfo(dtype).min)


def cast(mask: Tensor, like: Tensor) -> Tensor:
    """A mask in the dtype and on the device of `like`; the lowest of a wider dtype would become infinite."""
    if mask.dtype != like.dtype:
        mask = mask.to(like.dtype).clamp(min=torch.finfo(like.dtype).min)
    return mask.to(like.device)


def biased(
    given: Tensor | None, now: SegmentCache, queries: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A model's own attention mask with the bias of `now` added; None becomes a causal one."""
    if given is None:
        return mask(now, queries, False, dtype, device)
    bias = now.bias.to(given.device, dtype)[:, None, None]
    if given.dtype == torch.bool:
        return torch.where(given, bias, torch.finfo(dtype).min)
    return (given + bias).clamp(min=torch.finfo(dtype).min)


def _joined(
    first: Tensor | None, second: Tensor | None, p: int, t: int, dtype: torch.dtype | None, fill: int
) -> Tensor | None:
    """Two rows of what may be None behind one another."""
    if first is None and second is None:
        return None
    some = first if first is not None else second
    kind = dtype or some.dtype
    parts = [
        x.to(some.device)
        if x is not None
        else torch.full((len(some), n), fill, dtype=kind, device=some.device)
        for x, n in ((first, p), (second, t))
    ]
    return torch.cat(parts, 1)
