"""What all commands of this package share: their options, exit status 2 for bad words, child processes."""

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava_pitome.cli.options import Option, boolean, helped, parse, whole
from llava_pitome.config import MergeConfig

ROOT = Path(__file__).parents[1]  # of the checkout
FIELDS = tuple(field.name for field in dataclasses.fields(MergeConfig))


def count(default: int | None, help: str, low: int = 1) -> Option:
    """An option that is a whole number from `low`."""
    return Option(default, whole(low), f"a whole number from {low}", help)


def switch(default: bool, help: str) -> Option:
    """An option that is true or false."""
    return Option(default, boolean, "true | false", help)


def run_command(
    name: str,
    doc: str | None,
    options: dict[str, Option],
    words: Sequence[str],
    prepare: Callable[[dict[str, Any]], Any],
    execute: Callable[[Any], int | None],
) -> int:
    """Runs a command and returns its exit status: 2 where its words are not allowed.

    Args:
        name: of the command, for error messages.
        doc: what `help` prints above the keys.
        options: its keys.
        words: key=value.
        prepare: turns the values into what `execute` takes, before any work; its ValueErrors are the user's.
        execute: does the work and returns the exit status; None for success.
    """
    if helped(words, doc, options):
        return 0
    try:
        prepared = prepare(parse(words, options))
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    return execute(prepared) or 0


def child_environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a `python -m eval.NAME` that keeps the user's working directory."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"} | (extra or {})


def write_whole(path: Path, text: str) -> None:
    """Writes a file completely or not at all."""
    partial = path.with_suffix(path.suffix + ".part")
    partial.write_text(text)
    partial.replace(path)
