"""`llava-pitome serve`: its options, and the server's life."""

import argparse
import sys
from contextlib import suppress
from typing import Any

from llava_pitome.api import image_tokens
from llava_pitome.cli import model_options as commands
from llava_pitome.cli import options as options_module
from llava_pitome.cli.options import whole
from llava_pitome.integrations.serve.limits import Limits
from llava_pitome.integrations.serve.listening import address, listening, port
from llava_pitome.models import hf_llava as llava

GRACE = 30  # seconds in which the token that is being worked out must come, when the server ends
NAMES = {  # of limits, in the order of --help
    "prompt": ("--max-prompt-tokens", 1, "tokens of a prompt"),
    "answer": ("--max-new-tokens", 1, "tokens of an answer"),
    "queue": ("--max-queue", 1, "requests that are answered or wait at one time"),
    "pictures": ("--max-pictures", 1, "pictures in a request"),
    "pixels": ("--max-pixels", 1, "pixels of a request's pictures together"),
    "picture": ("--max-picture-mb", 2**20, "megabytes of a picture"),
    "body": ("--max-request-mb", 2**20, "megabytes of a request"),
}


def describe(parsers: Any, name: str) -> None:
    """Adds the command and its options to a parser's subparsers."""
    parser = parsers.add_parser(
        name,
        help="an OpenAI-compatible endpoint",
        description="Serves /v1/chat/completions as OpenAI's clients speak it, with merging on.",
    )
    options_module.add_flags(parser, commands.MODEL_OPTIONS)
    options_module.add_flags(parser, options_module.merge_options())
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine alone)")
    add(
        "--port",
        type=options_module.reader(options_module.Option(None, port, "in [0, 65535]", "")),
        default=8000,
        help="0 takes a free one (8000)",
    )
    add("--name", help="what clients call the model (what --model says)")
    add("--fetch-urls", action="store_true",
        help="fetch pictures from http and https addresses; private ones never are (off)")  # fmt: skip
    add = parser.add_argument_group("limits").add_argument
    for field, (flag, unit, help) in NAMES.items():
        default = getattr(Limits(), field) // unit
        read = options_module.reader(options_module.Option(None, whole(1), "a whole number from 1", ""))
        add(flag, dest=field, type=read, default=default, help=f"{help}, at most ({default})")


def run(options: argparse.Namespace) -> int:
    """Serves until it is ended.

    Raises:
        ValueError: options that do not go together, or an address that cannot be listened at.
    """
    import uvicorn

    from llava_pitome.integrations.serve.app import build
    from llava_pitome.integrations.serve.ending import Server

    commands.check_model(options)
    config = options_module.merge_config(vars(options))
    limits = Limits(
        **{field: getattr(options, field) * unit for field, (_, unit, _) in NAMES.items()},
        urls=options.fetch_urls,
    )
    with listening(options.host, options.port) as sock:  # before a model is loaded for nothing
        model, processor = commands.load(options, config)
        app = build(options.name or options.model, model, processor, limits)
        settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE)
        tokens = f"{image_tokens(model)} image tokens of {llava.find(model).patches} a picture"
        with suppress(KeyboardInterrupt):  # which uvicorn raises again when it has ended
            sys.stdout.write(f"http://{address(sock)}/v1 serves {options.model}, {tokens}\n")
            sys.stdout.flush()
            Server(settings, app).run(sockets=[sock])
    return 0
