"""The server: answers as offline, many at once, streaming, seeds, failures."""

import json
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from openai import APIError, APIStatusError
from PIL import Image
from served import MESSAGE, asked, client, encoded, refused, scene, serving

from llava_pitome import MergeConfig, load
from llava_pitome.embedded import scenes
from llava_pitome.embedded.questions import HINT, ask
from llava_pitome.integrations.serve.app import build
from llava_pitome.integrations.serve.limits import Limits

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
