"""The page's life: where its files are, where it listens, and that nothing is left when it ends."""

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from llava_pitome.web.gate import Gate

PLACE = "GRADIO_TEMP_DIR"  # where Gradio has its files
SIGNALS = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None))]
CSS = ".numbers {font-size: 0.9em; color: var(--body-text-color-subdued);} footer {display: none !important;}"


@contextmanager
def folder() -> Iterator[Path]:
    """A folder of its own for the files of pages that are made meanwhile; gone afterwards, with all in it.

    It is made in GRADIO_TEMP_DIR where the user has set that.
    """
    before = os.environ.get(PLACE)
    if before:
        Path(before).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="llava-pitome-web-", dir=before or None) as made:
        os.environ[PLACE] = str(Path(made).resolve())
        try:
            yield Path(os.environ[PLACE])
        finally:
            if before is None:
                del os.environ[PLACE]
            else:
                os.environ[PLACE] = before


@contextmanager
def interrupted() -> Iterator[None]:
    """Lets a process that is asked to end clean up as it does on Ctrl-C; in its main thread."""
    before = [(number, signal.signal(number, signal.default_int_handler)) for number in SIGNALS]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def launch(page: gr.Blocks, host: str, port: int, megabytes: int, wait: bool = True) -> str:
    """Serves the page and gives its address back, at once or, with `wait`, when it was ended.

    Args:
        page: what `build` made.
        host: the address to listen at.
        port: a free one.
        megabytes: of an upload, at most.
        wait: until somebody ends it.
    """
    fonts = ["system-ui", "sans-serif"]  # none from the web
    theme = gr.themes.Default(font=fonts, font_mono=["monospace"])
    most = megabytes * 2**20
    _, address, _ = page.launch(
        server_name=host, server_port=port, share=False, theme=theme, css=CSS, max_file_size=most,
        show_error=True, ssr_mode=False, prevent_thread_lock=not wait, enable_monitoring=False,
        mcp_server=False, run_history=False, app_kwargs={"middleware": [Middleware(Gate, most=most)]},
    )  # fmt: skip
    return address
