"""Who joins whom: one file a method, and the dict that names them.

A method is a pure function `parents(metric, remove, *, depth, **parameters) -> parent`. To add one, write
its file and its line in METHODS; every test and every place then takes it.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llava_pitome.kernels import triton_takes
from llava_pitome.merging import compose, merge, plan
from llava_pitome.methods import pitome, random, tome


class Method(NamedTuple):
    """A method's functions.

    Attributes:
        parents: (metric (B, N, D), remove <= N // 2, depth=..., **parameters) to parent (B, N).
        ordered: the same arguments to `parents` and ranks (B, N) of the survivors, for methods whose authors
            do not keep raster order.
        triton: the same as `parents` on a GPU; its file is imported when it is called.
    """

    parents: Callable[..., Tensor]
    ordered: Callable[..., tuple[Tensor, Tensor]] | None = None
    triton: Callable[..., Tensor] | None = None


def _pitome_in_triton(metric: Tensor, remove: int, **parameters) -> Tensor:
    """`pitome.parents` on a GPU."""
    from llava_pitome.kernels import matching_triton

    return matching_triton.parents(metric, remove, *pitome.resolved(**parameters))


METHODS: dict[str, Method] = {
    "pitome": Method(pitome.parents, pitome.ordered, _pitome_in_triton),
    "tome": Method(tome.parents),
    "random": Method(random.parents),
}


def parents(metric: Tensor, remove: int, method: str = "pitome", **parameters) -> Tensor:
    """The token each token folds into: (B, N) int64, itself for the N - remove that survive.

    Methods pair tokens up and so remove at most half of them at once; more is removed in rounds, each matched
    on the averages that the round before has left.

    Args:
        metric: (B, N, D) what similarity is measured on, without the class token.
        remove: tokens that go, 0 to N - 1.
        method: a name in METHODS.
        **parameters: the method's own, see its file.

    Raises:
        ValueError: an unknown method or parameter, a metric that is not (B, N, D), or `remove` out of range.
    """
    check(method, parameters)
    if metric.ndim != 3:
        raise ValueError(f"metric has shape {tuple(metric.shape)}; it must be (images, tokens, channels)")
    if not metric.is_floating_point():
        raise ValueError(f"metric has dtype {metric.dtype}; it must be floating point")
    count = metric.shape[1]
    if not isinstance(remove, int) or not 0 <= remove < max(count, 1):
        raise ValueError(f"remove={remove} does not fit {count} tokens; allowed is 0 to {max(count - 1, 0)}")
    return match(metric, remove, method, **parameters)


def ordered(metric: Tensor, remove: int, method: str, **parameters) -> tuple[Tensor, Tensor | None]:
    """`match`, and the ranks (B, N) in which the method's authors lay survivors out; None: raster."""
    find, half = METHODS[method].ordered, metric.shape[1] // 2
    if find is None:
        return match(metric, remove, method, **parameters), None
    parent, rank = find(metric, min(remove, half), **parameters)
    return (parent if remove <= half else match(metric, remove, method, **parameters)), rank


def match(metric: Tensor, remove: int, method: str, triton: bool = False, **parameters) -> Tensor:
    """`parents` without its checks, for callers whose config was checked; `triton` prefers a GPU kernel."""
    count = metric.shape[1]
    found = METHODS[method]
    find = found.triton if triton and found.triton and triton_takes(metric) else found.parents
    if 0 < remove <= count // 2:
        return find(metric, remove, **parameters)
    parent = torch.arange(count, device=metric.device).repeat(metric.shape[0], 1)
    size = torch.ones(metric.shape[:2], device=metric.device)
    laid = plan(parent, count)
    while remove:
        step = min(remove, metric.shape[1] // 2)
        later = find(metric, step, **parameters)
        parent = compose(later, laid)
        metric, size = merge(metric, size, plan(later, metric.shape[1] - step))
        laid = plan(parent, metric.shape[1])
        remove -= step
    return parent


def check(method: str, parameters: dict) -> None:
    """Raises ValueError for a name that METHODS lacks, or parameters that the method does not take."""
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; allowed are {', '.join(METHODS)}")
    taken = [
        n
        for n, p in inspect.signature(METHODS[method].parents).parameters.items()
        if p.kind is p.KEYWORD_ONLY
    ]
    own = [name for name in taken if name != "depth"]
    for name in parameters:
        if name not in taken:
            raise ValueError(
                f"method {method!r} has no parameter {name!r}; it takes {', '.join(own) or 'none'}"
            )
    METHODS[method].parents(
        torch.eye(4).unsqueeze(0), 1, **parameters
    )  # raises on values that it does not take
