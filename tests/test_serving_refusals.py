"""Requests that the server refuses: the status, the reason, and that it goes on."""

import re

import pytest
from PIL import Image
from serving import CHAT, MESSAGE, build, complete, data_url, messages, receive, refusal, running, scene, send

from llava_pitome import MergeConfig, load
from llava_pitome.integrations.serve.limits import Limits


@pytest.fixture(scope="module")
def embedded():
    return load("embedded", MergeConfig(ratio=0.9))


@pytest.fixture(scope="module")
def url(embedded):
    with running(build(embedded, prompt_tokens=1000, new_tokens=64, images=3)) as url:
        yield url


def user(content):
    return {"messages": [{"role": "user", "content": content}]}


def text(*texts):
    return user([{"type": "text", "text": text} for text in texts])


INVALID = [
    ({"messages": []}, r"messages=\[\] is not allowed: it should have at least 1 item"),
    ({"messages": "hello"}, "messages='hello' is not allowed: it should be a valid list"),
    ({"messages": None}, "messages is required"),
    ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\].role='robot'.* 'system', 'user'"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\].content is required"),
    (user([]), r"messages\[0\].content=\[\]"),
    ({"messages": [MESSAGE, {"role": "assistant", "content": "x"}]}, "last message has role='assistant'"),
    (user([{"type": "video"}]), r"messages\[0\].content\[0\]=.*'video'.*type 'text' or 'image_url'"),
    (user([{"type": "video" * 1000}]), r"\[0\]={'type': 'video.*\.\.\..*type 'text' or 'image_url'"),
    (user([{}]), r"content\[0\]={} is not allowed: it should be of type 'text' or 'image_url'"),
    (user([{"type": "image_url", "image_url": "x"}]), r"messages\[0\].content\[0\].image_url='x'"),
    (user([{"type": "image_url", "image_url": {"url": "data:,"}, "text": 5}]), "'text' is not supported"),
    (user([{"type": "image_url", "image_url": {"url": "data:,", "detail": 5}}]), "detail=5.*'high'"),
    ({"messages": [{"role": "system", "content": messages("x", "data:,")[0]["content"]}, MESSAGE]},
     r"messages\[0\]: role='system' is not allowed with images"),
    ({"messages": [MESSAGE | {"tool_calls": []}]}, r"messages\[0\]: 'tool_calls' is not supported"),
    ({"messages": [MESSAGE | {"name": "me"}]}, "'name' is not supported; allowed: role, content"),
    (text("a <image> b"), "text with <image> is not allowed"),
    (text("a <ima", "ge> b"), "text with <image> is not allowed"),
    (text("a b c d " * 300), r"the prompt has \d+ tokens"),
    (text("a" * 20000), "20000 characters of text; at most 16000"),
    (text(*[""] * 1001), r"messages=\[.* it has 1001 parts; at most 1000"),
    ({"messages": messages("a b c " * 300, *["data:,"] * 3)}, r"the prompt has \d+ tokens"),
    ({"messages": messages("x", "data:image/png;base64,####")}, "not valid base64"),
    ({"messages": messages("x", "data:image/png;base64,AAAA")}, r"b'\\x00\\x00\\x00'"),
    ({"messages": messages("x", "data:image/png,AAAA")}, "must have the form"),
    ({"messages": messages("x", "https://example.org/a.png")}, "fetches no images"),
    ({"messages": messages("x", "/etc/passwd")}, "fetches no images"),
    ({"messages": messages("x", *["data:,"] * 4)}, "4 images; at most 3"),
    ({"messages": messages("x", data_url(Image.new("RGB", (1, 200))))}, "too narrow: 1 x 200"),
    ({"temperature": 3}, "temperature=3 is not allowed: it should be less than or equal to 2"),
    ({"temperature": "hot"}, "temperature='hot'"),
    ({"temperature": "x" * 10**6}, r"temperature='x+\.\.\.x+'"),
    ({"temperature": int("1" + "0" * 400)}, "temperature="),
    ({"temperature": 1e-40}, "it should be 0, or at least 0.01"),
    ({"temperature": True}, "temperature=True"),
    ({"top_p": 0}, "top_p=0 is not allowed: it should be greater than 0"),
    ({"max_tokens": 65}, r"max_tokens=65 is not allowed: it should be in \[1, 64\]"),
    ({"max_tokens": 0}, "max_tokens=0"),
    ({"max_completion_tokens": 1.5}, "max_completion_tokens=1.5"),
    ({"seed": 1.5}, "seed=1.5"),
    ({"seed": 2**63}, "seed=9223372036854775808"),
    ({"stream": "yes"}, "stream='yes'"),
    ({"stream_options": {"x": 1}, "stream": True}, "stream_options: 'x' is not supported; allowed: inc"),
    ({"stream_options": {"include_obfuscation": True}, "stream": True}, "include_obfuscation.*is False"),
    ({"stream_options": {"include_usage": "yes"}, "stream": True}, "include_usage='yes'"),
    ({"stream_options": {"include_usage": True}}, "stream=true"),
    ({"n": 2}, "n=2 is not supported; allowed is 1"),
    ({"stop": ["a"]}, r"stop=\['a'\] is not supported"),
    ({"frequency_penalty": 0.5}, "frequency_penalty=0.5 is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"generation_config": "{}"}, "'generation_config' is not supported"),
    ({"model": "another"}, "model='another' is not served; allowed is 'embedded'"),
]  # fmt: skip


@pytest.mark.parametrize("body, reason", INVALID)
def test_an_invalid_request_gets_a_400_with_the_reason(url, body, reason):
    error = refusal(url, **body)
    assert error.status_code == 400 and error.body["type"] == "invalid_request_error"
    assert len(error.body["message"]) < 500
    assert re.search(reason, error.body["message"])


SURROGATE = rb"""{"messages": [{"role": "user", "content": "\ud800"}], "model": "\ud800", "stop": "\ud800"}"""
NOT_JSON = [
    b"", b"{", b"[]", b"\xff", b'"x"', b"[" * 30_000, b'{"n": ' + b"1" * 5000 + b"}",
    SURROGATE, SURROGATE.replace(b"stop", b"user"),
    rb"""{"messages": [{"role": "user", "content": "\ud800"}]}""",
    rb"""{"messages": [{"role": "user", "content": "x"}], "model": "\ud800"}""", rb"""{"\ud800": 1}""",
    rb"""{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}""",
]  # fmt: skip


@pytest.mark.parametrize("raw", NOT_JSON, ids=range(len(NOT_JSON)))
def test_a_body_that_is_not_a_json_object_of_text_gets_a_400(url, raw):
    status, message = receive(send(url, raw))
    assert status == 400 and message


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded"])
def test_content_types_that_other_sites_can_send_unasked_are_refused(url, kind):
    status, message = receive(send(url, headers={"Content-Type": kind}))
    assert status == 415 and kind in message and "application/json" in message


@pytest.mark.parametrize("element", [b"[],", b"1,", b'{"a":1},'])
def test_json_that_takes_long_to_parse_is_not_parsed(url, element):
    status, message = receive(send(url, b'{"n": [' + element * 100_000 + b"0]}"))
    assert status == 413 and "brackets and commas" in message


@pytest.mark.parametrize("path, method, status, reason", [
    ("/load_model", "POST", 404, "there is no /load_model; allowed are"), ("/reset", "POST", 404, "/reset"),
    ("/v1/responses", "POST", 404, CHAT), ("/", "GET", 404, CHAT), ("/v1/models/", "GET", 404, CHAT),
    (CHAT, "GET", 405, f"GET {CHAT} is not allowed; allowed is POST"), ("/v1/models", "POST", 405, "is GET"),
])  # fmt: skip
def test_there_are_no_other_paths(url, path, method, status, reason):
    found, message = receive(send(url, b"", method, path))
    assert found == status and reason in message


def test_large_requests_and_images_are_refused(embedded):
    limits = {"request_bytes": 80_000, "image_bytes": 30_000, "pixels": 112 * 112}
    noise = data_url(Image.effect_noise((112, 112), 80).convert("RGB"), "BMP")
    with running(build(embedded, **limits)) as url:
        for images in ([scene(0).resize((113, 112))], [scene(0).resize((80, 80))] * 2):
            pixels = refusal(url, messages=messages("x", *map(data_url, images)))
            assert pixels.status_code == 400 and "pixels" in pixels.body["message"]
        assert "leave that of 12,544" in pixels.body["message"]
        for images, limit in ([noise], "30000"), ([noise] * 2, "80000 bytes"):
            long = refusal(url, messages=messages("x", *images))
            assert long.status_code == 413 and limit in long.body["message"]
        connection = send(url, b"", headers={"Content-Length": "80001"})  # refused before it arrives
        assert receive(connection) == (413, "the request is longer than 80000 bytes, which is the limit")


def test_a_request_that_does_not_arrive_in_time_frees_its_place(embedded):
    app = build(embedded, queue=1, seconds=1)
    with running(app) as url:
        status, message = receive(send(url, b"{", headers={"Content-Length": "500"}))
        assert status == 408 and "1 s" in message
        assert app.state.chat.reading == len(app.state.chat.active) == 0
        assert complete(url).choices


@pytest.mark.parametrize("field", ["request_bytes", "queue", "seconds"])
def test_limits_below_one_are_refused(field):
    with pytest.raises(ValueError, match=f"{field}=0"):
        Limits(**{field: 0})


def test_a_chat_template_that_refuses_the_messages_gives_a_400(embedded, url, monkeypatch):
    monkeypatch.setattr(embedded[1], "chat_template", "{{ raise_exception('roles must alternate') }}")
    error = refusal(url)
    assert error.status_code == 400 and "roles must alternate" in error.body["message"]


def test_a_model_without_a_chat_template_is_refused(embedded, monkeypatch):
    monkeypatch.setattr(embedded[1], "chat_template", None)
    with pytest.raises(ValueError, match="no chat template"):
        build(embedded)
