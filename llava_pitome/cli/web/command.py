"""`llava-pitome web`: its options, and running the page."""

import argparse
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_pitome.api import applied
from llava_pitome.cli import model_options
from llava_pitome.cli.options import Option, add_flags, share, whole
from llava_pitome.config import MergeConfig
from llava_pitome.integrations.serve.command import listen

HOST = "127.0.0.1"
FOLDER_VARIABLE = "GRADIO_TEMP_DIR"  # which Gradio reads when it is imported, and later
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
OPTIONS = {
    "ratio": Option(
        None, share, "a number in (0, 1]", "initial ratio; as the model was saved to merge, or else 0.9"
    ),
    "port": Option(7860, whole(0, 65535), "in [0, 65535]", "port; 0: a free one"),
    "max_new_tokens": Option(256, whole(1), "a whole number from 1", "tokens of an answer"),
    "max_upload_mb": Option(16, whole(1), "a whole number from 1", "megabytes of an image"),
}


def describe(parsers: Any, name: str) -> None:
    """Adds the command and its options to a parser's subparsers."""
    parser = parsers.add_parser(
        name,
        help="a web page to ask about images and see what merges",
        description="A page on this machine alone: ask about an image, with and without merging, and see its "
        "tokens layer by layer.",
    )
    add_flags(parser, model_options.MODEL_OPTIONS | OPTIONS)


def run(options: argparse.Namespace) -> int:
    """Serves the page until it is ended.

    Raises:
        ValueError: options that are not allowed, or a port that is taken.
    """
    model_options.check_model(options)
    given = None if options.ratio is None else MergeConfig(ratio=options.ratio)
    with interrupt_on_signals(), temporary_folder() as folder:  # before Gradio is imported
        from llava_pitome.cli.web.page import build, launch, write_examples
        from llava_pitome.cli.web.session import Session, initial_choices

        with listen(HOST, options.port) as sock:  # before the model is loaded
            port = sock.getsockname()[1]
        model, processor = model_options.load(options, given)
        session = Session(model, processor, options.max_new_tokens)
        sizes = session.patches, session.layers, session.has_tiles
        initial = initial_choices(options.ratio, applied(model), *sizes)
        launch(build(session, write_examples(folder), initial), HOST, port, options.max_upload_mb)
    return 0


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for the files of a page; it is deleted afterwards.

    It is made in GRADIO_TEMP_DIR where the user has set that.
    """
    before = os.environ.get(FOLDER_VARIABLE)
    if before:
        Path(before).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="llava-pitome-web-", dir=before or None) as made:
        folder = Path(made).resolve()
        os.environ[FOLDER_VARIABLE] = str(folder)
        try:
            yield folder
        finally:
            if before is None:
                del os.environ[FOLDER_VARIABLE]
            else:
                os.environ[FOLDER_VARIABLE] = before


@contextmanager
def interrupt_on_signals() -> Iterator[None]:
    """Makes the main thread clean up on SIGTERM and SIGHUP as on Ctrl-C.

    Signals that the process ignores, as under nohup, stay ignored.
    """
    changed = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    for number in changed:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)
