"""Clients that leave, a server that is ended, and a command that refuses to begin."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest
import torch
import uvicorn
from served import MESSAGE, asked, client, encoded, refused, scene, serving

from llava_pitome import MergeConfig, load
from llava_pitome.cli.main import main
from llava_pitome.integrations.serve.answering import OneAnswer
from llava_pitome.integrations.serve.app import build
from llava_pitome.integrations.serve.ending import Server
from llava_pitome.integrations.serve.limits import Limits
from llava_pitome.integrations.serve.listening import address, listening

CONFIG = MergeConfig(ratio=0.9)


@pytest.fixture(scope="module")
def embedded():
    return load("embedded", CONFIG)


@pytest.fixture(scope="module")
def url(embedded):
    with serving(build("embedded", *embedded, Limits(prompt=1000, answer=64, pictures=3))) as at:
        yield at


class Generating:
    """Stands in for a model's `generate`: generates until it is told that nobody reads it."""

    def __init__(self):
        self.begun, self.ended, self.go = threading.Event(), threading.Event(), threading.Event()
        self.calls = 0

    def __call__(self, input_ids, stopping_criteria, streamer=None, **_):
        self.calls += 1
        self.begun.set()
        while not self.go.is_set() and not all(done(input_ids, None).all() for done in stopping_criteria):
            time.sleep(0.01)
        if not self.go.is_set():
            self.ended.set()
        if streamer is not None:
            streamer.end()
        return torch.cat([input_ids, input_ids[:, :1]], 1)


def posted(url: str, **body) -> HTTPConnection:
    connection = HTTPConnection(urlsplit(url).netloc)
    body = json.dumps({"messages": [MESSAGE]} | body)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_when_its_client_leaves(embedded, url, monkeypatch, stream):
    generating = Generating()
    with monkeypatch.context() as patched:
        patched.setattr(embedded[0], "generate", generating)
        connection = posted(url, stream=stream)
        assert generating.begun.wait(30)
        connection.close()
        assert generating.ended.wait(30)
    assert client(url).chat.completions.create(model="embedded", messages=[MESSAGE]).choices


def until(is_so) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_who_waits_and_leaves_gives_the_place_back_and_is_never_generated_for(embedded, monkeypatch):
    generating, guard = Generating(), build("embedded", *embedded, Limits(queue=2))
    with serving(guard) as at, monkeypatch.context() as patched:
        patched.setattr(embedded[0], "generate", generating)
        first = posted(at)
        until(lambda: generating.begun.is_set())
        second = posted(at)
        until(lambda: guard.answering == 2)
        assert refused(at).status_code == 429
        second.close()
        until(lambda: guard.answering == 1)
        generating.go.set()
        assert first.getresponse().status == 200
        first.close()
        assert client(at).chat.completions.create(model="embedded", messages=[MESSAGE]).choices
        assert generating.calls == 2  # of the first and the last, not of who left


def test_the_command_refuses_before_a_model_is_loaded(capsys, monkeypatch):
    def loads(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("llava_pitome.cli.model_options.load", loads)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen" in capsys.readouterr().err
    assert main(["serve", "--device", "cuda:9"]) == 2
    assert "cuda:9" in capsys.readouterr().err
    for words in (["--port", "70000"], ["--max-queue", "0"], ["--ratio", "1.5"]):
        with pytest.raises(SystemExit) as found:
            main(["serve", *words])
        assert found.value.code == 2
        assert words[1] in capsys.readouterr().err


def test_pictures_of_who_left_are_not_kept_while_another_is_answered(embedded, monkeypatch):
    pictures = []

    class Recording(OneAnswer):
        def __init__(self, model, inputs, *rest):
            pictures.append(weakref.ref(inputs["pixel_values"]))
            super().__init__(model, inputs, *rest)

    monkeypatch.setattr("llava_pitome.integrations.serve.app.OneAnswer", Recording)
    generating, guard = Generating(), build("embedded", *embedded, Limits(queue=4))
    with serving(guard) as at, monkeypatch.context() as patched:
        patched.setattr(embedded[0], "generate", generating)
        first = posted(at, messages=asked("x", encoded(scene(0))))
        until(lambda: generating.begun.is_set())
        for stream in (False, True, False):
            count = len(pictures)
            waits = posted(at, messages=asked("x", encoded(scene(0))), stream=stream)
            until(lambda n=count: len(pictures) > n)
            waits.close()
            until(lambda: guard.answering == 1)
        until(lambda: sum(picture() is not None for picture in pictures) <= 1)
        generating.go.set()
        assert first.getresponse().status == 200
        first.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_ends_says_so_to_who_waits(embedded, monkeypatch, capsys, stream):
    generating, guard = Generating(), build("embedded", *embedded, Limits())
    monkeypatch.setattr(embedded[0], "generate", generating)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = Server(uvicorn.Config(guard, log_level="error"), guard)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        waits = [posted(f"http://{address(listening)}", stream=stream) for _ in range(2)]
        until(lambda: guard.answering == 2 and generating.begun.is_set())
        server.should_exit = True
        answers = [connection.getresponse() for connection in waits]
        assert all(b"the server is being ended" in answer.read() for answer in answers)
        assert {answer.status for answer in answers} == {200 if stream else 503}
        thread.join(30)
        assert not thread.is_alive()
        for connection in waits:
            connection.close()
    assert "ending; 2 requests" in capsys.readouterr().err


def test_the_command_ends_in_peace_when_it_is_interrupted():
    words = [sys.executable, "-m", "llava_pitome", "serve", "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        said = process.stdout.readline()
        assert "serves embedded" in said
        connection = HTTPConnection(urlsplit(said.split()[0]).netloc)
        connection.request("GET", "/health")  # which waits until it is up
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in complaints


@pytest.mark.parametrize("host, shown", [("127.0.0.1", "127.0.0.1:"), ("::1", "[::1]:")])
def test_the_address_stands_as_in_a_url(host, shown):
    with listening(host, 0) as sock:
        assert urlsplit(f"http://{address(sock)}").port == sock.getsockname()[1]
        assert address(sock).startswith(shown)
