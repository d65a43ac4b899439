"""From a method's name to who joins whom: checks, rounds where most go, and what methods leave unsaid."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llava_pitome.kernels import triton_takes
from llava_pitome.merge.plan import compose, make_plan
from llava_pitome.merge.reduce import MergeResult, reduce_tokens
from llava_pitome.methods import METHOD_INPUTS, METHODS, Method


def parents(metric: Tensor, remove: int, method: str = "pitome", **parameters) -> Tensor:
    """The token each token folds into: (B, N) int64, itself for the N - remove that survive.

    Methods that pair tokens up remove at most half of them at once; more is removed in rounds, each matched
    on the averages that the round before has left.

    Args:
        metric: (B, N, D) what similarity is measured on, without the class token.
        remove: tokens that go, 0 to N - 1.
        method: a name in METHODS.
        **parameters: the method's own, see its file, and what it needs of GIVEN.

    Raises:
        ValueError: an unknown method or parameter, a metric that is not (B, N, D), or `remove` out of range.
    """
    given = {k: v for k, v in parameters.items() if k in METHOD_INPUTS}
    own = {k: v for k, v in parameters.items() if k not in METHOD_INPUTS}
    check(method, own)
    needs = METHODS[method].needs
    if idle := [name for name in given if name not in needs]:
        raise ValueError(
            f"method {method!r} has no use for {', '.join(idle)}; it needs {', '.join(needs) or 'nothing'}"
        )
    if metric.ndim != 3:
        raise ValueError(f"metric has shape {tuple(metric.shape)}; it must be (images, tokens, channels)")
    if not metric.is_floating_point():
        raise ValueError(f"metric has dtype {metric.dtype}; it must be floating point")
    count = metric.shape[1]
    if not isinstance(remove, int) or not 0 <= remove < max(count, 1):
        raise ValueError(f"remove={remove} does not fit {count} tokens; allowed is 0 to {max(count - 1, 0)}")
    if missing := [name for name in needs if name not in given]:
        raise ValueError(f"method {method!r} needs {', '.join(missing)}, which was not given")
    return choose(metric, remove, method, **given, **own).parent


def choose(
    metric: Tensor, remove: int, method: str, *, ordered: bool = False, triton: bool = False, **parameters
) -> MergeResult:
    """What a method chooses, without the checks of `parents`, for callers whose config was checked.

    Args:
        metric: (B, N, D) what similarity is measured on.
        remove: tokens that go, 0 to N - 1.
        method: a name in METHODS.
        ordered: ask for the layout of the method's authors, where they have one.
        triton: prefer a GPU kernel.
        **parameters: the method's own, depth, and what it needs of GIVEN.
    """
    count, found = metric.shape[1], METHODS[method]
    if remove == 0:
        return MergeResult(_themselves(metric))
    if ordered and found.ordered:
        parent, rank = found.ordered(metric, min(remove, count // 2), **parameters)
        if remove > count // 2:
            parent = _rounds(metric, remove, found, found.parents, parameters).parent
        return MergeResult(parent, rank=rank)
    find = found.triton if triton and found.triton and triton_takes(metric) else found.find
    if found.halves and remove > count // 2:
        return _rounds(metric, remove, found, find, parameters)
    return _chosen(found, find, metric, remove, parameters)


def _chosen(
    found: Method, find: Callable[..., Any], metric: Tensor, remove: int, parameters: dict
) -> MergeResult:
    """What one call of a method's function chooses."""
    said = find(metric, remove, **parameters)
    if find is found.kept:
        return MergeResult(_parents_of(said, metric.shape[1]), prunes=True)
    if find is found.mixed:
        return MergeResult(said[0], mixing=said[1])
    if find is found.weighted:
        return MergeResult(said[0], weight=said[1], keeps_norm=found.keeps_norm)
    return MergeResult(said, keeps_norm=found.keeps_norm)


def _rounds(
    metric: Tensor, remove: int, found: Method, find: Callable[..., Any], parameters: dict
) -> MergeResult:
    """One choice for several, each of which pairs up what the one before has left."""
    count = metric.shape[1]
    parent, weight = _themselves(metric), None
    size = torch.ones(metric.shape[:2], device=metric.device)
    laid = make_plan(parent, count)
    while remove:
        step = min(remove, metric.shape[1] // 2)
        later = _chosen(found, find, metric, step, parameters)
        if later.weight is not None:
            lifted = later.weight.gather(1, laid.slot)
            weight = lifted if weight is None else weight * lifted
        parent = compose(later.parent, laid)
        metric, size = reduce_tokens(metric, size, make_plan(later.parent, metric.shape[1] - step), later)
        laid = make_plan(parent, metric.shape[1])
        remove -= step
    return MergeResult(parent, weight=weight, keeps_norm=found.keeps_norm)


def _themselves(metric: Tensor) -> Tensor:
    """Everybody stays: (B, N)."""
    return torch.arange(metric.shape[1], device=metric.device).repeat(metric.shape[0], 1)


def _parents_of(kept: Tensor, count: int) -> Tensor:
    """Parents (B, N) where those who go leave nothing behind: the survivor in front of them, or the first."""
    here = torch.arange(count, device=kept.device).repeat(len(kept), 1)
    stays = torch.zeros_like(here).scatter_(1, kept, kept)
    return torch.maximum(stays.cummax(1).values, kept[:, :1])


def parameters_of(method: str) -> tuple[str, ...]:
    """The names of a method's own parameters."""
    found = METHODS[method]
    asked = inspect.signature(found.find).parameters.items()
    return tuple(n for n, p in asked if p.kind is p.KEYWORD_ONLY and n not in ("depth", *found.needs))


def check(method: str, parameters: dict) -> None:
    """Raises ValueError for a name that METHODS lacks, or parameters that the method does not take."""
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; allowed are {', '.join(METHODS)}")
    own = parameters_of(method)
    for name in parameters:
        if name not in (*own, "depth"):
            raise ValueError(
                f"method {method!r} has no parameter {name!r}; it takes {', '.join(own) or 'none'}"
            )
    given = {name: METHOD_INPUTS[name] for name in METHODS[method].needs}
    METHODS[method].find(
        torch.eye(4).unsqueeze(0), 1, **given, **parameters
    )  # raises on values it cannot take
