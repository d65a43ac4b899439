"""Checks of everything that clients of the page send, before Gradio or the model work on it.

Gradio serves more than the page needs. It fetches URLs for clients and hands recordings to other programs.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import gradio as gr
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from llava_pitome.integrations.serve.requests import SHORT, validation_message
from llava_pitome.methods import METHODS

QUESTION = 2000  # characters
HOUR = 3600  # seconds
API = "/gradio_api/"
UPLOAD = f"{API}upload"
POST_PATHS = (UPLOAD, *(API + name for name in ("queue/join", "call/", "run/", "cancel", "reset")))
UNUSED_PATHS = tuple(API + name for name in ("proxy=", "deep_link"))
BODY = 2**16  # bytes of a request, or around an upload


class RequestFilter:
    """An ASGI middleware that refuses requests for what the page does not use, and those that are too long.

    Starlette's body limit is younger than the oldest starlette that Gradio takes, and is one for all paths.
    """

    def __init__(self, app: ASGIApp, max_upload: int):
        """Filters the requests to `app`, whose uploads may have `max_upload` bytes."""
        self._app, self._max_upload = app, max_upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on or refuses it."""
        app = self._app
        if scope["type"] == "http" and (refusal := self._refusal(scope)):
            status, reason = refusal
            app = JSONResponse({"detail": reason}, status)
        await app(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Returns the status and the reason for refusing a request; None where it is allowed."""
        path, method = scope["path"], scope["method"]
        if "://" in path:
            return 403, "this page fetches no URLs"
        if path.startswith(UNUSED_PATHS) or (method not in ("GET", "HEAD", "OPTIONS") and not _is_used(path)):
            return 404, f"this page has no {method} {path[:100]}"
        if method != "POST":
            return None
        length = dict(scope["headers"]).get(b"content-length", b"").decode("latin-1")
        if not length.isdecimal():
            return 411, "a request needs a Content-Length"
        most = BODY + (self._max_upload if path.rstrip("/") == UPLOAD else 0)
        if int(length) > most:
            return 413, f"the request has {int(length):,} bytes; at most {most:,} are allowed"
        return None


def _is_used(path: str) -> bool:
    """Whether the page posts to a path."""
    return any(path.startswith(p) if p.endswith("/") else path.rstrip("/") == p for p in POST_PATHS)


class CheckedBlocks(gr.Blocks):
    """A page whose functions get only files that were uploaded to it, or are its examples.

    Functions that take images must be registered with `preprocess=False` and open the files themselves. Files
    that were not used for an hour are deleted.
    """

    def __init__(self, title: str):
        """Makes an empty page."""
        super().__init__(title=title, analytics_enabled=False, delete_cache=(HOUR // 6, HOUR))
        if not hasattr(gr.Blocks, "preprocess_data"):
            raise RuntimeError(
                f"gradio {gr.__version__} has no Blocks.preprocess_data, where the page checks files: "
                "install gradio 6.31"
            )

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *rest: Any, **named: Any) -> list[Any]:
        """Checks the inputs before Gradio's own method, which would fetch and open what they name.

        Raises:
            gr.Error: a file that is not allowed, an object for another input, or a wrong number of values.
        """
        with gradio_errors():
            inputs = self._check(block_fn.inputs, inputs)
        return await super().preprocess_data(block_fn, inputs, *rest, **named)

    def _check(self, blocks: Sequence[Any], values: Sequence[Any]) -> list[Any]:
        """Returns the values, reduced to the path where they are files."""
        if len(values) != len(blocks):
            raise ValueError(f"{len(values)} values are given; {len(blocks)} are needed")
        folder, most = Path(self.GRADIO_CACHE), self.max_file_size or float("inf")
        checked = []
        for block, value in zip(blocks, values):
            if isinstance(block, gr.Image):
                file = uploaded_file(value, folder, most)
                value = file and {"path": str(file), "meta": {"_type": "gradio.FileData"}}
            elif isinstance(value, dict | list):
                raise ValueError(f"{block.label} may not be an object or a list")
            checked.append(value)
        return checked


@contextmanager
def gradio_errors() -> Iterator[None]:
    """Raises gr.Error, whose message the page shows, for a ValueError."""
    try:
        yield
    except ValueError as error:
        message = validation_message(error) if isinstance(error, ValidationError) else str(error)
        raise gr.Error(message, print_exception=False) from error


def uploaded_file(value: Any, folder: Path, most: float) -> Path | None:
    """Returns the file of an image that was uploaded or is an example; None: no image.

    The file is neither opened nor fetched. Its time is set to now, because old uploads are deleted.

    Args:
        value: of Gradio for a file: an object with its "path".
        folder: of uploads and examples.
        most: bytes of a file.

    Raises:
        ValueError: a URL, data, or a file elsewhere; or one that no longer exists, or is too large.
    """
    if value is None:
        return None
    path = value.get("path") if isinstance(value, dict) else None
    if not isinstance(path, str):
        raise ValueError(f"image={SHORT.repr(value)} is not allowed: it must be an uploaded file, or null")
    name = SHORT.repr(path)
    inside = "\0" not in path and Path(path).is_absolute()
    if not inside or not Path(path).resolve().is_relative_to(folder.resolve()):  # links followed
        raise ValueError(
            f"the image {name} is not allowed: it must be a file that was uploaded to this page; URLs and "
            "data: are never read, nor are other files"
        )
    try:
        status = os.stat(path)
        os.utime(path)
    except OSError as error:
        raise ValueError("the image no longer exists: upload it again") from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"the image {name} is not a file")
    if status.st_size > most:
        raise ValueError(f"the image has {status.st_size:,} bytes; at most {most:,.0f} are allowed")
    return Path(path)


def _check_method(name: str) -> str:
    if name not in METHODS:
        raise ValueError(f"it should be one of {', '.join(METHODS)}")
    return name


class Merging(BaseModel):
    """What is chosen about merging."""

    model_config = ConfigDict(strict=True)
    method: Annotated[str, AfterValidator(_check_method)]
    ratio: float = Field(gt=0, le=1, allow_inf_nan=False)


class Question(Merging):
    """What is asked; Conversation refuses an empty question."""

    question: str = Field(max_length=QUESTION)
    compare: bool


def check_layer(value: Any, last: int) -> int:
    """Returns the index of a point on the layer slider; a whole float is allowed, as browsers may send it.

    Raises:
        ValueError: it is not a whole number from 0 to `last`.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= last or value != int(value):
        raise ValueError(
            f"layer={SHORT.repr(value)} is not allowed: it must be a whole number from 0 to {last}"
        )
    return int(value)
