"""The ASGI application: its paths, how many requests it receives and answers at a time, its shutdown."""

import asyncio
import json
import socket
import sys
from collections.abc import Mapping
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from torch import nn

from llava_pitome.integrations.serve.generation import SHUTTING_DOWN, ChatGenerator, RequestModel, error_body
from llava_pitome.integrations.serve.limits import Limits
from llava_pitome.integrations.serve.requests import ChatRequest, parse_request

CHAT, MODELS, HEALTH = "/v1/chat/completions", "/v1/models", "/health"


class ChatEndpoint:
    """The ASGI endpoint of chat requests.

    uvicorn's `limit_concurrency` also counts idle connections and answers 503 in plain text, and starlette's
    body limit is younger than the oldest starlette that is supported: both limits are kept here.

    Attributes:
        reading: the number of requests that are being received.
        active: a model for each request that waits or is being answered.
    """

    def __init__(self, generator: ChatGenerator, limits: Limits):
        """Answers with a generator, within limits."""
        self._generator, self._limits = generator, limits
        self.reading = 0
        self.active: set[RequestModel] = set()

    def stop(self) -> None:
        """Ends every answer with its next token, and the wait of every other request."""
        for model in self.active:
            model.stopped.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Receives one request and answers it, unless it is stopped before.

        Raises:
            HTTPException: a request that exceeds a limit or is invalid, and 503 when the server shuts down.
        """
        chat = await self._receive(Request(scope, receive))
        model = RequestModel(self._generator.model, chat.seed)
        disconnect = asyncio.ensure_future(receive())  # no other message can follow the body
        disconnect.add_done_callback(lambda _: model.stopped.set())
        answer = asyncio.create_task(self._generator.answer(chat, model))
        stopped = asyncio.create_task(model.stopped.wait())
        self.active.add(model)
        try:
            await asyncio.wait((answer, stopped), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise HTTPException(503, SHUTTING_DOWN)
            await answer.result()(scope, lambda: asyncio.shield(disconnect), send)
        finally:
            self.active.discard(model)
            model.stopped.set()
            model.image_inputs.clear()
            for task in (answer, stopped, disconnect):
                task.cancel()

    async def _receive(self, request: Request) -> ChatRequest:
        """Returns a validated request, where the queue has room for it.

        Raises:
            HTTPException: 408, 413 or 429 for a request that exceeds a limit, 400 or 415 for an invalid one.
        """
        most, queue, seconds = self._limits.request_bytes, self._limits.queue, self._limits.seconds
        too_long = HTTPException(413, f"the request is longer than {most} bytes, which is the limit")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:18]) > most:
            raise too_long
        if self.reading >= queue:
            raise _too_many(f"{queue} requests are being received")
        body = bytearray()
        self.reading += 1
        try:
            async with asyncio.timeout(seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        raise too_long
        except TimeoutError as error:
            raise HTTPException(408, f"the request took more than {seconds} s to arrive") from error
        except ClientDisconnect as error:
            raise HTTPException(400, "the client has disconnected") from error
        finally:
            self.reading -= 1
        if len(self.active) >= queue:
            raise _too_many(f"{queue} requests are being answered or wait")
        return parse_request(body, request.headers.get("content-type", ""), self._limits)


def _too_many(reason: str) -> HTTPException:
    return HTTPException(429, f"{reason}, which is the limit", {"Retry-After": "1"})


def build(name: str, model: nn.Module, processor: Any, limits: Limits) -> FastAPI:
    """Returns the application: chat completions, the list of models, and whether it is up.

    Args:
        name: of the model for clients.
        model: a LLaVA, merging or not.
        processor: its processor, which `apply` was given where it merges.
        limits: of requests.

    Raises:
        ValueError: the processor has no chat template.
    """
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.state.chat = ChatEndpoint(ChatGenerator(name, model, processor, limits), limits)
    app.router.add_route(CHAT, app.state.chat, methods=["POST"])

    @app.get(MODELS)
    async def models() -> dict[str, Any]:
        config = getattr(model.config, "token_merging", None)
        card = {"id": name, "object": "model", "owned_by": "local", "created": 0, "token_merging": config}
        return {"object": "list", "data": [card]}

    @app.get(HEALTH)
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message, path = error.detail, request.url.path
        if error.status_code == 404:
            message = f"there is no {path}; allowed are {CHAT}, {MODELS}, {HEALTH}"
        elif error.status_code == 405:
            message = f"{request.method} {path} is not allowed; allowed is {error.headers['Allow']}"
        return _error(message, error.status_code, error.headers)

    @app.exception_handler(Exception)  # uvicorn logs it
    async def failure(_request: Request, error: Exception) -> Response:
        return _error(f"generation failed: {type(error).__name__}", 500)

    return app


def _error(message: str, status: int, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(error_body(message, status)), status, headers, "application/json")


class Server(uvicorn.Server):
    """Uvicorn's server, which would first answer everything that waits when it shuts down."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops all requests, and then shuts down as uvicorn does."""
        chat: ChatEndpoint = self.config.app.state.chat
        if chat.active:
            sys.stderr.write(f"shutting down; {len(chat.active)} requests get a 503 instead of an answer\n")
        chat.stop()
        await super().shutdown(sockets)
