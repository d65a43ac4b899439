"""Peak memory of a piece of work: of the tensors that operations return on CPUs, the allocator's on CUDA."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors that operations made and that are still there.

    What an operation uses inside itself and gives back is not seen.

    Attributes:
        now: bytes that are there.
        most: the most there ever were.
    """

    def __init__(self) -> None:
        """Starts at zero: what was there before does not count."""
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Runs an operation and counts what it made."""
        before = {id_ for x in tree_leaves((args, kwargs)) if (id_ := _storage(x)) is not None}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            key = _storage(x)
            if key is None or key in before or key in self._seen:
                continue
            storage = x.untyped_storage()
            self._seen.add(key)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, key, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _storage(x: Any) -> int | None:
    return x.untyped_storage()._cdata if isinstance(x, torch.Tensor) else None


def peak(work: Callable[[], Any], device: torch.device) -> int:
    """Bytes that `work` allocates at most at one time, on top of what is there before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with Peak() as found, torch.no_grad():
        work()
    return found.most
