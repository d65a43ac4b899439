"""`llava-pitome web`: its options, and the page's life."""

import argparse
from pathlib import Path
from typing import Any

from llava_pitome.api import applied
from llava_pitome.cli import model_options as commands
from llava_pitome.cli import options as options_module
from llava_pitome.cli.options import share, whole
from llava_pitome.cli.web.files import folder, interrupted
from llava_pitome.integrations.serve.listening import listening, port

HOST = "127.0.0.1"


def describe(parsers: Any, name: str) -> None:
    """Adds the command and its options to a parser's subparsers."""
    parser = parsers.add_parser(
        name,
        help="a web page to ask about pictures and see what merges",
        description="A page on this machine alone: ask about a picture, with and without merging, and look "
        "at its tokens layer by layer.",
    )
    options_module.add_flags(parser, commands.MODEL_OPTIONS)
    add = parser.add_argument
    add("--ratio", type=options_module.reader(options_module.Option(None, share, "a number in (0, 1]", "")),
        help="where the slider stands at first (as the model was saved to merge, or else 0.9)")  # fmt: skip
    add(
        "--port",
        type=options_module.reader(options_module.Option(None, port, "in [0, 65535]", "")),
        default=7860,
        help="0 takes a free one (7860)",
    )
    add("--max-new-tokens", type=options_module.reader(options_module.Option(None, whole(1), "a whole number from 1", "")), default=256,
        help="length of an answer at most (256)")  # fmt: skip
    add("--max-upload-mb", type=options_module.reader(options_module.Option(None, whole(1), "a whole number from 1", "")), default=16,
        help="megabytes of a picture at most (16)")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Serves the page until it is ended.

    Raises:
        ValueError: options that cannot be served, or a port that is taken.
    """
    commands.check_model(options)
    with interrupted(), folder() as files:
        _serve(options, files)
    return 0


def _serve(options: argparse.Namespace, files: Path) -> None:
    """The page, with its files in a folder."""
    from llava_pitome.cli.web import examples
    from llava_pitome.cli.web.desk import Desk
    from llava_pitome.cli.web.launching import launch
    from llava_pitome.cli.web.page import build
    from llava_pitome.cli.web.start import start

    with listening(HOST, options.port) as sock:  # a port that is taken is known before a model is loaded
        number = sock.getsockname()[1]
    model, processor = commands.load(options, None)
    desk = Desk(model, processor, options.max_new_tokens)
    first = start(options.ratio, applied(model), desk.patches, desk.feature)
    launch(build(desk, examples.write(files), first), HOST, number, options.max_upload_mb)
