"""What clients of the page send, checked before any work starts; a browser sends the same as a program."""

import os
import stat
from pathlib import Path
from typing import Any

from llava_pitome.methods import METHODS

QUESTION = 2000  # characters


def upload(value: Any, folder: Path, most: float) -> Path | None:
    """The file of a picture that was uploaded, or stands among the examples; None: no picture.

    It is neither opened nor fetched. Being used, it counts as new where old uploads are deleted.

    Args:
        value: as Gradio sends a file: an object with its "path".
        folder: where uploads and examples are.
        most: bytes of a file.

    Raises:
        ValueError: it is no such file, but an address, data or a file somewhere else; or it is gone, or too
            large.
    """
    if value is None:
        return None
    path = value.get("path") if isinstance(value, dict) else None
    if not isinstance(path, str):
        raise ValueError(f"picture={_short(value)} is not allowed: it must be an uploaded file, or null")
    if not _inside(path, folder):
        raise ValueError(
            f"the picture {_short(path)} is not allowed: it must be a file that was uploaded to this page; "
            "addresses and data: are never read, nor are other files"
        )
    try:
        found = os.stat(path)
        os.utime(path)
    except OSError as error:
        raise ValueError("the picture is no longer here: upload it again") from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"the picture {_short(path)} is no file")
    if found.st_size > most:
        raise ValueError(f"the picture has {found.st_size:,} bytes; at most {most:,.0f} are allowed")
    return Path(path)


def _inside(path: str, folder: Path) -> bool:
    """Whether a path leads into a folder, links followed."""
    if "\0" in path:
        return False
    return Path(path).is_absolute() and Path(path).resolve().is_relative_to(folder.resolve())


def question(value: Any) -> str:
    """A question; that it is empty is noticed by whom it is put to.

    Raises:
        ValueError: it is no text, or too long.
    """
    if not isinstance(value, str):
        raise ValueError(f"question={_short(value)} is not allowed: it must be text")
    if len(value) > QUESTION:
        raise ValueError(f"the question has {len(value):,} characters; at most {QUESTION:,} are allowed")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError("the question holds half characters, which no tokenizer takes")
    return value


def method(value: Any) -> str:
    """The name of a method.

    Raises:
        ValueError: there is none of that name.
    """
    if not isinstance(value, str) or value not in METHODS:
        raise ValueError(f"method={_short(value)} is unknown; allowed are {', '.join(METHODS)}")
    return value


def ratio(value: Any) -> float:
    """A share of tokens.

    Raises:
        ValueError: it is no number in (0, 1].
    """
    if not _number(value) or not 0 < value <= 1:
        raise ValueError(f"ratio={_short(value)} is not allowed: it must be a number in (0, 1]")
    return float(value)


def layer(value: Any, last: int) -> int:
    """A point of the model to look at.

    Raises:
        ValueError: it is no whole number from 0 to `last`.
    """
    if not _number(value) or not 0 <= value <= last or value != int(value):
        raise ValueError(f"layer={_short(value)} is not allowed: it must be a whole number from 0 to {last}")
    return int(value)


def compare(value: Any) -> bool:
    """Whether to answer without merging, too.

    Raises:
        ValueError: it is neither true nor false.
    """
    if not isinstance(value, bool):
        raise ValueError(f"compare={_short(value)} is not allowed: it must be true or false")
    return value


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> str:
    """A value in a message."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
