"""One declaration of an option for both `key=value` scripts and `--flags`: default, reader, help.

The options that say how to merge are made from the metadata of MergeConfig's fields, so that a field is described
and checked in one place. Everything is read before anything is loaded.
"""

import argparse
import dataclasses
import difflib
import json
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
        read: makes the value of its text; raises ValueError where it cannot.
        allowed: what may be written, for error messages and help.
        help: what it does.
        group: the heading under which --help lists it.
        short: a one-letter flag beside the long one, such as "-o".
        repeats: the flag may be given several times, and the value is a list.
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
    given: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} is not key=value; keys: {', '.join(options)}")
        if key not in options:
            near = difflib.get_close_matches(key, options, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown key {key!r} (did you mean {near!r}?); keys: {', '.join(options)}")
        if key in given:
            raise ValueError(f"{key} is given twice")
        try:
            given[key] = options[key].read(text)
        except ValueError as error:
            reason = f": {error}" if str(error) not in ("", text) else ""
            raise ValueError(
                f"{key}={text!r} is not allowed; allowed: {options[key].allowed}{reason}"
            ) from error
    return {key: given.get(key, option.default) for key, option in options.items()}


def add_flags(parser: argparse.ArgumentParser, options: dict[str, Option]) -> None:
    """Adds each option to a parser as a flag: `max_new_tokens` is --max-new-tokens, a boolean is a switch."""
    groups: dict[str, Any] = {"options": parser}
    for key, option in options.items():
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        names = [option.short] * bool(option.short) + [f"--{key.replace('_', '-')}"]
        default = _word(option.default)
        text = f"{option.help} ({default})" if default else option.help
        how: dict[str, Any] = {"dest": key, "default": option.default, "help": text.replace("%", "%%")}
        if option.read is boolean:
            how |= {"action": argparse.BooleanOptionalAction if option.default else "store_true"}
        else:
            how |= {"type": reader(option), "metavar": key.upper()}
            how |= {"action": "append"} if option.repeats else {}
        groups[option.group].add_argument(*names, **how)


def reader(option: Option) -> Callable[[str], Any]:
    """The option's reader as argparse takes it: what is allowed stands in the error."""

    def read(text: str) -> Any:
        try:
            return option.read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not allowed: it must be {option.allowed}"
            ) from error

    return read


def usage(options: dict[str, Option]) -> str:
    """The keys, one a line under their groups, with what they do, what they may be and their defaults."""
    lines, group = [], "options"
    for key, option in options.items():
        if option.group != group:
            group = option.group
            lines.append(f" {group}:")
        lines.append(f"  {key}={_word(option.default)}  {option.help}; {option.allowed}")
    return "\n".join(lines)


def helped(words: Sequence[str], doc: str | None, options: dict[str, Option]) -> bool:
    """Prints a script's description and its keys where the words ask for help; whether they did."""
    if not {"help", "--help", "-h"} & set(words):
        return False
    print(f"{doc}\nKeys:\n{usage(options)}")
    return True


def _word(value: Any) -> str:
    """A default as it would be typed."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None or value == {} else str(value)


# Readers


def boolean(text: str) -> bool:
    """Reads true or false."""
    return {"true": True, "false": False}[one_of("true", "false")(text)]


def one_of(*names: str) -> Callable[[str], str]:
    """A reader for one of some names."""

    def read(text: str) -> str:
        if text not in names:
            near = difflib.get_close_matches(text, names, n=1, cutoff=0.0)
            raise ValueError(f"the nearest is {near[0]!r}" if near else text)
        return text

    return read


def whole(low: int, high: float = float("inf")) -> Callable[[str], int]:
    """A reader for whole numbers from `low` to `high`."""

    def read(text: str) -> int:
        if not low <= int(text) <= high:
            raise ValueError(text)
        return int(text)

    return read


def number(low: float, high: float = float("inf"), *, above: bool = False, below: bool = False) -> Callable:
    """A reader for finite numbers from `low` to `high`; `above` and `below` leave the ends out."""

    def read(text: str) -> float:
        value = float(text)
        fits = (low < value if above else low <= value) and (value < high if below else value <= high)
        if not fits or value in (float("inf"), float("-inf")):
            raise ValueError(text)
        return value

    return read


def share(text: str) -> float:
    """Reads a number in (0, 1]."""
    return number(0, 1, above=True)(text)


def shares(text: str) -> float | tuple[float, ...]:
    """Reads one number in (0, 1], or several, separated by commas: one per layer."""
    numbers = several(share)(text)
    return numbers if len(numbers) > 1 else numbers[0]


def several(read: Callable[[str], Any], distinct: bool = False) -> Callable[[str], tuple]:
    """A reader for values separated by commas; `distinct` allows each once."""

    def read_all(text: str) -> tuple:
        found = tuple(read(word.strip()) for word in text.split(","))
        if distinct and len(set(found)) < len(found):
            raise ValueError("one of them is given twice")
        return found

    return read_all


def amount(text: str) -> float | int:
    """Reads what is kept: a share in (0, 1] with a point (0.5), or a number of tokens from 2 (64)."""
    if text.isdecimal():
        return whole(2)(text)
    return share(text)


def layers(text: str) -> dict[int, float | int]:
    """Reads what is kept at layers of the language model: 8:0.5,16:64."""
    found: dict[int, float | int] = {}
    for word in text.split(","):
        layer, _, keep = word.partition(":")
        if not layer.isdecimal() or int(layer) in found:
            raise ValueError(word)
        found[int(layer)] = amount(keep)
    return found


def sides(text: str) -> tuple[int, int]:
    """Reads rows and columns: 9x10."""
    rows, _, columns = text.partition("x")
    return whole(1)(rows), whole(1)(columns)


def fields(text: str) -> dict[str, Any]:
    """Reads a JSON object."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(text)
    return found


def folder(text: str) -> str:
    """Reads the path of a folder, which need not be there yet."""
    if Path(text).exists() and not Path(text).is_dir():
        raise ValueError(text)
    return text


def listed(text: str) -> tuple[str, ...]:
    """Reads names separated by commas."""
    names = tuple(t.strip() for t in text.split(","))
    if not all(names):
        raise ValueError(text)
    return names


# How to merge

TEXT = {  # by the kind of a MergeConfig field: its reader, and how it is written
    "shares": (shares, "a number in (0, 1], or one per layer with commas"),
    "count": (whole(1), validation.KINDS["count"].allowed),
    "amount": (amount, "a share (0.5) or a number of tokens (64)"),
    "layers": (layers, "layer:share or layer:number with commas (8:0.5,16:64)"),
    "sides": (sides, "rows x columns (9x10)"),
    "fraction": (number(0, 1), validation.KINDS["fraction"].allowed),
    "interval": (several(number(0, 1)), "two numbers with a comma (0.5,1)"),
    "flag": (boolean, "true | false"),
    "json": (fields, "a JSON object"),
}


def merge_options(*, methods: bool = False, help: dict[str, str] | None = None) -> dict[str, Option]:
    """An option for every field of MergeConfig, and `recipe` and `merging`; nothing is given by default.

    Args:
        methods: allow several methods, with commas.
        help: what to add to the help of some fields.
    """
    found = {}
    for field in dataclasses.fields(MergeConfig):
        kind, group = field.metadata["kind"], f"merging, {field.metadata['group']}"
        if kind == "method":
            read, allowed = one_of(*METHODS), " | ".join(METHODS)
            if methods and field.name == "method":
                read, allowed = several(read, distinct=True), f"names with commas: {allowed}"
        elif kind == "choice":
            read, allowed = one_of(*field.metadata["choices"]), " | ".join(field.metadata["choices"])
        else:
            read, allowed = TEXT[kind]
            read = optional_boolean if read is boolean else read
        text = field.metadata["help"] + (help or {}).get(field.name, "")
        found[field.name] = Option(None, read, allowed, text, group)
    return found | {
        "recipe": Option("paper", one_of(*RECIPES), " | ".join(RECIPES), "named settings", "merging, recipe"),
        "merging": Option(
            None, fields, "a JSON object of MergeConfig's fields", "further fields", "merging, recipe"
        ),
    }


def optional_boolean(text: str) -> bool:
    """Reads true or false; as a flag it takes the word, so that not given differs from false."""
    return boolean(text)


def merge_config(values: dict[str, Any]) -> MergeConfig | None:
    """The config that the values of `merge_options` ask for; None where nothing is to merge.

    Raises:
        ValueError: they contradict each other, or say how to merge but not how far.
    """
    named = {f.name: values.get(f.name) for f in dataclasses.fields(MergeConfig)}
    return requested(values.get("recipe") or "paper", named, values.get("merging"))
