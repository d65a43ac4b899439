"""The pictures of a request: fetched where that is on, decoded, opened."""

import base64
import binascii
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llava_pitome.image_io import open_image
from llava_pitome.integrations.serve.limits import Limits
from llava_pitome.integrations.serve.remote import fetch
from llava_pitome.integrations.serve.request import Refused, parts

if TYPE_CHECKING:
    from PIL import Image

Read = Callable[[str, int, float], bytes]


def addresses(messages: list[dict[str, Any]]) -> list[str]:
    """Where the pictures of a checked conversation are, in their order: data:, http: or https:."""
    return [
        part["image_url"]["url"]
        for i, message in enumerate(messages)
        for part in parts(message, i)
        if part["type"] == "image_url"
    ]


def is_remote(address: str) -> bool:
    """Whether a picture is not in the request itself."""
    return not address[:5].lower().startswith("data:")


def fetched(
    messages: list[dict[str, Any]], limits: Limits, until: float, read: Read = fetch
) -> dict[str, bytes]:
    """What the addresses of a conversation hold that are not in the request itself, each fetched once.

    All of them together may be as large as one request.

    Args:
        messages: checked.
        limits: whether anything is fetched, and how much.
        until: when all of them must be there, as `time.monotonic()` tells.
        read: fetches what an address holds.

    Raises:
        Refused: pictures are not fetched here, or one cannot be.
    """
    found: dict[str, bytes] = {}
    room = limits.body
    for address in filter(is_remote, addresses(messages)):
        if not limits.urls:
            raise Refused("this server fetches no pictures: send them as data:image/...;base64,...")
        if address in found:
            continue
        try:
            found[address] = read(address, min(limits.picture, room), until - time.monotonic())
        except ValueError as error:
            raise Refused(str(error)) from error
        room -= len(found[address])
    return found


def opened(messages: list[dict[str, Any]], limits: Limits, held: dict[str, bytes]) -> list[dict[str, Any]]:
    """The conversation as processors take it, its pictures opened.

    Args:
        messages: checked.
        limits: `pixels` is for all pictures together.
        held: what was fetched, by address.

    Raises:
        Refused: a picture that is none, or too large.
    """
    room, conversation = limits.pixels, []
    for i, message in enumerate(messages):
        content = []
        for part in parts(message, i):
            if part["type"] == "image_url":
                address = part["image_url"]["url"]
                raw = held[address] if is_remote(address) else _decoded(address, limits)
                picture = _picture(raw, limits, room)
                room -= picture.width * picture.height
                part = {"type": "image", "image": picture}
            content.append(part)
        conversation.append({"role": message["role"], "content": content})
    return conversation


def _picture(raw: bytes, limits: Limits, room: int) -> "Image.Image":
    """The picture in some bytes, of so many pixels at most."""
    try:
        return open_image(raw, max(room, 0))
    except ValueError as error:
        before = f" (what the pictures before it leave of {limits.pixels:,})" if room < limits.pixels else ""
        raise Refused(f"{error}{before if 'pixels' in str(error) else ''}") from error


def _decoded(address: str, limits: Limits) -> bytes:
    """The bytes of data:image/...;base64,..."""
    head, comma, data = address.partition(",")
    if not comma or not head.endswith(";base64"):
        raise Refused("a data: address must be of the form data:image/...;base64,...")
    try:
        raw = base64.b64decode("".join(data.split()), validate=True)  # some encoders break lines
    except (binascii.Error, ValueError) as error:  # ValueError: characters that are not ASCII
        raise Refused(f"the picture is no base64: {error}") from error
    if len(raw) > limits.picture:
        raise Refused(f"a picture has {len(raw)} bytes; at most {limits.picture} are allowed", 413)
    return raw
