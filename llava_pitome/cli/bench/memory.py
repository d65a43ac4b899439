"""Peak memory of one call: the CUDA allocator's statistics, or the tensors that operations return on CPUs.

resource and psutil report the memory of the process, whose peak never falls and which keeps what was freed:
they cannot tell variants in one process apart.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Returns the most bytes that `work` holds at one time, beyond those allocated before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _AllocationCounter() as counter, torch.no_grad():
        work()
    return counter.peak


class _AllocationCounter(TorchDispatchMode):
    """Counts the bytes of live tensors that operations returned, without buffers inside an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        inputs = {_storage_id(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if not isinstance(x, torch.Tensor) or (key := _storage_id(x)) in inputs | self._counted:
                continue  # a view, or an operation in place
            storage = x.untyped_storage()
            self._counted.add(key)
            self.current += storage.nbytes()
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self._free, key, storage.nbytes())
        return out

    def _free(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.current -= size


def _storage_id(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata
