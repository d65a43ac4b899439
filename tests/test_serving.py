"""The server: answers as offline, concurrent requests, streams, seeds, failures."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from serving import MESSAGE, build, client, complete, data_url, messages, refusal, running, scene, send

from llava_pitome import MergeConfig, load
from llava_pitome.embedded import scenes
from llava_pitome.embedded.questions import HINT, ask


@pytest.fixture(scope="module")
def embedded():
    return load("embedded", MergeConfig(ratio=0.9))


@pytest.fixture(scope="module")
def url(embedded):
    with running(build(embedded, prompt_tokens=1000, new_tokens=64, images=3)) as url:
        yield url


def offline(embedded, seed: int, question: str) -> str:
    model, processor = embedded
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(text=prompt, images=scene(seed), return_tensors="pt").to(model.device, model.dtype)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_32_concurrent_requests_are_answered_as_offline(embedded, url):
    questions = [ask(scenes.scene(seed), 1)[0].text + HINT for seed in range(32)]

    def answer(seed: int) -> str:
        chat = messages(questions[seed], data_url(scene(seed)))
        if seed % 2:
            chunks = complete(url, chat, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        return complete(url, chat).choices[0].message.content

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(answer, range(32)))
    expected = [offline(embedded, seed, questions[seed]) for seed in range(32)]
    assert [a.strip() for a in answers] == [e.strip() for e in expected]
    assert len(set(answers)) > 3


def test_usage_counts_merged_tokens(embedded, url):
    _, processor = embedded
    usage = complete(
        url, messages("What is this?", *[data_url(scene(s)) for s in (1, 2)]), max_tokens=2
    ).usage
    text = processor.tokenizer(processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}] * 2 + [{"type": "text", "text": "What is this?"}]}],
        add_generation_prompt=True,
    ))["input_ids"]  # fmt: skip
    assert usage.prompt_tokens == len(text) - 2 + 2 * 65
    assert usage.completion_tokens <= 2


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": False}}])
def test_a_stream_ends_with_a_reason_and_without_usage(url, options):
    chunks = list(complete(url, stream=True, max_tokens=1, **options))
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


def test_requested_usage_is_the_last_chunk_of_a_stream(url):
    chat = messages("What?", data_url(scene(0)))
    *chunks, last = complete(url, chat, stream=True, max_tokens=1, stream_options={"include_usage": True})
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == [] and last.usage.completion_tokens == 1 and last.usage.prompt_tokens > 65
    assert last.id == chunks[0].id


def test_a_stream_ends_with_done(url):
    response = send(url, stream=True, max_tokens=2).getresponse()
    assert response.read().endswith(b"\n\ndata: [DONE]\n\n")


def test_text_and_earlier_turns_are_answered(url):
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"},
             *messages("Is there a circle?", data_url(scene(0)))]  # fmt: skip
    assert complete(url, turns).choices[0].message.content
    answer = complete(url, turns[:1]).choices[0]
    assert isinstance(answer.message.content, str) and answer.finish_reason in ("stop", "length")


def test_an_answer_may_be_sent_back_as_a_turn(url):
    turns = messages("Is there a circle?", data_url(scene(0)))
    turns[0]["content"][0]["image_url"]["detail"] = "low"
    first = complete(url, turns, max_tokens=4)
    turns += [first.choices[0].message.model_dump(), MESSAGE]
    assert complete(url, turns, max_tokens=4).choices


def sample(url: str, **settings) -> str:
    chat = messages("How many?", data_url(scene(7)))
    return complete(url, chat, max_tokens=8, **settings).choices[0].message.content


def test_a_temperature_or_top_p_samples_and_decoding_is_greedy_otherwise(url):
    def answers(**settings):
        return {sample(url, **settings) for _ in range(5)}

    assert len(answers()) == len(answers(temperature=0)) == len(answers(temperature=0, top_p=0.9)) == 1
    assert len(answers(temperature=2)) > 1
    assert len(answers(temperature=2, seed=3)) == 1


def test_a_seed_holds_among_concurrent_requests(url):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: sample(url, temperature=2, seed=seed), [3, 4] * 4))
    assert len(set(answers[::2])) == len(set(answers[1::2])) == 1


def test_a_seed_leaves_other_requests_random(url):
    answers = [(sample(url, temperature=2, seed=3), sample(url, temperature=2)) for _ in range(6)]
    assert len({seeded for seeded, _ in answers}) == 1 < len({random for _, random in answers})


def test_models_lists_how_it_merges(url):
    (model,) = client(url).models.list().data
    assert model.id == "embedded" and model.token_merging["ratio"] == 0.9


def test_fields_without_effect_are_accepted(url):
    fields = {
        "stop": [],
        "logit_bias": {},
        "tools": [],
        "n": 1,
        "logprobs": False,
        "user": "me",
        "seed": None,
    }
    body = {"model": "embedded", "messages": [MESSAGE], "max_tokens": 2} | fields
    assert client(url).post("/chat/completions", body=body, cast_to=object)["choices"]


def test_a_full_queue_refuses_and_the_others_are_answered(embedded, monkeypatch):
    refused, generate = threading.Event(), embedded[0].generate

    def wait(**inputs):
        refused.wait(30)
        return generate(**inputs)

    monkeypatch.setattr(embedded[0], "generate", wait)

    def answer(url: str) -> str:
        from openai import APIStatusError

        try:
            return complete(url, max_tokens=4).choices[0].message.content
        except APIStatusError as error:
            refused.set()
            assert error.response.headers["Retry-After"] == "1"
            return str(error.status_code)

    with running(build(embedded, queue=3)) as url:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(answer, [url] * 4))
        assert answers.count("429") == 1 and len(set(answers)) == 2
        assert answer(url) in answers


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_is_reported_and_the_server_goes_on(embedded, url, monkeypatch, caplog, stream):
    from openai import APIError

    def fail(**_):
        raise RuntimeError('device "cuda:0"\nfailed')

    with monkeypatch.context() as patch:
        patch.setattr(embedded[0], "generate", fail)
        if stream:
            with pytest.raises(APIError, match="generation failed"):
                list(complete(url, stream=True))
            assert 'device "cuda:0"' in caplog.text
        else:
            assert refusal(url).status_code == 500
    assert complete(url).choices
