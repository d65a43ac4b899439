"""The images of a request: fetched where that is on, decoded, opened."""

import base64
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException

from llava_pitome.image_io import open_image
from llava_pitome.integrations.serve.limits import Limits
from llava_pitome.integrations.serve.remote import fetch
from llava_pitome.integrations.serve.requests import Message

if TYPE_CHECKING:
    from PIL import Image

Fetch = Callable[[str, int, float], bytes]  # a URL, the most bytes, seconds


def image_urls(messages: list[Message]) -> list[str]:
    """Returns the URLs of all images in their order."""
    return [part.image_url.url for m in messages for part in m.content if part.type == "image_url"]


def is_remote(url: str) -> bool:
    """Whether an image is not in the request itself."""
    return not url[:5].lower().startswith("data:")


def fetch_images(urls: list[str], limits: Limits, deadline: float, fetch: Fetch = fetch) -> dict[str, bytes]:
    """Returns the image files of the remote URLs, each fetched once.

    All of them together may be as large as a request.

    Args:
        urls: of the images, remote or not.
        limits: whether anything is fetched, and how much.
        deadline: for all of them, on the clock of `time.monotonic()`.
        fetch: returns what a URL holds, given the most bytes and seconds.

    Raises:
        HTTPException: 400 where images are not fetched, or one cannot be.
    """
    files: dict[str, bytes] = {}
    remaining = limits.request_bytes
    for url in dict.fromkeys(filter(is_remote, urls)):
        if not limits.fetch_urls:
            raise HTTPException(400, "this server fetches no images: send them as data:image/...;base64,...")
        try:
            files[url] = fetch(url, min(limits.image_bytes, remaining), deadline - time.monotonic())
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        remaining -= len(files[url])
    return files


def open_images(urls: list[str], files: dict[str, bytes], limits: Limits) -> "list[Image.Image]":
    """Returns the images.

    Args:
        urls: of the images, remote or not.
        files: what the remote URLs hold.
        limits: `pixels` is for all images together.

    Raises:
        HTTPException: 400 for a file that is not an image or has too many pixels, 413 for too many bytes.
    """
    images, remaining = [], limits.pixels
    for url in urls:
        raw = files[url] if is_remote(url) else _decode(url, limits)
        try:
            image = open_image(raw, max(remaining, 0))
        except ValueError as error:
            context = f" (the images before it leave that of {limits.pixels:,})" if images else ""
            raise HTTPException(400, f"{error}{context if 'pixels' in str(error) else ''}") from error
        remaining -= image.width * image.height
        images.append(image)
    return images


def _decode(url: str, limits: Limits) -> bytes:
    """Returns the bytes of data:image/...;base64,..."""
    header, comma, data = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise HTTPException(400, "a data URL must have the form data:image/...;base64,...")
    try:
        raw = base64.b64decode("".join(data.split()), validate=True)  # some clients break the lines
    except ValueError as error:
        raise HTTPException(400, f"the image is not valid base64: {error}") from error
    if len(raw) > limits.image_bytes:
        raise HTTPException(413, f"an image has {len(raw)} bytes; at most {limits.image_bytes} are allowed")
    return raw
