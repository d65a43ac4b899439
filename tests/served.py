"""What the tests of the server share: a server, clients, pictures, questions."""

import base64
import io
import socket
import threading
from contextlib import contextmanager

import pytest
import uvicorn
from openai import APIStatusError, OpenAI
from PIL import Image

from llava_pitome.embedded import render, scenes


@contextmanager
def serving(app):
    """The address of an application that is served by a thread of this process."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()


def client(url: str) -> OpenAI:
    return OpenAI(base_url=url, api_key="none", max_retries=0)


def encoded(picture: Image.Image, kind: str = "PNG") -> str:
    data = io.BytesIO()
    picture.save(data, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(data.getvalue()).decode()


def scene(seed: int) -> Image.Image:
    return Image.fromarray(render.render(scenes.scene(seed)))


def asked(question: str, *pictures: str) -> list[dict]:
    content = [{"type": "image_url", "image_url": {"url": p}} for p in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def refused(url: str, **body) -> APIStatusError:
    body = {"model": "embedded", "messages": asked("What?", encoded(scene(0)))} | body
    with pytest.raises(APIStatusError) as found:
        client(url).post("/chat/completions", body=body, cast_to=object)
    return found.value


MESSAGE = {"role": "user", "content": "What?"}
