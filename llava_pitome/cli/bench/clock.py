"""When the stages of a model start and stop, by hooks around them; on CUDA by events: nothing waits."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn


class Span(NamedTuple):
    """One call of a stage: seconds from the start of the whole to its start and its stop."""

    start: float
    stop: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.stop - self.start


def timed(
    work: Callable[[], Any], stages: dict[str, nn.Module], device: torch.device
) -> dict[str, list[Span]]:
    """Runs `work` once: the spans of every stage in order, and under "all" the one of the whole.

    Args:
        work: what is timed.
        stages: modules that it calls, by the name to give them.
        device: where they compute.
    """
    now = _event if device.type == "cuda" else time.perf_counter
    opened: dict[str, Any] = {}
    closed: list[tuple[str, Any, Any]] = []
    handles = []
    for name, module in stages.items():
        handles.append(module.register_forward_pre_hook(partial(_start, opened, now, name), prepend=True))
        handles.append(module.register_forward_hook(partial(_stop, opened, closed, now, name)))
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = now()
    try:
        work()
        end = now()
    finally:
        for handle in handles:
            handle.remove()
    if device.type == "cuda":
        torch.cuda.synchronize()
    spans: dict[str, list[Span]] = {"all": [Span(0.0, _between(begin, end))]}
    for name, start, stop in closed:
        spans.setdefault(name, []).append(Span(_between(begin, start), _between(begin, stop)))
    return spans


def _start(opened: dict, now: Callable[[], Any], name: str, *_: Any) -> None:
    opened[name] = now()


def _stop(opened: dict, closed: list, now: Callable[[], Any], name: str, *_: Any) -> None:
    closed.append((name, opened.pop(name), now()))


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, stop: Any) -> float:
    """Seconds between two readings of the clock."""
    return stop - start if isinstance(start, float) else start.elapsed_time(stop) / 1000
