"""`llava-pitome chat`: its options, and where the lines come from."""

import argparse
import math
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from llava_pitome.api import applied
from llava_pitome.cli import model_options as commands
from llava_pitome.cli import options as options_module
from llava_pitome.cli.options import whole
from llava_pitome.config import MergeConfig
from llava_pitome.config_validation import AMOUNTS
from llava_pitome.image_io import open_image


def describe(parsers: Any, name: str) -> None:
    """Adds the command and its options to a parser's subparsers."""
    parser = parsers.add_parser(
        name,
        help="talk with a LLaVA in the terminal",
        description="A conversation with a LLaVA about pictures, in the terminal or from a pipe: a question "
        "a line. /help there lists what else a line can do.",
    )
    options_module.add_flags(parser, commands.MODEL_OPTIONS)
    options_module.add_flags(parser, options_module.merge_options())
    add = parser.add_argument
    add("--image", action="append", default=[], metavar="FILE", help="a picture; may be given several times")
    add("--max-new-tokens", type=options_module.reader(options_module.Option(None, whole(1), "a whole number from 1", "")), default=512,
        help="length of an answer at most (512)")  # fmt: skip
    add("--temperature", type=options_module.reader(options_module.Option(None, _temperature, "a number from 0", "")), default=0.0,
        help="0 takes the likeliest token, more draws (0)")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Holds the conversation.

    Raises:
        ValueError: options that do not go together, a picture that cannot be opened, or, from a pipe, a line
            that cannot be done.
    """
    from llava_pitome.cli.chat.conversation import Conversation
    from llava_pitome.cli.chat.terminal import Terminal

    commands.check_model(options)
    config = options_module.merge_config(vars(options))
    pictures = [open_image(name) for name in options.image]
    model, processor = commands.load(options, config)
    conversation = Conversation(model, processor, options.max_new_tokens, options.temperature)
    for picture in pictures:
        conversation.show(picture)
    interactive = sys.stdin.isatty()
    terminal = Terminal(conversation, applied(model), partial(_changed, applied(model)))
    if interactive:
        terminal.say(f"{options.model}: a question a line; /help lists commands\n")
    terminal.hold(_typed() if interactive else sys.stdin, interactive)
    return 0


def _temperature(text: str) -> float:
    if not 0 <= (value := float(text)) < math.inf:
        raise ValueError(text)
    return value


def _changed(begun: MergeConfig | None, **amount: Any) -> MergeConfig:
    """How the model merged at first, going as far as `amount` says instead."""
    kept = {k: v for k, v in begun.to_dict().items() if k not in AMOUNTS} if begun else {}
    return MergeConfig.from_dict(kept | amount)


def _typed() -> Iterator[str]:
    """Lines as a person types them, with the editing and history of the terminal, until Ctrl-D or Ctrl-C."""
    import readline  # noqa: F401  # input() uses it once it is there

    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            sys.stdout.write("\n")
            return
