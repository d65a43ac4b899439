"""Clients that disconnect, a server that shuts down, and the command."""

import signal
import socket
import threading
import time
import weakref
from urllib.parse import urlsplit

import pytest
import torch
from serving import (
    build,
    complete,
    data_url,
    messages,
    refusal,
    run_until_signal,
    running,
    scene,
    send,
    wait_until,
)

from llava_pitome import MergeConfig, load
from llava_pitome.cli.main import main
from llava_pitome.integrations.serve.command import address, listen


@pytest.fixture(scope="module")
def embedded():
    return load("embedded", MergeConfig(ratio=0.9))


class Generate:
    """Replaces a model's `generate`; it returns once it is released or stopped."""

    def __init__(self):
        self.begun, self.stopped, self.release = threading.Event(), threading.Event(), threading.Event()
        self.calls = 0

    def __call__(self, input_ids, stopping_criteria, streamer=None, **_):
        self.calls += 1
        self.begun.set()
        while not self.release.is_set() and not all(
            done(input_ids, None).all() for done in stopping_criteria
        ):
            time.sleep(0.01)
        if not self.release.is_set():
            self.stopped.set()
        if streamer is not None:
            streamer.end()
        return torch.cat([input_ids, input_ids[:, :1]], 1)


@pytest.mark.parametrize("stream", [False, True])
def test_generation_stops_when_its_client_disconnects(embedded, monkeypatch, stream):
    generate = Generate()
    with running(build(embedded)) as url:
        with monkeypatch.context() as patch:
            patch.setattr(embedded[0], "generate", generate)
            connection = send(url, stream=stream)
            assert generate.begun.wait(30)
            connection.close()
            assert generate.stopped.wait(30)
        assert complete(url).choices


def test_a_waiting_request_whose_client_disconnects_frees_its_place_and_is_not_generated(
    embedded, monkeypatch
):
    generate, app = Generate(), build(embedded, queue=2)
    active = app.state.chat.active
    with running(app) as url, monkeypatch.context() as patch:
        patch.setattr(embedded[0], "generate", generate)
        first = send(url)
        wait_until(generate.begun.is_set)
        second = send(url)
        wait_until(lambda: len(active) == 2)
        assert refusal(url).status_code == 429
        second.close()
        wait_until(lambda: len(active) == 1)
        generate.release.set()
        assert first.getresponse().status == 200
        first.close()
        assert complete(url).choices
        assert generate.calls == 2  # of the first and the last


def test_images_of_disconnected_clients_are_freed_while_another_is_answered(embedded, monkeypatch):
    images = []

    from llava_pitome.integrations.serve.generation import Prompts

    async def record(self, messages):
        inputs = await prepare(self, messages)
        images.append(weakref.ref(inputs["pixel_values"]))
        return inputs

    prepare = Prompts.inputs
    monkeypatch.setattr(Prompts, "inputs", record)
    generate, app = Generate(), build(embedded, queue=4)
    chat = messages("x", data_url(scene(0)))
    with running(app) as url, monkeypatch.context() as patch:
        patch.setattr(embedded[0], "generate", generate)
        first = send(url, messages=chat)
        wait_until(generate.begun.is_set)
        for count, stream in enumerate((False, True, False), start=2):
            waiting = send(url, messages=chat, stream=stream)
            wait_until(lambda n=count: len(images) == n)
            waiting.close()
            wait_until(lambda: len(app.state.chat.active) == 1)
        wait_until(lambda: sum(image() is not None for image in images) <= 1)
        generate.release.set()
        assert first.getresponse().status == 200
        first.close()


@pytest.mark.parametrize("stream", [False, True])
def test_requests_in_progress_are_told_that_the_server_shuts_down(embedded, monkeypatch, capsys, stream):
    generate, app = Generate(), build(embedded)
    monkeypatch.setattr(embedded[0], "generate", generate)
    with running(app) as url:
        waiting = [send(url, stream=stream) for _ in range(2)]
        wait_until(lambda: len(app.state.chat.active) == 2 and generate.begun.is_set())
        app.state.shut_down()
        responses = [connection.getresponse() for connection in waiting]
        assert all(b"the server is shutting down" in response.read() for response in responses)
        assert {response.status for response in responses} == {200 if stream else 503}
        for connection in waiting:
            connection.close()
    assert "shutting down; 2 requests" in capsys.readouterr().err


def test_the_command_refuses_bad_options_before_a_model_is_loaded(capsys, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("llava_pitome.cli.model_options.load", fail)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen" in capsys.readouterr().err
    assert main(["serve", "--device", "cuda:9"]) == 2
    assert "cuda:9" in capsys.readouterr().err
    for words in (["--port", "70000"], ["--max-queue", "0"], ["--ratio", "1.5"]):
        with pytest.raises(SystemExit) as error:
            main(["serve", *words])
        assert error.value.code == 2
        assert words[1] in capsys.readouterr().err


def test_an_interrupt_ends_the_command_without_an_error(monkeypatch):
    results = []

    def check_health(line):
        assert "serves embedded, 196 image tokens of 196 an image" in line
        results.append(send(line.split()[0], b"", "GET", "/health").getresponse().status)

    assert run_until_signal(monkeypatch, ["serve", "--port", "0"], "serves", check_health, signal.SIGINT) == 0
    assert results == [200]


@pytest.mark.parametrize("host, prefix", [("127.0.0.1", "127.0.0.1:"), ("::1", "[::1]:")])
def test_an_address_has_the_form_of_a_url(host, prefix):
    with listen(host, 0) as sock:
        assert urlsplit(f"http://{address(sock)}").port == sock.getsockname()[1]
        assert address(sock).startswith(prefix)
