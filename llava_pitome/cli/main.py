"""The command line: `llava-pitome chat`, `web`, `draw`, ..., also as `python -m llava_pitome chat`."""

import argparse
import logging
import sys
from collections.abc import Sequence
from types import ModuleType

from llava_pitome.cli import convert
from llava_pitome.cli.bench import command as bench
from llava_pitome.cli.chat import command as chat
from llava_pitome.cli.draw import command as draw
from llava_pitome.cli.web import command as web
from llava_pitome.integrations.serve import command as serve

COMMANDS: dict[str, tuple[ModuleType, str]] = {  # each with the extra that it needs
    "chat": (chat, "models"),
    "web": (web, "web"),
    "serve": (serve, "serve"),
    "draw": (draw, "models"),
    "bench": (bench, "bench"),
    "convert": (convert, "models"),
}
EXTRAS = {
    "peft": "peft",
    "bitsandbytes": "quantization",
}  # of packages that a model may need, whatever the command
INTERRUPTED = 130  # as shells have it


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command; 2 where what was asked for is not allowed, with the reason on the terminal.

    130 where somebody interrupts it.
    """
    parser = argparse.ArgumentParser(
        "llava-pitome", description="LLaVA with its visual tokens merged by PiToMe."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (command, _) in COMMANDS.items():
        command.describe(commands, name)
    options = parser.parse_args(words)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("llava_pitome").setLevel(logging.INFO)
    command, extra = COMMANDS[options.command]
    try:
        return command.run(options)
    except KeyboardInterrupt:
        return INTERRUPTED
    except ValueError as error:
        reason = str(error)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(error.name or "", extra)
        reason = f"needs {error.name}, which is not installed: pip install 'llava-pitome[{extra}]'"
    sys.stderr.write(f"llava-pitome {options.command}: {reason}\n")
    return 2
