"""The server: answers as offline, many at once, streaming, seeds, clients that leave, failures."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import weakref
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest
import torch
import uvicorn
from openai import APIError, APIStatusError
from PIL import Image
from served import MESSAGE, asked, client, encoded, refused, scene, serving

from llava_pitome import MergeConfig, load
from llava_pitome.cli import main
from llava_pitome.embedded import scenes
from llava_pitome.embedded.questions import HINT, ask
from llava_pitome.serving.app import OneAnswer, build
from llava_pitome.serving.ending import Server
from llava_pitome.serving.limits import Limits
from llava_pitome.serving.listening import address, listening

CONFIG = MergeConfig(ratio=0.9)


@pytest.fixture(scope="module")
def embedded():
    return load("embedded", CONFIG)


@pytest.fixture(scope="module")
def url(embedded):
    with serving(build("embedded", *embedded, Limits(prompt=1000, answer=64, pictures=3))) as at:
        yield at


def offline(embedded, question: str, picture: Image.Image) -> str:
    model, processor = embedded
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(text=prompt, images=picture, return_tensors="pt").to(model.device, model.dtype)
    with torch.no_grad():
        said = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    return processor.tokenizer.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_32_requests_at_once_are_all_answered_as_offline(embedded, url):
    seeds = range(32)
    questions = {seed: ask(scenes.scene(seed), 1)[0].text + HINT for seed in seeds}

    def answer(seed: int) -> str:
        messages = asked(questions[seed], encoded(scene(seed)))
        if seed % 2:
            pieces = client(url).chat.completions.create(model="embedded", messages=messages, stream=True)
            return "".join(piece.choices[0].delta.content or "" for piece in pieces)
        said = client(url).chat.completions.create(model="embedded", messages=messages)
        return said.choices[0].message.content

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(answer, seeds))
    expected = [offline(embedded, questions[seed], scene(seed)) for seed in seeds]
    assert [a.strip() for a in answers] == [e.strip() for e in expected]
    assert len(set(answers)) > 3


def test_usage_counts_merged_tokens(embedded, url):
    _, processor = embedded
    said = client(url).chat.completions.create(
        model="embedded", messages=asked("What is this?", *[encoded(scene(s)) for s in (1, 2)]), max_tokens=2
    )
    text = processor.tokenizer(processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}] * 2 + [{"type": "text", "text": "What is this?"}]}],
        add_generation_prompt=True,
    ))["input_ids"]  # fmt: skip
    assert said.usage.prompt_tokens == len(text) - 2 + 2 * 65
    assert said.usage.completion_tokens <= 2


def streamed(url: str, **body) -> list:
    return list(client(url).chat.completions.create(
        model="embedded", messages=asked("What?", encoded(scene(0))), stream=True, max_tokens=1, **body
    ))  # fmt: skip


def test_a_stream_ends_with_a_reason_and_no_usage_that_nobody_asked_for(url):
    for pieces in (streamed(url), streamed(url, stream_options={"include_usage": False})):
        assert pieces[-1].choices[0].finish_reason == "length"
        assert all(piece.usage is None for piece in pieces)


def test_the_usage_of_a_stream_stands_alone_at_its_end(url):
    *pieces, last = streamed(url, stream_options={"include_usage": True})
    assert pieces[-1].choices[0].finish_reason == "length"
    assert all(piece.usage is None for piece in pieces)
    assert last.choices == [] and last.usage.completion_tokens == 1 and last.usage.prompt_tokens > 65
    assert last.id == pieces[0].id


def test_text_alone_and_earlier_turns_are_answered(url):
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"},
             *asked("Is there a circle?", encoded(scene(0)))]  # fmt: skip
    assert client(url).chat.completions.create(model="embedded", messages=turns).choices[0].message.content
    said = client(url).chat.completions.create(model="embedded", messages=turns[:1]).choices[0]
    assert isinstance(said.message.content, str) and said.finish_reason in ("stop", "length")


def test_what_a_client_gives_back_and_says_without_effect_is_taken(url):
    messages = asked("Is there a circle?", encoded(scene(0)))
    messages[0]["content"][0]["image_url"]["detail"] = "low"
    first = client(url).chat.completions.create(model="embedded", messages=messages, max_tokens=4)
    messages += [first.choices[0].message.model_dump(), MESSAGE]
    assert client(url).chat.completions.create(model="embedded", messages=messages, max_tokens=4).choices


def test_a_temperature_draws_and_none_does_not(url):
    def answers(**settings):
        return {
            client(url).chat.completions.create(
                model="embedded", messages=asked("How many?", encoded(scene(7))), max_tokens=8, **settings
            ).choices[0].message.content
            for _ in range(5)
        }  # fmt: skip

    assert len(answers()) == len(answers(temperature=0)) == 1
    assert len(answers(temperature=2)) > 1
    assert len(answers(temperature=2, seed=3)) == 1


def test_a_seed_is_a_requests_own_also_among_others(url):
    def answer(seed: int) -> str:
        said = client(url).chat.completions.create(
            model="embedded", messages=asked("How many?", encoded(scene(7))), max_tokens=8, temperature=2,
            seed=seed,
        )  # fmt: skip
        return said.choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(answer, [3, 4] * 4))
    assert len(set(answers[::2])) == len(set(answers[1::2])) == 1


def test_a_seed_changes_nothing_for_who_gives_none(url):
    def answer(**settings) -> str:
        said = client(url).chat.completions.create(
            model="embedded", messages=asked("How many?", encoded(scene(7))), max_tokens=8, temperature=2,
            **settings,
        )  # fmt: skip
        return said.choices[0].message.content

    answers = [(answer(seed=3), answer()) for _ in range(6)]
    assert len({seeded for seeded, _ in answers}) == 1 < len({plain for _, plain in answers})


def test_models_says_how_it_merges(url):
    (model,) = client(url).models.list().data
    assert model.id == "embedded" and model.token_merging["ratio"] == 0.9


def test_what_changes_nothing_may_be_said(url):
    plain = {"stop": [], "logit_bias": {}, "tools": [], "n": 1, "logprobs": False, "user": "me", "seed": None}
    body = {"model": "embedded", "messages": [MESSAGE], "max_tokens": 2} | plain
    assert client(url).post("/chat/completions", body=body, cast_to=object)["choices"]


def test_more_requests_than_the_queue_holds_are_turned_away_and_the_others_answered(embedded, monkeypatch):
    model, _ = embedded
    go, generate = threading.Event(), model.generate

    def waits(*args, **kwargs):
        go.wait(30)
        return generate(*args, **kwargs)

    monkeypatch.setattr(model, "generate", waits)

    def answer(at: str) -> str:
        try:
            said = client(at).chat.completions.create(
                model="embedded", messages=asked("What?", encoded(scene(0))), max_tokens=4
            )
        except APIStatusError as error:
            go.set()  # one was turned away while the others waited
            return str(error.status_code)
        return said.choices[0].message.content

    with serving(build("embedded", *embedded, Limits(queue=3))) as at:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(answer, [at] * 4))
        assert answers.count("429") == 1 and len(set(answers)) == 2
        assert answer(at) in answers  # the places are free again


def test_a_failure_in_a_stream_is_told_in_words_and_logged(embedded, url, monkeypatch, caplog):
    def fails(**_):
        raise RuntimeError('device "cuda:0"\nfailed')

    with monkeypatch.context() as patched:
        patched.setattr(embedded[0], "generate", fails)
        pieces = client(url).chat.completions.create(model="embedded", messages=[MESSAGE], stream=True)
        with pytest.raises(APIError, match="generating failed"):
            list(pieces)
    assert 'device "cuda:0"' in caplog.text


def test_a_stream_ends_as_clients_expect(url):
    body = json.dumps({"messages": [MESSAGE], "stream": True, "max_tokens": 2}).encode()
    request = urllib.request.Request(f"{url}/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        assert response.read().endswith(b"\n\ndata: [DONE]\n\n")


def test_a_failure_while_generating_is_a_500_and_the_server_goes_on(embedded, url, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(embedded[0], "generate", fails)
        assert refused(url).status_code == 500
    assert client(url).chat.completions.create(model="embedded", messages=[MESSAGE]).choices


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

    monkeypatch.setattr("llava_pitome.commands.load", loads)
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

    monkeypatch.setattr("llava_pitome.serving.app.OneAnswer", Recording)
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
        assert "serves embedded" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in complaints


@pytest.mark.parametrize("host, shown", [("127.0.0.1", "127.0.0.1:"), ("::1", "[::1]:")])
def test_the_address_stands_as_in_a_url(host, shown):
    with listening(host, 0) as sock:
        assert urlsplit(f"http://{address(sock)}").port == sock.getsockname()[1]
        assert address(sock).startswith(shown)
