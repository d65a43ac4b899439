"""What the server refuses, with which words, and that it goes on."""

import json
import urllib.error
import urllib.request
from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest
from PIL import Image
from served import MESSAGE, asked, client, encoded, refused, scene, serving

from llava_pitome import MergeConfig, load
from llava_pitome.integrations.serve.app import build
from llava_pitome.integrations.serve.limits import Limits


@pytest.fixture(scope="module")
def embedded():
    return load("embedded", MergeConfig(ratio=0.9))


@pytest.fixture(scope="module")
def url(embedded):
    with serving(build("embedded", *embedded, Limits(prompt=1000, answer=64, pictures=3))) as address:
        yield address


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
        ({"messages": [{"role": "user", "content": "a <image> b"}]}, "messages hold <image>"),
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
            "messages hold <image>",
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
        ({"stream_options": {"x": 1}, "stream": True}, "include_usage"),
        ({"stream_options": {"include_obfuscation": True}, "stream": True}, "include_obfuscation"),
        ({"stream_options": {"include_usage": "yes"}, "stream": True}, "include_usage='yes'"),
        ({"stream_options": {"include_usage": True}}, "stream=true"),
        ({"frequency_penalty": 0.5}, "frequency_penalty=0.5 is not supported"),
        ({"messages": [MESSAGE | {"name": "me"}]}, "'name', which is not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 1001}]}, "1001 texts"),
        ({"messages": asked("a b c " * 300, *["data:,"] * 3)}, r"the prompt has \d+ tokens"),
        ({"temperature": "x" * 10**6}, r"temperature='x+\.\.\."),
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


NAMED = rb"""{"messages": [{"role": "user", "content": "x"}], "model": "\ud800"}"""
LONG = [b"[" * 30_000, b'{"n": ' + b"1" * 5000 + b"}"]


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"\xff", b'"x"', HALF, HALF.replace(b"stop", b"user"), NAMED, *LONG],
    ids=range(10),
)
def test_what_is_no_json_object_gets_a_400(url, raw):
    with pytest.raises(urllib.error.HTTPError) as found:
        urllib.request.urlopen(urllib.request.Request(
            f"{url}/chat/completions", raw, {"Content-Type": "application/json"}
        ))  # fmt: skip
    assert found.value.code == 400 and json.load(found.value)["error"]["message"]


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
        for pictures in ([scene(0).resize((113, 112))], [scene(0).resize((80, 80))] * 2):
            large = refused(address, messages=asked("x", *map(encoded, pictures)))
            assert large.status_code == 400 and "pixels" in large.body["message"]
        assert "leave of 12,544" in large.body["message"]
        noise = Image.effect_noise((112, 112), 80).convert("RGB")
        heavy = refused(address, messages=asked("x", encoded(noise, "BMP")))
        assert heavy.status_code == 413 and "30000" in heavy.body["message"]
        long = refused(address, messages=asked("x", *[encoded(noise, "BMP")] * 2))
        assert long.status_code == 413 and "80000 bytes" in long.body["message"]


def test_a_length_that_is_too_much_is_refused_before_it_arrives(embedded):
    with serving(build("embedded", *embedded, Limits(body=1000))) as at:
        connection = HTTPConnection(urlsplit(at).netloc)
        connection.putrequest("POST", "/v1/chat/completions")
        connection.putheader("Content-Length", "1001")
        connection.endheaders()
        answer = connection.getresponse()
        assert answer.status == 413 and "1000 bytes" in json.load(answer)["error"]["message"]
        connection.close()


def test_a_request_that_does_not_arrive_holds_no_place_and_is_given_up(embedded):
    guard = build("embedded", *embedded, Limits(queue=1, seconds=1))
    with serving(guard) as at:
        connection = HTTPConnection(urlsplit(at).netloc)
        connection.request("POST", "/v1/chat/completions", b"{", {"Content-Length": "500"})
        answer = connection.getresponse()
        assert answer.status == 408 and "1 s" in json.load(answer)["error"]["message"]
        connection.close()
        assert guard.reading == guard.answering == 0
        assert client(at).chat.completions.create(model="embedded", messages=[MESSAGE]).choices


@pytest.mark.parametrize("field", ["body", "queue", "seconds"])
def test_limits_below_one_are_refused(field):
    with pytest.raises(ValueError, match=f"{field}=0"):
        Limits(**{field: 0})


def posted(url: str, raw: bytes, **headers: str) -> tuple[int, str]:
    """The status and the reason of a request as it is."""
    connection = HTTPConnection(urlsplit(url).netloc)
    connection.request("POST", "/v1/chat/completions", raw, headers)
    answer = connection.getresponse()
    reason = json.load(answer)["error"]["message"]
    connection.close()
    return answer.status, reason


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded"])
def test_what_a_page_elsewhere_could_send_unasked_is_no_json(url, kind):
    status, reason = posted(url, json.dumps({"messages": [MESSAGE]}).encode(), **{"Content-Type": kind})
    assert status == 415 and kind in reason and "application/json" in reason


@pytest.mark.parametrize("piece", [b"[],", b"1,", b'{"a":1},'])
def test_what_would_take_long_to_read_is_not_read(url, piece):
    raw = b'{"n": [' + piece * 100_000 + b"0]}"
    status, reason = posted(url, raw, **{"Content-Type": "application/json"})
    assert status == 413 and "brackets and commas" in reason


def test_what_a_template_refuses_is_the_clients_fault(embedded, url, monkeypatch):
    monkeypatch.setattr(embedded[1], "chat_template", "{{ raise_exception('roles must alternate') }}")
    found = refused(url)
    assert found.status_code == 400 and "roles must alternate" in found.body["message"]


def test_a_model_without_a_template_is_not_served(embedded, monkeypatch):
    monkeypatch.setattr(embedded[1], "chat_template", None)
    with pytest.raises(ValueError, match="no chat template"):
        build("embedded", *embedded, Limits())
