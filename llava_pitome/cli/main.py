"""The command line `llava-pitome`, also run as `python -m llava_pitome`."""

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple


class Command(NamedTuple):
    """One command; its module is imported when the command is run.

    Attributes:
        module: with `describe(subparsers, name)`, which adds the command's parser, and `run(options)`.
        extra: the extra of this package that installs what the command needs.
        help: for the list of commands.
    """

    module: str
    extra: str
    help: str


COMMANDS = {
    "chat": Command("llava_pitome.cli.chat.command", "models", "chat with a LLaVA in the terminal"),
    "web": Command(
        "llava_pitome.cli.web.command", "web", "a web page that answers questions and shows merges"
    ),
    "serve": Command("llava_pitome.integrations.serve.command", "serve", "an OpenAI-compatible endpoint"),
    "draw": Command(
        "llava_pitome.cli.draw.command", "bench", "draw which patches of an image became one token"
    ),
    "bench": Command("llava_pitome.cli.bench.command", "bench", "time a merging model against the dense one"),
    "convert": Command(
        "llava_pitome.cli.convert", "models", "convert a checkpoint of the original LLaVA package"
    ),
}
EXTRAS = {"peft": "peft", "bitsandbytes": "quantization"}  # packages that any command's model may need
INTERRUPTED = 130  # the exit status that shells use


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    2 where the options are not allowed or a package is missing, with the reason on standard error; 130 where
    the user interrupts the command.
    """
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser("llava-pitome", description="LLaVA with visual tokens merged by PiToMe.")
    subparsers = parser.add_subparsers(dest="command", required=True)
    name = words[0] if words and words[0] in COMMANDS else None
    try:
        for other, command in COMMANDS.items():
            if other == name:
                module = import_module(command.module)
                module.describe(subparsers, name)
            else:
                subparsers.add_parser(other, help=command.help)
        options = parser.parse_args(words)  # exits where no command is named
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        logging.getLogger("llava_pitome").setLevel(logging.INFO)
        return module.run(options)
    except KeyboardInterrupt:
        return INTERRUPTED
    except ValueError as error:
        reason = str(error)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(error.name or "", COMMANDS[name].extra)
        reason = f"needs {error.name}, which is not installed: pip install 'llava-pitome[{extra}]'"
    sys.stderr.write(f"llava-pitome {name}: {reason}\n")
    return 2
