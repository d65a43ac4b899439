"""What a MergeConfig may hold: every check raises ValueError with the value and what is allowed."""

from typing import Any

from llava_pitome.methods import METHODS
from llava_pitome.methods.registry import check as check_method

CHOICES = {
    "metric": ("keys", "hidden"),
    "site": ("attention", "block"),
    "order": ("raster", "method"),
    "prefix_metric": (None, "features", "keys"),
    "positions": ("packed", "original"),
}
AMOUNTS = ("ratio", "tokens", "prefix", "decoder", "resize")  # fields that say how far to merge
FLAGS = ("size_weighted", "proportional", "llm_proportional")


def check(config: Any) -> None:
    """Checks every field of a MergeConfig, and what must go together."""
    _amounts(config)
    for name, allowed in CHOICES.items():
        if getattr(config, name) not in allowed:
            raise ValueError(
                f"{name}={getattr(config, name)!r} is unknown; allowed are "
                f"{', '.join(str(a) for a in allowed)}"
            )
    for name in FLAGS:
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name}={getattr(config, name)!r} is not allowed: it must be True or False")
    _early(config)
    check_method(config.method, config.parameters)
    if "depth" in config.parameters:
        raise ValueError("parameters may not hold 'depth': the layer sets it")
    if config.order == "method" and METHODS[config.method].ordered is None:
        raise ValueError(
            f"order='method' is not allowed: method {config.method!r} defines no order of its own"
        )
    _places(config)


def layers(decoder: dict[Any, Any]) -> dict[int, float | int]:
    """The layers of `decoder` as whole numbers, lowest first; JSON brings them as text."""
    found: dict[int, float | int] = {}
    for key, keep in decoder.items():
        text = isinstance(key, str) and key.isdecimal()
        if isinstance(key, bool) or not (text or (isinstance(key, int) and key >= 0)):
            raise ValueError(f"decoder names layer {key!r}; it must be a whole number from 0")
        if int(key) in found:  # 8 and "8"
            raise ValueError(f"decoder names layer {key} twice")
        _keep(f"decoder[{key}]", keep)
        found[int(key)] = keep
    return dict(sorted(found.items()))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _keep(name: str, value: Any) -> None:
    """A share that stays, or a number of tokens."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not whole and not (isinstance(value, float) and 0 < value <= 1):
        raise ValueError(
            f"{name}={value!r} is not allowed: it must be a share in (0, 1], or a number of tokens from 1"
        )


def _amounts(config: Any) -> None:
    """How far tokens merge."""
    ratio, tokens = config.ratio, config.tokens
    if ratio is not None and tokens is not None:
        raise ValueError(f"give ratio or tokens, and not both: ratio={ratio!r}, tokens={tokens!r}")
    if all(getattr(config, name) in (None, {}) for name in AMOUNTS):
        raise ValueError(f"nothing says how far to merge: give one of {', '.join(AMOUNTS)}")
    for share in ratio if isinstance(ratio, tuple) else () if ratio is None else (ratio,):
        if not _number(share) or not 0 < share <= 1:
            raise ValueError(f"ratio={ratio!r} is not allowed: each ratio must be a number in (0, 1]")
    if ratio == ():
        raise ValueError("ratio=() is not allowed: give one share per tower layer, or a single number")
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int)):
        raise ValueError(f"tokens={tokens!r} is not allowed: it must be a whole number")
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens={tokens} is not allowed: at least 1 token must reach the language model")
    if config.prefix is not None:
        _keep("prefix", config.prefix)
    if not _number(config.prefix_share) or not 0 <= config.prefix_share <= 1:
        raise ValueError(f"prefix_share={config.prefix_share!r} is not allowed: it must be in [0, 1]")
    if tokens is not None and config.prefix is not None:
        raise ValueError(
            f"tokens={tokens} says what reaches the language model, and so does prefix={config.prefix}: give "
            "ratio with prefix, or tokens with prefix_share"
        )
    single = tokens is not None or (ratio is not None and not isinstance(ratio, tuple))
    if config.prefix_share and (not single or config.prefix is not None):
        raise ValueError(
            f"prefix_share={config.prefix_share} divides what tokens, or a single ratio, leaves; given are "
            f"tokens={tokens}, ratio={ratio}, prefix={config.prefix}"
        )
    _depths(config)
    side = config.resize
    if side is not None and not (
        isinstance(side, tuple) and len(side) == 2 and all(type(n) is int and n > 0 for n in side)
    ):
        raise ValueError(f"resize={side!r} is not allowed: it must be rows and columns, whole numbers from 1")


def _depths(config: Any) -> None:
    """The part of the tower that merges."""
    depths = config.depths
    if not (isinstance(depths, tuple) and len(depths) == 2 and all(map(_number, depths))) or not (
        0 <= depths[0] < depths[1] <= 1
    ):
        raise ValueError(
            f"depths={depths!r} is not allowed: it must be two numbers, 0 <= first < second <= 1"
        )
    if depths != (0, 1) and isinstance(config.ratio, tuple):
        raise ValueError(f"ratio says what each layer keeps, so depths={depths} must stay (0, 1)")


def _early(config: Any) -> None:
    """The method of the first layers."""
    if not _number(config.early_depth) or not 0 <= config.early_depth <= 1:
        raise ValueError(f"early_depth={config.early_depth!r} is not allowed: it must be a number in [0, 1]")
    if config.early_method is not None:
        check_method(config.early_method, {})
        _belongs(config.early_method, "tower")
    if (config.early_method is None) != (config.early_depth == 0):
        raise ValueError(
            f"early_method={config.early_method!r} and early_depth={config.early_depth} go together: "
            "give both or none"
        )


def _places(config: Any) -> None:
    """The method's definition makes sense wherever it is to merge."""
    used = {
        "tower": config.merges_in_tower,
        "prefix": config.merges_in_prefix,
        "decoder": bool(config.merging_layers),
    }
    merging = [place for place, does in used.items() if does]
    for place in merging:
        _belongs(config.method, place)
    if METHODS[config.method].needs_grid and len(merging) + len(config.merging_layers[1:]) > 1:
        raise ValueError(
            f"method {config.method!r} works on the grid of patches, which is there for the first merge "
            f"only; this config merges in {' and '.join(merging)}"
            + (f", layers {', '.join(map(str, config.decoder))}" if config.decoder else "")
        )


def _belongs(method: str, place: str) -> None:
    if place not in METHODS[method].places:
        raise ValueError(
            f"method {method!r} cannot merge in the {place}: its definition fits "
            f"{' and '.join(METHODS[method].places)}"
        )
