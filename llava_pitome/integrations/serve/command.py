"""`llava-pitome serve`: its options, and running the server."""

import argparse
import socket
import sys
from contextlib import suppress
from typing import Any

from llava_pitome.api import applied
from llava_pitome.cli import model_options
from llava_pitome.cli.options import Option, add_flags, boolean, merge_config, merge_options, whole
from llava_pitome.integrations.serve.limits import Limits
from llava_pitome.models import hf_llava
from llava_pitome.models.image_counts import counts_of

SHUTDOWN_SECONDS = 30  # within which the token that is being generated must come
MEGABYTE = 2**20
LIMITS = Limits()


def _limit(default: int, help: str) -> Option:
    return Option(default, whole(1), "a whole number from 1", help, "limits")


OPTIONS = {
    "host": Option(
        "127.0.0.1", str, "an address", "address to listen on; 127.0.0.1: this machine alone", "server"
    ),
    "port": Option(8000, whole(0, 65535), "in [0, 65535]", "port; 0: a free one", "server"),
    "name": Option(None, str, "a name", "name of the model for clients; the value of --model", "server"),
    "fetch_urls": Option(
        False,
        boolean,
        "true | false",
        "fetch images from http and https URLs; private addresses never are",
        "server",
    ),
    "max_prompt_tokens": _limit(LIMITS.prompt_tokens, "tokens of a prompt, image tokens included"),
    "max_new_tokens": _limit(LIMITS.new_tokens, "tokens of an answer"),
    "max_queue": _limit(LIMITS.queue, "requests that are answered or wait at a time"),
    "max_pictures": _limit(LIMITS.images, "images in a request"),
    "max_pixels": _limit(LIMITS.pixels, "pixels of a request's images together"),
    "max_picture_mb": _limit(LIMITS.image_bytes // MEGABYTE, "megabytes of an image"),
    "max_request_mb": _limit(LIMITS.request_bytes // MEGABYTE, "megabytes of a request"),
}


def describe(parsers: Any, name: str) -> None:
    """Adds the command and its options to a parser's subparsers."""
    parser = parsers.add_parser(
        name,
        help="an OpenAI-compatible endpoint",
        description="Serves /v1/chat/completions for OpenAI's clients, with merging on.",
    )
    add_flags(parser, model_options.MODEL_OPTIONS | merge_options() | OPTIONS)


def run(options: argparse.Namespace) -> int:
    """Serves until it is interrupted.

    Raises:
        ValueError: options that contradict each other, or an address that cannot be listened on.
    """
    import uvicorn

    from llava_pitome.integrations.serve.app import Server, build

    model_options.check_model(options)
    config = merge_config(vars(options))
    limits = Limits(
        request_bytes=options.max_request_mb * MEGABYTE,
        image_bytes=options.max_picture_mb * MEGABYTE,
        pixels=options.max_pixels,
        images=options.max_pictures,
        prompt_tokens=options.max_prompt_tokens,
        new_tokens=options.max_new_tokens,
        queue=options.max_queue,
        fetch_urls=options.fetch_urls,
    )
    with listen(options.host, options.port) as sock:  # before the model is loaded
        model, processor = model_options.load(options, config)
        app = build(options.name or options.model, model, processor, limits)
        settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=SHUTDOWN_SECONDS)
        counts = counts_of(hf_llava.find(model))
        tokens = "image tokens depend on the sizes of images"
        if counts.tiling is None:
            merged, patches = (counts.images(config, [None])[0] for config in (applied(model), None))
            tokens = f"{merged} image tokens of {patches} an image"
        with suppress(KeyboardInterrupt):  # which uvicorn raises again after the shutdown
            sys.stdout.write(f"http://{address(sock)}/v1 serves {options.model}, {tokens}\n")
            sys.stdout.flush()
            Server(settings).run(sockets=[sock])
    return 0


def listen(host: str, port: int) -> socket.socket:
    """Returns a listening socket; uvicorn's `bind_socket` exits the process where it cannot.

    Raises:
        ValueError: the address is taken or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ValueError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error


def address(sock: socket.socket) -> str:
    """Returns the host and port of a socket as they stand in a URL."""
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
