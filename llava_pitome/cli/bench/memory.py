"""Peak memory of one call: the CUDA allocator's statistics, or the tensors that operations return on CPUs.

resource and psutil report the memory of the process, whose peak never falls and which keeps what was freed:
they cannot tell variants in one process apart.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

try:
    from torch.utils._python_dispatch import TorchDispatchMode
except ImportError:  # private; the public mode does not see the operations inside a composite one
    TorchDispatchMode = TorchFunctionMode


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
    """Records the peak of the bytes of live tensors that operations returned, without buffers inside them."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        inputs = _storages((args, kwargs))
        out = func(*args, **(kwargs or {}))
        self._live |= _storages(out) - inputs  # the output of a view or an operation in place is an input
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self._live))
        return out

    __torch_function__ = __torch_dispatch__  # of TorchFunctionMode


def _storages(tree: Any) -> set[torch.UntypedStorage]:
    """The storages of all tensors in nested lists, tuples and dicts."""
    if isinstance(tree, torch.Tensor):
        return {tree.untyped_storage()}
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return set().union(*map(_storages, parts))
