"""What a MergeConfig may hold: every check raises ValueError with the value and what is allowed."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from llava_pitome.methods import METHODS
from llava_pitome.methods.registry import check as check_method
from llava_pitome.plain_values import plain


class FrozenDict(dict):
    """A dict whose contents are fixed and hashable; equal to a plain dict, and saved by JSON as one."""

    def _refuse(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Raises TypeError: contents are fixed."""
        raise TypeError("a MergeConfig cannot change; make another one, e.g. with dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:
        """Of the items, whatever their order."""
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple:
        """For pickle and copy, which would otherwise set items one by one."""
        return FrozenDict, (dict(self),)


def frozen(value: Any) -> Any:
    """The value with plain numbers, lists as tuples and dicts as FrozenDicts, all the way down.

    Raises:
        ValueError: a dict has two keys for one number, such as 8 and a tensor of 8.
    """
    if isinstance(value, dict):
        found = FrozenDict({plain(k): frozen(v) for k, v in value.items()})
        if len(found) < len(value):
            raise ValueError(f"{value!r} names a key twice")
        return found
    if isinstance(value, list | tuple):
        return tuple(frozen(v) for v in value)
    return plain(value)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _share(value: Any) -> bool:
    return _number(value) and 0 < value <= 1


def _amount(value: Any) -> bool:
    return (isinstance(value, float) and 0 < value <= 1) or _whole(value, 2)


def _budget(value: Any) -> bool:
    return _whole(value) or (isinstance(value, float) and 0 < value < 1)


def _interval(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_number, value)) and _rising(*value)


def _rising(first: float, second: float) -> bool:
    return 0 <= first < second <= 1


class Kind(NamedTuple):
    """How fields of one kind are checked.

    Attributes:
        fits: whether a value is allowed.
        allowed: what is, for error messages and help texts.
    """

    fits: Callable[[Any], bool]
    allowed: str


KINDS: dict[str, Kind] = {
    "shares": Kind(
        lambda x: _share(x) or (isinstance(x, tuple) and bool(x) and all(map(_share, x))),
        "a number in (0, 1], or one per layer",
    ),
    "count": Kind(_whole, "a whole number from 1"),
    "budget": Kind(_budget, "a whole number from 1, or a share in (0, 1)"),
    "amount": Kind(_amount, "a share in (0, 1] such as 0.5, or a number of tokens from 2"),
    "sides": Kind(
        lambda x: isinstance(x, tuple) and len(x) == 2 and all(map(_whole, x)),
        "rows and columns, whole numbers from 1",
    ),
    "fraction": Kind(lambda x: _number(x) and 0 <= x <= 1, "a number in [0, 1]"),
    "interval": Kind(_interval, "two numbers, 0 <= first < second <= 1"),
    "flag": Kind(lambda x: isinstance(x, bool), "True or False"),
    "layers": Kind(lambda x: isinstance(x, dict), "a share or a number of tokens for each layer"),
    "json": Kind(lambda x: isinstance(x, dict), "a dict"),
}
BUDGETS = ("tokens", "tokens_per_tile", "tokens_per_frame", "tokens_per_video")
AMOUNTS = ("ratio", *BUDGETS, "prefix", "decoder", "resize")  # fields that say how far to merge


def check(config: Any) -> None:
    """Checks every field of a MergeConfig, and what must go together."""
    for field in dataclasses.fields(config):
        _field(field, getattr(config, field.name))
    _amounts(config)
    _early(config)
    check_method(config.method, config.parameters)
    if config.order == "method" and not METHODS[config.method].has_order:
        raise ValueError(
            f"order='method' is not allowed: method {config.method!r} defines no order of its own"
        )
    _places(config)


def _field(field: Any, value: Any) -> None:
    """Checks one field by its own description."""
    kind, name = field.metadata["kind"], field.name
    if kind == "choice":
        if value is not field.default and value not in field.metadata["choices"]:
            raise ValueError(
                f"{name}={value!r} is unknown; allowed are {', '.join(field.metadata['choices'])}"
            )
        return
    if kind == "method" or value is field.default:
        return
    if kind == "amount":
        _unambiguous(name, value)
    if not KINDS[kind].fits(value):
        raise ValueError(f"{name}={value!r} is not allowed: it must be {KINDS[kind].allowed}")


def _unambiguous(name: str, value: Any) -> None:
    """Raises ValueError for the whole number 1, which is one keystroke away from the share 1.0."""
    if value == 1 and isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(
            f"{name}=1 is ambiguous: give 1.0 to keep every token, or a share of less than a token, such as "
            "1e-9, to keep a single one"
        )


def layers(decoder: dict[Any, Any]) -> dict[int, float | int]:
    """The layers of `decoder` as whole numbers, lowest first; JSON brings them as text."""
    found: dict[int, float | int] = {}
    for key, keep in decoder.items():
        text = isinstance(key, str) and key.isdecimal()
        if isinstance(key, bool) or not (text or (isinstance(key, int) and key >= 0)):
            raise ValueError(f"decoder names layer {key!r}; it must be a whole number from 0")
        if int(key) in found:  # 8 and "8"
            raise ValueError(f"decoder names layer {key} twice")
        _unambiguous(f"decoder[{key}]", keep)
        if not _amount(keep):
            raise ValueError(f"decoder[{key}]={keep!r} is not allowed: it must be {KINDS['amount'].allowed}")
        found[int(key)] = keep
    return dict(sorted(found.items()))


def _amounts(config: Any) -> None:
    """How far tokens merge."""
    ratio = config.ratio
    for names in (("ratio", "tokens", "tokens_per_tile"), ("tokens_per_frame", "tokens_per_video")):
        if len(given := [name for name in names if getattr(config, name) is not None]) > 1:
            both = ", ".join(f"{name}={getattr(config, name)!r}" for name in given)
            raise ValueError(f"give {' or '.join(given)}, and not both: {both}")
    if all(getattr(config, name) in (None, {}) for name in AMOUNTS):
        raise ValueError(f"nothing says how far to merge: give one of {', '.join(AMOUNTS)}")
    budgets = {name: getattr(config, name) for name in BUDGETS if getattr(config, name) is not None}
    of_image = [f"{name}={budgets[name]}" for name in ("tokens", "tokens_per_tile") if name in budgets]
    if of_image and config.prefix is not None:
        raise ValueError(
            f"{of_image[0]} says how many tokens reach the language model, and so does "
            f"prefix={config.prefix}: give ratio with prefix, or tokens with prefix_share"
        )
    single = bool(budgets) or (ratio is not None and not isinstance(ratio, tuple))
    if config.prefix_share and (not single or config.prefix is not None):
        raise ValueError(
            f"prefix_share={config.prefix_share} divides what tokens, or a single ratio, leaves; given are "
            f"tokens={config.tokens}, ratio={ratio}, prefix={config.prefix}"
        )
    if config.depths != (0, 1) and isinstance(ratio, tuple):
        raise ValueError(f"ratio gives one share per layer, so depths={config.depths} must stay (0, 1)")


def _early(config: Any) -> None:
    """The method of the first layers."""
    if config.early_method is not None:
        check_method(config.early_method, {})
        _defined(config.early_method, "tower")
    if (config.early_method is None) != (config.early_depth == 0):
        raise ValueError(
            f"early_method={config.early_method!r} and early_depth={config.early_depth} go together: "
            "give both or none"
        )


def _places(config: Any) -> None:
    """The method is defined wherever it is to merge."""
    used = {
        "tower": config.merges_in_tower,
        "prefix": config.merges_in_prefix,
        "decoder": bool(config.merging_layers),
    }
    merging = [place for place, does in used.items() if does]
    for place in merging:
        _defined(config.method, place)
    if METHODS[config.method].needs_grid and len(merging) + len(config.merging_layers[1:]) > 1:
        raise ValueError(
            f"method {config.method!r} works on the grid of patches, which only the first merge has; this "
            f"config merges in {' and '.join(merging)}"
            + (f", layers {', '.join(map(str, config.decoder))}" if config.decoder else "")
        )


def _defined(method: str, place: str) -> None:
    if place not in METHODS[method].places:
        raise ValueError(
            f"method {method!r} cannot merge in the {place}: it is defined for "
            f"{' and '.join(METHODS[method].places)}"
        )
