"""The command line: `llava-pitome bench` and `convert`, also `python -m llava_pitome bench`."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from llava_pitome.bench import command as bench
from llava_pitome.conversion import command as convert

COMMANDS: dict[str, tuple[Callable, Callable]] = {
    "bench": (bench.describe, bench.run),
    "convert": (convert.describe, convert.run),
}


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command; 2 where what was asked for is not allowed, with the reason on the terminal."""
    parser = argparse.ArgumentParser(
        "llava-pitome", description="LLaVA with its visual tokens merged by PiToMe."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (describe, _) in COMMANDS.items():
        describe(commands, name)
    options = parser.parse_args(words)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("llava_pitome").setLevel(logging.INFO)
    try:
        return COMMANDS[options.command][1](options)
    except ValueError as error:
        sys.stderr.write(f"llava-pitome {options.command}: {error}\n")
        return 2
