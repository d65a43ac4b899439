"""The server with models that cut images into tiles."""

import pytest
from serving import build, complete, data_url, messages, refusal, running
from test_tiled_chat import make
from tiled import noise

from llava_pitome import MergeConfig
from llava_pitome.models import hf_llava
from llava_pitome.models.image_counts import counts_of

KINDS = ("next-mistral", "next-video", "onevision")
CONFIG = MergeConfig(ratio=0.8)
LIMIT = 165  # tokens of a prompt
SIZES = [(60, 100), (130, 40), (48, 10)]


@pytest.fixture(scope="module", params=KINDS)
def server(request):
    """A model, its processor and the URL of their server."""
    model, processor = make(request.param, CONFIG)
    with running(build((model, processor), prompt_tokens=LIMIT, new_tokens=8)) as url:
        yield model, processor, url


def offline(model, processor, images):
    """The answer of plain `generate`, and the tokens of its prompt."""
    text = "<image> " * len(images) + "what is this "
    inputs = processor(text=[text], images=[images], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(ids, skip_special_tokens=True), inputs["input_ids"].shape[1]


@pytest.mark.parametrize("sizes", [SIZES[:1], SIZES[1:2], SIZES[:2], SIZES], ids=str)
def test_images_of_any_size_and_number_are_answered_as_offline(server, sizes):
    model, processor, url = server
    images = [noise(*size) for size in sizes]
    found = complete(url, messages("what is this", *map(data_url, images)), max_tokens=4)
    answer, length = offline(model, processor, images)
    assert found.choices[0].message.content.strip() == answer.strip()
    assert found.usage.prompt_tokens == length


def test_the_limit_counts_the_tokens_of_these_images(server):
    model, _, url = server
    count = sum(counts_of(hf_llava.find(model)).images(CONFIG, [(130, 40)] * 16))
    error = refusal(url, messages=messages("what", *[data_url(noise(130, 40))] * 16))
    assert error.status_code == 400
    assert f"the prompt has {count + 1} tokens, image tokens included; at most {LIMIT} are" in error.message


def test_a_budget_that_does_not_fit_an_image_is_refused():
    model, processor = make("next-mistral", MergeConfig(tokens=150))
    with running(build((model, processor), new_tokens=8)) as url:
        error = refusal(url, messages=messages("what", data_url(noise(48, 10))))
        assert error.status_code == 400 and "tokens=150 does not fit: this image has" in error.message
        complete(url, messages("what", data_url(noise(96, 96))), max_tokens=2)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
        {"type": "input_video", "input_video": {}},
        {"type": "video"},
    ],
)
def test_videos_are_refused_by_name(server, part):
    *_, url = server
    error = refusal(url, messages=[{"role": "user", "content": [part, {"type": "text", "text": "a"}]}])
    assert error.status_code == 400 and "this server takes no videos" in error.message


@pytest.mark.parametrize("kind", ["next-video", "onevision"])
def test_text_holds_no_placeholder_of_a_video(kind):
    with running(build(make(kind), new_tokens=8)) as url:
        error = refusal(url, messages=messages("what <video>"))
        assert error.status_code == 400 and "text with <video> is not allowed" in error.message
