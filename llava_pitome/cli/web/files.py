"""Where a page's files are, and that none is left when it ends; to be used before Gradio is imported."""

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PLACE = "GRADIO_TEMP_DIR"  # names where Gradio has its files; it looks there when it is imported, and later
SIGNALS = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None))]


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
    """Lets a process that is asked to end clean up as it does on Ctrl-C; in its main thread.

    What it was told to ignore, as by nohup, stays ignored.
    """
    changed = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    for number in changed:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)
