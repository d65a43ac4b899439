"""key=value words from a command line, checked before anything is loaded."""

import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Option(NamedTuple):
    """One key.

    Attributes:
        default: its value where it is not given.
        read: makes the value of the word; raises ValueError where it cannot.
        allowed: what may be written, for people.
        help: what it does, for people.
    """

    default: Any
    read: Callable[[str], Any]
    allowed: str
    help: str


def parse(words: Sequence[str], options: dict[str, Option]) -> dict[str, Any]:
    """The value of every option.

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
        given[key] = _value(key, text, options[key])
    return {key: given.get(key, option.default) for key, option in options.items()}


def _value(key: str, text: str, option: Option) -> Any:
    try:
        return option.read(text)
    except ValueError as error:
        raise ValueError(f"{key}={text!r} is not allowed; allowed: {option.allowed}") from error


def usage(options: dict[str, Option]) -> str:
    """The keys, one a line, with what they do, what they may be and their defaults."""
    return "\n".join(f"  {k}={_word(o.default)}  {o.help}; {o.allowed}" for k, o in options.items())


def _word(value: Any) -> str:
    """A default as it would be typed."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def boolean(text: str) -> bool:
    """Reads true or false."""
    return {"true": True, "false": False}[one_of("true", "false")(text)]


def one_of(*names: str) -> Callable[[str], str]:
    """A reader for one of some names."""

    def read(text: str) -> str:
        if text not in names:
            raise ValueError(text)
        return text

    return read


def whole(low: int) -> Callable[[str], int]:
    """A reader for whole numbers from `low` on."""

    def read(text: str) -> int:
        if int(text) < low:
            raise ValueError(text)
        return int(text)

    return read


def share(text: str) -> float:
    """Reads a number in (0, 1]."""
    if not 0 < float(text) <= 1:
        raise ValueError(text)
    return float(text)


def shares(text: str) -> float | tuple[float, ...]:
    """Reads one number in (0, 1], or several, separated by commas: one per layer."""
    numbers = tuple(share(t) for t in text.split(","))
    return numbers if len(numbers) > 1 else numbers[0]


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
