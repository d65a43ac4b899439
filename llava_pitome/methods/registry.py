"""The registry of merging methods, and the functions that run a method by its name.

Shapes: B images, N tokens before, M tokens after, D channels.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from llava_pitome.kernels import supports_triton
from llava_pitome.merge.plan import compose, make_plan
from llava_pitome.merge.reduce import MergeResult, full_precision, reduce_tokens
from llava_pitome.plain_values import plain

PLACES = ("tower", "prefix", "decoder")
PACKED = (torch.float4_e2m1fn_x2,)  # dtypes of several numbers in one element
METHOD_INPUTS = {  # what a place can provide to a method besides the metric
    "sizes": "(B, N) patches that each token stands for",
    "class_attention": "(B, N) attention of the class token, the mean over heads",
    "received_attention": "(B, N) attention that each token receives, the mean over heads and all queries",
    "last_attention": "(B, N) attention of the prompt's last token, the mean over heads",
    "text_attention": "(B, Q, N) attention of each text token, the mean over heads",
    "text": "(B, Q, D) the text tokens, in the space of the metric",
    "text_mask": "(B, Q) False where a text token is padding",
    "grid": "(rows, columns) of patches before any of them has merged",
}


class _Rule(NamedTuple):
    """The values that a parameter may have: its type (or the choices of a Literal), None, and bounds."""

    name: str
    kind: type
    choices: tuple
    optional: bool
    least: float
    most: float

    def check(self, value: Any) -> None:
        """Raises ValueError unless the value is allowed."""
        if (value is None and self.optional) or (self.choices and value in self.choices):
            return
        if self.kind is bool:
            if not isinstance(value, bool):
                raise ValueError(f"{self.name}={value!r} is not allowed: it must be True or False")
            return
        if self.choices:
            raise ValueError(f"{self.name}={value!r} is unknown; allowed are {', '.join(self.choices)}")
        number = isinstance(value, int if self.kind is int else int | float) and not isinstance(value, bool)
        if number and abs(value) < math.inf and self.least <= value <= self.most:
            return
        limits = (("from", self.least), ("to", self.most))
        bounds = "".join(f" {word} {limit}" for word, limit in limits if abs(limit) < math.inf)
        kind = "whole" if self.kind is int else "" if bounds else "finite"
        allowed = f"{kind} number{bounds}".lstrip()
        raise ValueError(f"{self.name}={value!r} is not allowed: it must be a {allowed}")


@dataclass(frozen=True)
class Method:
    """A merging method: a dataclass whose fields, made by `parameter`, are the method's own parameters.

    Attributes:
        needs: names in METHOD_INPUTS; `merge` receives them as keywords.
        places: names in PLACES where the method is defined, the paper's own first.
        pairs_tokens: pairs tokens up, so that one call can remove at most half of them. `choose` calls such a
            method repeatedly; it cannot have `needs`.
        prefix_metric: what similarity is measured on after the projector, where the config has None: the
            projected features or the tower's keys.
        has_order: returns an order of kept tokens of its own.
        needs_grid: "grid" is among `needs`; set by `register_method`.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    places: ClassVar[tuple[str, ...]] = PLACES
    pairs_tokens: ClassVar[bool] = False
    prefix_metric: ClassVar[Literal["features", "keys"]] = "features"
    has_order: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False
    _rules: ClassVar[tuple[_Rule, ...]] = ()

    def __post_init__(self) -> None:
        """Makes every parameter a plain number; raises ValueError for a value that is not allowed."""
        for rule in self._rules:
            given = getattr(self, rule.name)
            value = plain(given)
            if value is not given:
                object.__setattr__(self, rule.name, value)
            rule.check(value)

    def merge(self, metric: Tensor, remove: int, depth: float = 0.0, **inputs: Any) -> MergeResult:
        """Decides which tokens merge.

        Args:
            metric: (B, N, D) what similarity is measured on.
            remove: N - M, the number of tokens to remove, from 1.
            depth: l_i / l in [0, 1], the position of the layer in its encoder.
            **inputs: those named by `needs`.
        """
        raise NotImplementedError

    def merge_triton(self, metric: Tensor, remove: int, depth: float = 0.0, **inputs: Any) -> MergeResult:
        """`merge` by a Triton kernel, for methods that have one."""
        return self.merge(metric, remove, depth, **inputs)

    def energies(self, metric: Tensor, depth: float = 0.0) -> Tensor | None:
        """Returns the energies (B, N) by which the method ranks tokens; None for methods without."""
        return None


METHODS: dict[str, type[Method]] = {}


def parameter(default: Any, help: str, *, least: float = -math.inf, most: float = math.inf) -> Any:
    """Declares a parameter of a Method.

    Its annotation is its type: `int`, `float`, `bool`, `Literal[...]`, or one of these `| None`.

    Args:
        default: value.
        help: one line on what it does.
        least: smallest number allowed.
        most: largest number allowed.
    """
    return dataclasses.field(default=default, metadata={"help": help, "least": least, "most": most})


def register_method(name: str) -> Callable[[type[Method]], type[Method]]:
    """Returns a decorator that adds a subclass of Method to METHODS.

    Raises:
        ValueError: the name is another class's, or the class names unknown inputs or places.
    """

    def register(cls: type[Method]) -> type[Method]:
        known = METHODS.get(name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"method {name!r} is registered already, as {known.__module__}.{known.__qualname__}"
            )
        if any(isinstance(value, dataclasses.Field) for value in vars(cls).values()):
            raise ValueError(f"method {name!r} has parameters: make {cls.__name__} a dataclass(frozen=True)")
        for kind, names, allowed in (("needs", cls.needs, METHOD_INPUTS), ("places", cls.places, PLACES)):
            if unknown := [x for x in names if x not in allowed]:
                raise ValueError(f"method {name!r} {kind} {unknown[0]!r}; allowed are {', '.join(allowed)}")
        if cls.pairs_tokens and cls.needs:
            raise ValueError(f"method {name!r} runs in rounds, so it cannot need {', '.join(cls.needs)}")
        if plain := [f.name for f in dataclasses.fields(cls) if "least" not in f.metadata]:
            raise ValueError(f"method {name!r}: declare {plain[0]!r} with parameter(default, help)")
        hints = typing.get_type_hints(cls)
        cls._rules = tuple(_rule(field, hints[field.name]) for field in dataclasses.fields(cls))
        cls.needs_grid = "grid" in cls.needs
        METHODS[name] = cls
        return cls

    return register


def _rule(field: dataclasses.Field, hint: Any) -> _Rule:
    """Returns the rule of a parameter from its annotation and its bounds."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    options = typing.get_args(hint) if is_union else (hint,)
    kind = next(option for option in options if option is not types.NoneType)
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    bounds = field.metadata["least"], field.metadata["most"]
    return _Rule(field.name, kind, choices, types.NoneType in options, *bounds)


def parents(
    metric: Tensor, remove: int, method: str = "pitome", *, depth: float = 0.0, **parameters: Any
) -> Tensor:
    """Returns the token each token merges into: (B, N) int64, itself for the N - remove that are kept.

    It is computed in float32 at least, also of tensors in half precision and under autocast.

    Args:
        metric: (B, N, D) what similarity is measured on, without the class token.
        remove: tokens to remove, 0 to N - 1. Methods that pair tokens up remove at most half of them at once;
            more are removed in rounds, each matched on the averages of the round before.
        method: a name in METHODS.
        depth: l_i / l in [0, 1], the position of the layer in its encoder.
        **parameters: the method's own parameters, and the inputs it needs (METHOD_INPUTS).

    Raises:
        ValueError: an unknown method or parameter, a missing input, a metric of another shape than (B, N, D)
            or of a dtype that holds no single numbers of floating point, or `remove` out of range.
    """
    inputs = {name: value for name, value in parameters.items() if name in METHOD_INPUTS}
    check(method, {name: value for name, value in parameters.items() if name not in METHOD_INPUTS})
    needs = METHODS[method].needs
    if unused := [name for name in inputs if name not in needs]:
        raise ValueError(
            f"method {method!r} takes no {', '.join(unused)}; it needs {', '.join(needs) or 'no inputs'}"
        )
    if metric.ndim != 3:
        raise ValueError(f"metric has shape {tuple(metric.shape)}; it must be (images, tokens, channels)")
    if not metric.is_floating_point() or metric.dtype in PACKED:
        raise ValueError(f"metric has dtype {metric.dtype}; it must be floating point")
    count, remove, depth = metric.shape[1], plain(remove), plain(depth)
    if not isinstance(remove, int) or not 0 <= remove < max(count, 1):
        raise ValueError(f"remove={remove} does not fit {count} tokens; allowed is 0 to {max(count - 1, 0)}")
    if missing := [name for name in needs if name not in inputs]:
        raise ValueError(f"method {method!r} needs {', '.join(missing)}")
    if packed := [k for k, v in inputs.items() if isinstance(v, Tensor) and v.dtype in PACKED]:
        raise ValueError(f"{packed[0]} has dtype {inputs[packed[0]].dtype}; it must hold single numbers")
    wide = {k: _wide(v) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    with full_precision(metric.device.type):
        return choose(_wide(metric), remove, method, depth=depth, **parameters | wide).parent


def _wide(x: Tensor) -> Tensor:
    """Returns a tensor in float32 at least; torch promotes no type of 8 bits."""
    return x if x.dtype.itemsize >= torch.float32.itemsize else x.float()


def choose(
    metric: Tensor,
    remove: int,
    method: str,
    *,
    ordered: bool = False,
    triton: bool = False,
    depth: float = 0.0,
    **parameters: Any,
) -> MergeResult:
    """Returns a method's decision, without the checks of `parents`, for callers whose config was checked.

    Args:
        metric: (B, N, D) what similarity is measured on.
        remove: tokens to remove, 0 to N - 1.
        method: a name in METHODS.
        ordered: return the method's own order of kept tokens, where it has one; else raster order.
        triton: use the method's Triton kernel where it has one that supports the metric.
        depth: l_i / l in [0, 1], the position of the layer in its encoder.
        **parameters: the method's own parameters, and the inputs it needs.
    """
    remove = plain(remove)  # sizes are tensors under torch.jit.trace
    if remove == 0:
        return MergeResult(_identity(metric))
    inputs = {name: parameters.pop(name) for name in METHODS[method].needs}
    instance = METHODS[method](**parameters)
    ordered = ordered and instance.has_order
    merge = instance.merge_triton if triton and not ordered and supports_triton(metric) else instance.merge
    half = metric.shape[1] // 2
    if not instance.pairs_tokens or remove <= half:
        result = merge(metric, remove, depth, **inputs)
        return result if ordered else result._replace(order=None)
    result = _merge_in_rounds(metric, remove, depth, merge)
    return result._replace(order=merge(metric, half, depth).order) if ordered else result


def _merge_in_rounds(
    metric: Tensor, remove: int, depth: float, merge: Callable[..., MergeResult]
) -> MergeResult:
    """Returns one decision for several, each of which pairs up the averages of the one before."""
    parent, weight = _identity(metric), None
    size = torch.ones(metric.shape[:2], device=metric.device)
    plan = make_plan(parent, metric.shape[1])
    while remove:
        step = min(remove, metric.shape[1] // 2)
        result = merge(metric, step, depth)
        if result.mixing is not None or result.prunes:
            raise ValueError(
                "a method that pairs tokens may return weights; mixing and pruning do not carry over several "
                "rounds"
            )
        if result.weight is not None:
            weights = result.weight.gather(1, plan.slot)
            weight = weights if weight is None else weight * weights
        parent = compose(result.parent, plan)
        next_plan = make_plan(result.parent, metric.shape[1] - step)
        metric, size = reduce_tokens(metric, size, next_plan, result)
        plan = make_plan(parent, metric.shape[1])
        remove -= step
    return MergeResult(parent, weight=weight, keeps_norm=result.keeps_norm)


def _identity(metric: Tensor) -> Tensor:
    """Returns the parents (B, N) of tokens that are all kept."""
    return torch.arange(metric.shape[1], device=metric.device).repeat(metric.shape[0], 1)


def parameters_of(method: str) -> tuple[str, ...]:
    """Returns the names of a method's own parameters."""
    return tuple(field.name for field in dataclasses.fields(METHODS[method]))


def check(method: str, parameters: dict[str, Any]) -> None:
    """Raises ValueError for an unknown method, an unknown parameter, or a value that is not allowed."""
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; allowed are {', '.join(METHODS)}")
    own = parameters_of(method)
    if unknown := [name for name in parameters if name not in own]:
        near = difflib.get_close_matches(str(unknown[0]), list(own), n=1, cutoff=0.0)
        raise ValueError(
            f"method {method!r} has no parameter {unknown[0]!r}; it takes {', '.join(own) or 'none'}"
            + (f"; the nearest is {near[0]!r}" if near else "")
        )
    METHODS[method](**parameters)
