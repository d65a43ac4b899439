"""A server in a thread, and clients, images and messages for it."""

import base64
import io
import json
import os
import socket
import sys
import threading
import time
from contextlib import contextmanager
from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest
from PIL import Image

from llava_pitome.cli.main import main
from llava_pitome.embedded import render, scenes
from llava_pitome.integrations.serve.limits import Limits

MESSAGE = {"role": "user", "content": "What?"}
CHAT = "/v1/chat/completions"


def build(embedded, **limits):
    """The application for a model and its processor."""
    from llava_pitome.integrations.serve.app import build

    return build("embedded", *embedded, Limits(**limits))


@contextmanager
def running(app):
    """The base URL of an application that a thread serves until `app.state.shut_down()` or the end."""
    import uvicorn

    from llava_pitome.integrations.serve.app import Server

    with socket.create_server(("127.0.0.1", 0)) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/v1"
        server = Server(uvicorn.Config(app, log_level="error"))
        app.state.shut_down = lambda: setattr(server, "should_exit", True)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            yield url
        finally:
            app.state.shut_down()
            thread.join(60)
            assert not thread.is_alive()


def client(url: str):
    from openai import OpenAI

    return OpenAI(base_url=url, api_key="none", max_retries=0)


def complete(url: str, messages: list[dict] | None = None, **settings):
    return client(url).chat.completions.create(model="embedded", messages=messages or [MESSAGE], **settings)


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    data = io.BytesIO()
    image.save(data, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(data.getvalue()).decode()


def scene(seed: int) -> Image.Image:
    return Image.fromarray(render.render(scenes.scene(seed)))


def messages(question: str, *urls: str) -> list[dict]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]


def refusal(url: str, **body):
    """The error of a request that is refused."""
    from openai import APIStatusError

    body = {"model": "embedded", "messages": messages("What?", data_url(scene(0)))} | body
    with pytest.raises(APIStatusError) as error:
        client(url).post("/chat/completions", body=body, cast_to=object)
    return error.value


def send(
    url: str, raw: bytes | None = None, method="POST", path=CHAT, headers=None, **body
) -> HTTPConnection:
    """A connection on which a request was sent, and no response read."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=60)
    raw = json.dumps({"messages": [MESSAGE]} | body).encode() if raw is None else raw
    connection.request(method, path, raw, headers or {"Content-Type": "application/json"})
    return connection


def receive(connection: HTTPConnection) -> tuple[int, str]:
    """The status and the error message of a response."""
    response = connection.getresponse()
    message = json.load(response)["error"]["message"]
    connection.close()
    return response.status, message


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def run_until_signal(monkeypatch, words: list[str], announcement: str, act, signal: int) -> int:
    """Runs a command; once it prints a line with the announcement, acts on that line and sends a signal."""
    read, write = os.pipe()
    output = os.fdopen(read)
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w", buffering=1))

    def wait() -> None:
        line = next(line for line in output if announcement in line)
        try:
            act(line)
        finally:
            os.kill(os.getpid(), signal)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    status = main(words)
    thread.join(60)
    sys.stdout.close()
    output.close()
    return status
