"""The server: answers as offline, many at once, streaming, and what it refuses with which words."""

import base64
import io
import json
import socket
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
import uvicorn
from openai import APIError, APIStatusError, OpenAI
from PIL import Image

from llava_pitome import MergeConfig, load
from llava_pitome.cli import main
from llava_pitome.embedded import render, scenes
from llava_pitome.embedded.questions import HINT, ask
from llava_pitome.serving import remote
from llava_pitome.serving.app import build
from llava_pitome.serving.limits import Limits
from llava_pitome.serving.request import Refused, opened

CONFIG = MergeConfig(ratio=0.9)


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


@pytest.fixture(scope="module")
def embedded():
    return load("embedded", CONFIG)


@pytest.fixture(scope="module")
def url(embedded):
    with serving(build("embedded", *embedded, Limits(prompt=1000, answer=64, pictures=3))) as address:
        yield address


def encoded(picture: Image.Image, kind: str = "PNG") -> str:
    data = io.BytesIO()
    picture.save(data, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(data.getvalue()).decode()


def scene(seed: int) -> Image.Image:
    return Image.fromarray(render.render(scenes.scene(seed)))


def asked(question: str, *pictures: str) -> list[dict]:
    content = [{"type": "image_url", "image_url": {"url": p}} for p in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


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


def test_a_stream_ends_with_a_reason_and_the_usage(url):
    pieces = list(client(url).chat.completions.create(
        model="embedded", messages=asked("What?", encoded(scene(0))), stream=True, max_tokens=1,
        stream_options={"include_usage": True},
    ))  # fmt: skip
    assert pieces[-1].choices[0].finish_reason == "length"
    assert pieces[-1].usage.completion_tokens == 1 and pieces[-1].usage.prompt_tokens > 65


def test_text_alone_and_earlier_turns_are_answered(url):
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"},
             *asked("Is there a circle?", encoded(scene(0)))]  # fmt: skip
    assert client(url).chat.completions.create(model="embedded", messages=turns).choices[0].message.content
    assert client(url).chat.completions.create(model="embedded", messages=turns[:1]).choices[0].message


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


def test_models_says_how_it_merges(url):
    (model,) = client(url).models.list().data
    assert model.id == "embedded" and model.token_merging["ratio"] == 0.9


def refused(url: str, **body) -> APIStatusError:
    body = {"model": "embedded", "messages": asked("What?", encoded(scene(0)))} | body
    with pytest.raises(APIStatusError) as found:
        client(url).post("/chat/completions", body=body, cast_to=object)
    return found.value


MESSAGE = {"role": "user", "content": "What?"}


@pytest.mark.parametrize(
    "body, reason",
    [
        ({"messages": []}, "at least one message"),
        ({"messages": "hello"}, "must be a list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\].*role"),
        ({"messages": [{"role": "user"}]}, "content must be"),
        ({"messages": [MESSAGE, {"role": "assistant", "content": "x"}]}, "last message"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "'video'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "under 'url'",
        ),
        ({"messages": [{"role": "user", "content": "a <image> b"}]}, "holds <image>"),
        ({"messages": [MESSAGE | {"tool_calls": []}]}, "tool_calls"),
        ({"messages": [{"role": "user", "content": "a b c d " * 300}]}, r"the prompt has \d+ tokens"),
        ({"messages": [{"role": "user", "content": "a" * 20000}]}, "20000 characters"),
        ({"messages": asked("x", "data:image/png;base64,####")}, "no base64"),
        ({"messages": asked("x", "data:image/png;base64,AAAA")}, "no picture"),
        ({"messages": asked("x", "data:image/png,AAAA")}, "of the form"),
        ({"messages": asked("x", "https://example.org/a.png")}, "fetches no pictures"),
        ({"messages": asked("x", "/etc/passwd")}, "fetches no pictures"),
        ({"messages": asked("x", *["data:,"] * 4)}, "4 pictures are too many"),
        ({"temperature": 3}, r"temperature=3.*\[0, 2\]"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"top_p": 0}, "top_p=0"),
        ({"max_tokens": 65}, r"max_tokens=65.*\[1, 64\]"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens=1.5"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"n": 2}, "n=2 is not supported"),
        ({"stop": ["a"]}, "stop="),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "a <ima"}, {"type": "text", "text": "ge> b"}],
                    }
                ]
            },
            "holds <image>",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "data:,"}, "text": 5}],
                    }
                ]
            },
            "'text'",
        ),
        ({"messages": asked("x", encoded(Image.new("RGB", (1, 200))))}, "too narrow: 1 x 200"),
        ({"temperature": int("1" + "0" * 400)}, "temperature="),
        ({"temperature": 1e-40}, "at least 0.01"),
        ({"stream": "yes"}, "stream='yes'"),
        ({"stream_options": {"x": 1}}, "include_usage"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"generation_config": "{}"}, "'generation_config' is not supported"),
        ({"model": "another"}, "pinned to 'embedded'"),
    ],
)
def test_a_request_that_cannot_be_done_gets_a_400_with_the_reason(url, body, reason):
    found = refused(url, **body)
    assert found.status_code == 400
    with pytest.raises(ValueError, match=reason):
        raise ValueError(found.body["message"])


HALF = rb"""{"messages": [{"role": "user", "content": "\ud800"}], "model": "\ud800", "stop": "\ud800"}"""


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff", b'"x"', HALF, HALF.replace(b"stop", b"user")])
def test_what_is_no_json_object_gets_a_400(url, raw):
    with pytest.raises(urllib.error.HTTPError) as found:
        urllib.request.urlopen(urllib.request.Request(
            f"{url}/chat/completions", raw, {"Content-Type": "application/json"}
        ))  # fmt: skip
    assert found.value.code == 400 and json.load(found.value)["error"]["message"]


def test_what_changes_nothing_may_be_said(url):
    plain = {"stop": [], "logit_bias": {}, "tools": [], "n": 1, "logprobs": False, "user": "me", "seed": None}
    body = {"model": "embedded", "messages": [MESSAGE], "max_tokens": 2} | plain
    assert client(url).post("/chat/completions", body=body, cast_to=object)["choices"]


@pytest.mark.parametrize("path, method, status", [
    ("/load_model", "POST", 404), ("/reset", "POST", 404), ("/v1/responses", "POST", 404), ("/", "GET", 404),
    ("/v1/chat/completions", "GET", 405), ("/v1/models", "POST", 405),
])  # fmt: skip
def test_there_are_no_other_paths(url, path, method, status):
    request = urllib.request.Request(url.removesuffix("/v1") + path, method=method)
    with pytest.raises(urllib.error.HTTPError) as found:
        urllib.request.urlopen(request)
    assert found.value.code == status and json.load(found.value)["error"]["message"]


def test_requests_and_pictures_over_the_limits_are_refused(embedded):
    limits = Limits(body=80_000, picture=30_000, pixels=112 * 112)
    with serving(build("embedded", *embedded, limits)) as address:
        large = refused(address, messages=asked("x", encoded(scene(0).resize((113, 112)))))
        assert large.status_code == 400 and "pixels" in large.body["message"]
        noise = Image.effect_noise((112, 112), 80).convert("RGB")
        heavy = refused(address, messages=asked("x", encoded(noise, "BMP")))
        assert heavy.status_code == 413 and "30000" in heavy.body["message"]
        long = refused(address, messages=asked("x", *[encoded(noise, "BMP")] * 2))
        assert long.status_code == 413 and "80000 bytes" in long.body["message"]


def test_more_requests_than_the_queue_holds_are_turned_away_and_the_others_answered(embedded, monkeypatch):
    model, _ = embedded
    go, generate = threading.Event(), model.generate

    def waits(*args, **kwargs):
        go.wait(30)
        return generate(*args, **kwargs)

    monkeypatch.setattr(model, "generate", waits)

    def answer(address: str) -> str:
        try:
            said = client(address).chat.completions.create(
                model="embedded", messages=asked("What?", encoded(scene(0))), max_tokens=4
            )
        except APIStatusError as error:
            go.set()  # one was turned away while the others waited
            return str(error.status_code)
        return said.choices[0].message.content

    with serving(build("embedded", *embedded, Limits(queue=3))) as address:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(answer, [address] * 4))
        assert answers.count("429") == 1 and len(set(answers)) == 2
        assert answer(address) in answers  # the places are free again


def test_a_failure_in_a_stream_is_told_in_words(embedded, url, monkeypatch):
    def fails(**_):
        raise RuntimeError('device "cuda:0"\nfailed')

    with monkeypatch.context() as patched:
        patched.setattr(embedded[0], "generate", fails)
        pieces = client(url).chat.completions.create(model="embedded", messages=[MESSAGE], stream=True)
        with pytest.raises(APIError, match="generating failed"):
            list(pieces)


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


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1",
     "224.0.0.1", "::1", "::", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
     "2002:7f00:1::", "64:ff9b::a00:1", "fec0::1", "::7f00:1"],
)  # fmt: skip
def test_private_addresses_are_not_public(address):
    assert not remote.is_public(address)


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:2800:21f::1"])
def test_public_addresses_are(address):
    assert remote.is_public(address)


class Pictures(BaseHTTPRequestHandler):
    """/a.png is a picture, /far points there, /round to itself, /long is long, /slow never comes."""

    def do_GET(self):
        if self.path in ("/far", "/round", "/out"):
            self.send_response(302)
            to = {"/far": "/a.png?x=1", "/round": "/round", "/out": "file:///etc/passwd"}[self.path]
            self.send_header("Location", to)
            self.end_headers()
            return
        self.send_response(200 if self.path.split("?")[0] in ("/a.png", "/long", "/slow") else 404)
        self.end_headers()
        if self.path == "/slow":
            threading.Event().wait(3.0)
        body = base64.b64decode(encoded(scene(0)).split(",")[1])
        try:
            self.wfile.write(body * (100 if self.path == "/long" else 1))
        except OSError:
            return  # the client has had enough

    def log_message(self, *_):
        """Says nothing."""


@pytest.fixture(scope="module")
def web():
    server = HTTPServer(("127.0.0.1", 0), Pictures)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def anywhere(url: str, most: int, seconds: float) -> bytes:
    return remote.fetch(url, most, seconds, allowed=lambda address: True)


@pytest.mark.parametrize("path", ["/a.png", "/far"])
def test_pictures_are_fetched_where_that_is_on(web, path):
    (message,) = opened(asked("x", web + path), Limits(urls=True), anywhere)
    assert message["content"][0]["image"].tobytes() == scene(0).tobytes()


@pytest.mark.parametrize(
    "path, reason",
    [("/none", "answered 404"), ("/round", "3 redirects"), ("/long", "more than 100000"), ("/out", "no http"),
     ("/slow", "cannot be fetched")],
)  # fmt: skip
def test_what_cannot_be_fetched_is_refused(web, path, reason):
    with pytest.raises(Refused, match=reason):
        opened(asked("x", web + path), Limits(urls=True, picture=100_000, seconds=1), anywhere)


@pytest.mark.parametrize(
    "scheme", ["ftp://example.org/a", "file:///etc/passwd", "http://", "a.png", "http://u:p@h/"]
)
def test_other_addresses_are_no_pictures(scheme):
    with pytest.raises(Refused):
        opened(asked("x", scheme), Limits(urls=True))


def test_private_addresses_are_never_fetched(web):
    with pytest.raises(Refused, match="not public"):
        opened(asked("x", f"{web}/a.png"), Limits(urls=True))
    with pytest.raises(Refused, match="not public"):
        opened(asked("x", web.replace("127.0.0.1", "localhost") + "/a.png"), Limits(urls=True))


def test_the_command_refuses_before_a_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen" in capsys.readouterr().err
    assert main(["serve", "--device", "cuda:9"]) == 2
    for words in (["--port", "70000"], ["--max-queue", "0"], ["--ratio", "1.5"]):
        with pytest.raises(SystemExit) as found:
            main(["serve", *words])
        assert found.value.code == 2


@pytest.mark.parametrize("field", ["body", "queue", "seconds"])
def test_limits_below_one_are_refused(field):
    with pytest.raises(ValueError, match=f"{field}=0"):
        Limits(**{field: 0})
