"""One declaration of an option for both `key=value` scripts and `--flags`: default, reader, help.

The options that say how to merge are made from the metadata of MergeConfig's fields: each field is described
and checked in one place. Options are read before a model is loaded.
"""

import argparse
import dataclasses
import difflib
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava_pitome import config_validation as validation
from llava_pitome.config import RECIPES, MergeConfig, requested
from llava_pitome.methods import METHODS


class Option(NamedTuple):
    """One option.

    Attributes:
        default: its value where it is not given.
        read: converts text to a value; raises ValueError where it cannot.
        allowed: the values that are allowed, for error messages and help.
        help: its effect.
        group: the heading under which --help lists it.
        short: a one-letter flag beside the long one, such as "-o".
        repeats: it may be given several times, and its value is a list.
    """

    default: Any
    read: Callable[[str], Any]
    allowed: str
    help: str
    group: str = "options"
    short: str | None = None
    repeats: bool = False


def parse(words: Sequence[str], options: dict[str, Option]) -> dict[str, Any]:
    """The value of every option, from key=value words.

    Raises:
        ValueError: an unknown key, a word without '=', a key given twice, or a bad value; the message names
            the key, the value and what is allowed.
    """
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} is not key=value; keys: {', '.join(options)}")
        if key not in options:
            raise ValueError(
                f"unknown key {key!r} (did you mean {_nearest(key, options)!r}?); keys: {', '.join(options)}"
            )
        option = options[key]
        if key in values and not option.repeats:
            raise ValueError(f"{key} is given twice")
        try:
            value = option.read(text)
        except ValueError as error:
            reason = f"allowed: {option.allowed}{_reason(error, text)}"
            raise ValueError(f"{key}={text!r} is not allowed; {reason}") from error
        values[key] = [*values.get(key, ()), value] if option.repeats else value
    return {key: values.get(key, option.default) for key, option in options.items()}


def add_flags(parser: argparse.ArgumentParser, options: dict[str, Option]) -> None:
    """Adds each option to a parser as a flag: `max_new_tokens` is --max-new-tokens.

    A boolean that is on or off by default is a switch; one whose default is None takes true or false.
    """
    groups: dict[str, Any] = {"options": parser}
    for key, option in options.items():
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        names = [option.short] * bool(option.short) + [f"--{key.replace('_', '-')}"]
        settings: dict[str, Any] = {"dest": key, "default": option.default}
        if option.read is boolean and option.default is not None:
            settings["action"] = argparse.BooleanOptionalAction if option.default else "store_true"
            text = f"{option.help} ({'on' if option.default else 'off'})"
        else:
            settings |= {"type": reader(option), "metavar": key.upper()}
            settings |= {"action": "append"} if option.repeats else {}
            default = _text(option.default)
            text = f"{option.help}; {option.allowed}" + (f" ({default})" if default else "")
        groups[option.group].add_argument(*names, **settings, help=text.replace("%", "%%"))


def reader(option: Option) -> Callable[[str], Any]:
    """The option's reader for argparse, whose error says what is allowed."""

    def read(text: str) -> Any:
        try:
            return option.read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not allowed: it must be {option.allowed}{_reason(error, text)}"
            ) from error

    return read


def usage(options: dict[str, Option]) -> str:
    """One line a key under the headings of the groups: default, effect and allowed values."""
    lines, group = [], "options"
    for key, option in options.items():
        if option.group != group:
            group = option.group
            lines.append(f" {group}:")
        lines.append(f"  {key}={_text(option.default)}  {option.help}; {option.allowed}")
    return "\n".join(lines)


def helped(words: Sequence[str], doc: str | None, options: dict[str, Option]) -> bool:
    """Whether the words ask for help; if so, writes a script's description and its keys."""
    if not {"help", "--help", "-h"} & set(words):
        return False
    sys.stdout.write(f"{doc}\n" + (f"Keys:\n{usage(options)}\n" if options else ""))
    return True


def _text(value: Any) -> str:
    """A default as it would be typed; empty for None and for an empty tuple."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return json.dumps(value)
    return "" if value is None else str(value)


def _nearest(name: str, names: Any) -> str:
    """The name that is spelled most like another."""
    return difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)[0]


def _reason(error: ValueError, text: str) -> str:
    """What a reader adds to "is not allowed": nothing where it only repeats the text."""
    return f": {error}" if str(error) not in ("", text) else ""


# Readers. Each raises ValueError, with the reason or with the text alone.


def boolean(text: str) -> bool:
    """Reads true or false."""
    return {"true": True, "false": False}[one_of("true", "false")(text)]


def one_of(*names: str) -> Callable[[str], str]:
    """A reader for one of some names."""

    def read(text: str) -> str:
        if text not in names:
            raise ValueError(f"the nearest is {_nearest(text, names)!r}")
        return text

    return read


def whole(low: int, high: float = math.inf) -> Callable[[str], int]:
    """A reader for whole numbers from `low` to `high`."""

    def read(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise ValueError(text)
        return int(text)

    return read


def number(low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> Callable:
    """A reader for finite numbers from `low` to `high`; `above` and `below` exclude the ends."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan  # fits nowhere
        fits = (low < value if above else low <= value) and (value < high if below else value <= high)
        if not fits or math.isinf(value):
            raise ValueError(text)
        return value

    return read


def share(text: str) -> float:
    """Reads a number in (0, 1]."""
    return number(0, 1, above=True)(text)


def shares(text: str) -> float | tuple[float, ...]:
    """Reads one number in (0, 1], or several with commas: one per layer."""
    numbers = several(share)(text)
    return numbers if len(numbers) > 1 else numbers[0]


def several(read: Callable[[str], Any], distinct: bool = False) -> Callable[[str], tuple]:
    """A reader for values with commas between them; `distinct` allows each once."""

    def read_all(text: str) -> tuple:
        values = tuple(read(word.strip()) for word in text.split(","))
        if distinct and len(set(values)) < len(values):
            raise ValueError("one of them is given twice")
        return values

    return read_all


def listed(text: str) -> tuple[str, ...]:
    """Reads names with commas between them."""
    names = several(str)(text)
    if not all(names):
        raise ValueError(text)
    return names


def amount(text: str) -> float | int:
    """Reads what is kept: a share in (0, 1] with a point (0.5), or a number of tokens from 2 (64)."""
    return whole(1)(text) if text.isdecimal() else share(text)


def layers(text: str) -> dict[int, float | int]:
    """Reads what is kept in layers of the language model: 8:0.5,16:64."""
    values: dict[int, float | int] = {}
    for word in text.split(","):
        layer, _, keep = word.partition(":")
        if not layer.isdecimal() or int(layer) in values:
            raise ValueError(word)
        values[int(layer)] = amount(keep)
    return values


def sides(text: str) -> tuple[int, int]:
    """Reads rows and columns: 9x10."""
    rows, _, columns = text.partition("x")
    return whole(1)(rows), whole(1)(columns)


def fields(text: str) -> dict[str, Any]:
    """Reads a JSON object."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value


def folder(text: str) -> str:
    """Reads the path of a folder, which need not exist yet."""
    if Path(text).exists() and not Path(text).is_dir():
        raise ValueError(text)
    return text


# How to merge

FIELD_TEXT: dict[str, tuple[Callable[[str], Any], str]] = {  # by kind of field: its reader, and what it reads
    "shares": (shares, "a number in (0, 1], or one per layer with commas"),
    "count": (whole(1), validation.KINDS["count"].allowed),
    "budget": (amount, validation.KINDS["budget"].allowed),
    "amount": (amount, "a share (0.5) or a number of tokens from 2 (64)"),
    "layers": (layers, "layer:share or layer:number with commas (8:0.5,16:64)"),
    "sides": (sides, "rows x columns (9x10)"),
    "fraction": (number(0, 1), validation.KINDS["fraction"].allowed),
    "interval": (several(number(0, 1)), "two ascending numbers in [0, 1] with a comma (0.5,1)"),
    "flag": (boolean, "true | false"),
    "json": (fields, "a JSON object"),
}


def merge_options(*, methods: bool = False, help: dict[str, str] | None = None) -> dict[str, Option]:
    """An option for every field of MergeConfig, and `recipe` and `merging`; fields are None by default.

    Args:
        methods: allow several methods, with commas.
        help: texts to append to the help of some fields.
    """
    options = {}
    for field in dataclasses.fields(MergeConfig):
        kind, group = field.metadata["kind"], f"merging, {field.metadata['group']}"
        if kind in ("method", "choice"):
            names = METHODS if kind == "method" else field.metadata["choices"]
            read, allowed = one_of(*names), " | ".join(names)
            if methods and field.name == "method":
                read, allowed = several(read, distinct=True), f"names with commas: {allowed}"
        else:
            read, allowed = _checked(kind), FIELD_TEXT[kind][1]
        text = field.metadata["help"] + (help or {}).get(field.name, "")
        options[field.name] = Option(None, read, allowed, text, group)
    group = "merging, recipe"
    return options | {
        "recipe": Option("paper", one_of(*RECIPES), " | ".join(RECIPES), "named settings", group),
        "merging": Option(None, fields, "a JSON object of MergeConfig's fields", "further fields", group),
    }


def _checked(kind: str) -> Callable[[str], Any]:
    """The reader of a kind of MergeConfig field, whose values also pass that kind's check."""
    convert, fits = FIELD_TEXT[kind][0], validation.KINDS[kind].fits

    def read(text: str) -> Any:
        value = convert(text)
        if not fits(value):
            raise ValueError(text)
        return value

    return read


def merge_config(values: dict[str, Any]) -> MergeConfig | None:
    """The config that the values of `merge_options` specify; None where nothing is to merge.

    Raises:
        ValueError: they contradict each other, or say how to merge but not how far.
    """
    named = {f.name: values.get(f.name) for f in dataclasses.fields(MergeConfig)}
    return requested(values.get("recipe") or "paper", named, values.get("merging"))
