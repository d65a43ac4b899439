"""What stands in front of the application: which paths there are, how much is read, how many may wait."""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from llava_pitome.integrations.serve.limits import Limits

Scope, Message = MutableMapping[str, Any], MutableMapping[str, Any]
Receive, Send = Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]
CHAT, MODELS, HEALTH = "/v1/chat/completions", "/v1/models", "/health"
ASKED = "llava_pitome.asked"  # in the scope of a request that generates: an Asked
ALLOWED = {CHAT: ("POST",), MODELS: ("GET",), HEALTH: ("GET",)}
TYPES = {404: "not_found_error", 413: "request_too_large", 429: "rate_limit_exceeded", 500: "server_error",
         503: "server_error"}  # fmt: skip


def error(reason: str, status: int) -> dict[str, Any]:
    """A refusal in the form that OpenAI's clients read."""
    return {"error": {"message": reason, "type": TYPES.get(status, "invalid_request_error"), "code": status}}


LATE = object()  # instead of a body that took too long


class LayerAttention:
    """A request that has arrived.

    Attributes:
        left: set when nobody is to be answered any more: the client has left or was answered, or the server
            ends.
        gone: set when the client has left.
    """

    def __init__(self, body: bytes):
        """Holds its body until it is taken."""
        self.left, self.gone, self._body = asyncio.Event(), asyncio.Event(), body

    def take(self) -> bytes:
        """The body, once: it may be long, and the request may wait."""
        body, self._body = self._body, b""
        return body


class Guard:
    """An ASGI application that passes on to another what is within the limits.

    Attributes:
        reading: requests that are arriving now.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], limits: Limits):
        """Stands in front of `app`."""
        self._app, self._limits = app, limits
        self.reading = 0
        self._asked: set[LayerAttention] = set()

    @property
    def answering(self) -> int:
        """Requests that are being answered, or wait for it, now."""
        return len(self._asked)

    def close(self) -> None:
        """Ends every answer with its next token, and lets nobody wait any longer."""
        for asked in self._asked:
            asked.left.set()

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
        most = self._limits.queue
        if _announced(scope) > self._limits.body:
            await _refuse(send, self._too_long(), 413)
            return
        if self.reading >= most:
            await _refuse(send, f"{most} requests are being read, which is the most", 429)
            return
        self.reading += 1
        try:
            body = await asyncio.wait_for(_read(receive, self._limits.body), self._limits.seconds)
        except TimeoutError:
            body = LATE
        finally:
            self.reading -= 1
        if body is LATE:
            await _refuse(send, f"the request took more than {self._limits.seconds} s to arrive", 408)
        elif body is None:
            await _refuse(send, self._too_long(), 413)
        elif self.answering >= most:
            await _refuse(send, f"{most} requests are being answered or wait, which is the most", 429)
        else:
            await self._answer(scope, body, receive, send)

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """A request that has arrived; the application is told when its client leaves."""
        asked = LayerAttention(body)

        async def watch() -> None:
            await receive()  # only that he leaves can come now
            asked.gone.set()
            asked.left.set()

        watching = asyncio.create_task(watch())
        self._asked.add(asked)
        try:
            await self._app({**scope, ASKED: asked}, _gone(asked.gone), send)
        finally:
            self._asked.discard(asked)
            asked.left.set()
            watching.cancel()

    def _too_long(self) -> str:
        return f"the request is longer than {self._limits.body} bytes"


def _announced(scope: Scope) -> int:
    """The length that a request says it has; 0 where it says none."""
    said = dict(scope["headers"]).get(b"content-length", b"")
    return int(said[:18]) if said.isdigit() else 0


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


def _gone(gone: asyncio.Event) -> Receive:
    """What else comes from a client whose body has been taken: that it has left."""

    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    return receive


async def _refuse(send: Send, reason: str, status: int) -> None:
    """Answers with a reason."""
    body = json.dumps(error(reason, status)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 429:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
