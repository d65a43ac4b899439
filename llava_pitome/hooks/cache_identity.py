"""Recognising the prompts of a KV cache by values of its keys, whatever was done with the cache meanwhile.

Between forward passes a cache is cropped, moved, pickled or put together again, and its prompts are selected,
repeated or reordered. What is kept with it holds only for the prompts that it was kept for. A segment is the
layers between two merges; the keys of its first layer depend on all tokens that merged before.
Shapes: B prompts, P tokens in the cache, H heads, C channels a head.
"""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

CHANNELS = 2  # of the first head's keys that are compared, for every token
UNKNOWN = (
    "this cache was not filled under the merge config that is applied, or its tensors were changed since: "
    "where its tokens merged is unknown; start with a fresh one"
)


class SeenTensor:
    """A tensor as it was when it was seen, which is not kept alive. A copy of this has seen none."""

    def __init__(self, tensor: Tensor | None = None):
        """Notes which tensor it is, and that it was not written to since."""
        self._tensor: Any = tensor if tensor is None or is_compiling() else weakref.ref(tensor)
        self._version = None if tensor is None else _version(tensor)

    def is_unchanged(self, tensor: Tensor) -> bool:
        """Whether it is this tensor, and nobody has written to it."""
        seen = self._tensor() if isinstance(self._tensor, weakref.ref) else self._tensor
        return seen is tensor and self._version is not None and self._version == _version(tensor)

    def __deepcopy__(self, _memo: dict) -> "SeenTensor":
        """Of a copied cache, whose tensors are others."""
        return SeenTensor()

    def __reduce__(self) -> tuple:
        """For pickle."""
        return SeenTensor, ()


class CacheIdentity(NamedTuple):
    """By what the prompts of a cache are recognised.

    Attributes:
        layers: the first layer of each segment.
        seen: the keys of each of these layers, after the last forward pass.
        values: (B, P, CHANNELS) of them, for each.
    """

    layers: tuple[int, ...]
    seen: tuple[SeenTensor, ...]
    values: tuple[Tensor, ...]

    def is_unchanged(self, cache: Any) -> bool:
        """Whether a cache holds the very keys that the last forward pass left."""
        return all(seen.is_unchanged(cache.layers[i].keys) for i, seen in zip(self.layers, self.seen))

    def has_more(self, cache: Any) -> bool:
        """Whether a cache holds more tokens than were there."""
        return any(cache.get_seq_length(i) > x.shape[1] for i, x in zip(self.layers, self.values))

    def rows(self, cache: Any) -> Tensor:
        """Which prompt each row of a cache, of as many tokens or fewer, holds: (rows,).

        Raises:
            RuntimeError: a row holds none of them.
        """
        same: Tensor | None = None
        for i, noted in zip(self.layers, self.values):
            now = _values(cache.layers[i].keys)
            if now.dtype != noted.dtype or now.shape[2] != noted.shape[2]:
                raise RuntimeError(UNKNOWN)
            known = noted.to(now.device)[:, : now.shape[1]]
            found = (now[:, None] == known).flatten(2).all(2)  # (rows, B)
            same = found if same is None else same & found.to(same.device)
        if not bool(same.any(1).all()):
            raise RuntimeError(UNKNOWN)
        own = torch.eye(*same.shape, dtype=torch.bool, device=same.device) & same
        return (same.to(torch.uint8) + own).argmax(1)  # its own place first, where prompts are alike


def identify(cache: Any, layers: tuple[int, ...]) -> CacheIdentity:
    """By what a cache is recognised later; `layers` are the first ones of each segment."""
    keys = [cache.layers[i].keys for i in layers]
    return CacheIdentity(layers, tuple(map(SeenTensor, keys)), tuple(_values(x).clone() for x in keys))


def _values(keys: Tensor) -> Tensor:
    """The values (B, P, CHANNELS) of keys (B, H, P, C) that are compared."""
    return keys.detach()[:, 0, :, :CHANNELS]


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None where torch does not count that, as in inference mode."""
    if is_compiling():
        return 0
    return None if tensor.is_inference() else getattr(tensor, "_version", None)
