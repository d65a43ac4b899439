"""What stands in front of the application: which paths there are, how much is read, how many may wait."""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from llava_pitome.serving.limits import Limits

Scope, Message = MutableMapping[str, Any], MutableMapping[str, Any]
Receive, Send = Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]
CHAT, MODELS, HEALTH = "/v1/chat/completions", "/v1/models", "/health"
ALLOWED = {CHAT: ("POST",), MODELS: ("GET",), HEALTH: ("GET",)}
TYPES = {404: "not_found_error", 413: "request_too_large", 429: "rate_limit_exceeded", 500: "server_error"}


def error(reason: str, status: int) -> dict[str, Any]:
    """A refusal in the form that OpenAI's clients read."""
    return {"error": {"message": reason, "type": TYPES.get(status, "invalid_request_error"), "code": status}}


class Guard:
    """An ASGI application that passes on to another what is within the limits."""

    def __init__(self, app: Callable[..., Awaitable[None]], limits: Limits):
        """Stands in front of `app`."""
        self._app, self._limits, self._now = app, limits, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, or refuses it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, method = scope["path"], scope["method"]
        if path not in ALLOWED:
            await _refuse(send, f"there is no {path}; there are {', '.join(ALLOWED)}", 404)
        elif method not in ALLOWED[path]:
            await _refuse(send, f"{path} takes {' or '.join(ALLOWED[path])}, not {method}", 405)
        elif path == CHAT:
            await self._chat(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One of the requests that generate."""
        if self._now >= self._limits.queue:
            await _refuse(send, f"{self._now} requests are being answered or wait, which is the most", 429)
            return
        self._now += 1
        try:
            try:
                body = await asyncio.wait_for(_read(receive, self._limits.body), self._limits.seconds)
            except TimeoutError:
                await _refuse(send, f"the request took more than {self._limits.seconds} s to arrive", 408)
                return
            if body is None:
                await _refuse(send, f"the request is longer than {self._limits.body} bytes", 413)
                return
            await self._app(scope, _again(body, receive), send)
        finally:
            self._now -= 1


async def _read(receive: Receive, most: int) -> bytes | None:
    """A request's body; None where it is too long, or never came whole."""
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > most:
            return None
    return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read to whom it is for, and then what else comes (that the client has left)."""
    given = False

    async def once() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once


async def _refuse(send: Send, reason: str, status: int) -> None:
    """Answers with a reason."""
    body = json.dumps(error(reason, status)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 429:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
