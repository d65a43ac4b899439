"""What stands in front of the page: requests that it has no use for, or that are too long, end here.

Gradio serves more than a page needs. Among it are addresses that it fetches for whoever asks, and recordings
that it hands to other programs.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope, Message = MutableMapping[str, Any], MutableMapping[str, Any]
Receive, Send = Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]
API = "/gradio_api/"
UPLOAD = f"{API}upload"
POSTED = (UPLOAD, *(API + name for name in ("queue/join", "call/", "run/", "cancel", "reset")))
UNUSED = tuple(API + name for name in ("proxy=", "deep_link"))
BODY = 2**16  # bytes of a question with all that is around it, or of what is around an upload


class Gate:
    """An ASGI application that passes on to another what a page needs."""

    def __init__(self, app: Callable[..., Awaitable[None]], most: int):
        """Stands in front of `app`, where an upload may have `most` bytes."""
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes one request on, or refuses it."""
        status, reason = self._wrong(scope) if scope["type"] == "http" else (0, "")
        if not reason:
            await self._app(scope, receive, send)
            return
        body = json.dumps({"detail": reason}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _wrong(self, scope: Scope) -> tuple[int, str]:
        """A status and the reason why a request ends here; no reason where it does not."""
        path, method = scope["path"], scope["method"]
        if "://" in path:
            return 403, "this page fetches no addresses"
        if path.startswith(UNUSED) or (method not in ("GET", "HEAD", "OPTIONS") and not _posted(path)):
            return 404, f"this page has no {method} {path[:100]}"
        if method != "POST":
            return 0, ""
        length = dict(scope["headers"]).get(b"content-length", b"").decode("latin-1")
        if not length.isdecimal():
            return 411, "a request must say its length (Content-Length)"
        most = BODY + (self._most if path.rstrip("/") == UPLOAD else 0)
        if int(length) > most:
            return 413, f"the request has {int(length):,} bytes; at most {most:,} are allowed"
        return 0, ""


def _posted(path: str) -> bool:
    """Whether something may be posted there."""
    return any(path.startswith(p) if p.endswith("/") else path.rstrip("/") == p for p in POSTED)
