"""Pictures that repeat in a batch go through the tower once, and change no answer."""

import pytest
import torch
from prompts import batch, generate, single

from llava_pitome import MergeConfig, merge_tokens
from llava_pitome.models.image_dedup import distinct, encode_once

CONFIGS = [
    None,
    MergeConfig(ratio=0.8),
    MergeConfig(tokens=6, prefix_share=0.5, llm_proportional=True, positions="original"),
    MergeConfig(prefix=0.3, decoder={0: 0.5, 1: 2}, llm_proportional=True),
]
ASKED = ["<image> what is this", "what <image>", "two red cat", "a red <image> cat or <image> dog"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distinct_pictures_are_found(dtype):
    one, two, three = torch.randn(3, 3, 4, 4).to(dtype)
    assert distinct(torch.stack([one, two, one, three, two])) == ([0, 1, 3], [0, 1, 0, 2, 1])


@pytest.mark.parametrize("config", CONFIGS)
def test_answers_are_those_of_every_picture_by_itself(config, model, processor, pictures):
    seen = [[pictures[0]], [pictures[1]], [], [pictures[1], pictures[0]]]
    towered = []
    watch = model.model.vision_tower.register_forward_pre_hook(
        lambda _m, args, kwargs: towered.append(len(args[0] if args else kwargs["pixel_values"])),
        with_kwargs=True,
    )
    model = model.double()
    with merge_tokens(model, config or MergeConfig(ratio=1.0), processor), torch.no_grad():
        inputs = processor(images=seen, text=ASKED, return_tensors="pt", padding=True).to(torch.float64)
        expected = generate(model, inputs)
        towered.clear()
        found = generate(model, encode_once(model, dict(inputs)) | {})
    watch.remove()
    assert found.tolist() == expected.tolist()
    assert towered == [2]


def test_pictures_that_do_not_repeat_and_words_alone_are_left_as_they_are(model, processor, pictures):
    both = batch(processor, ASKED[:1], pictures)
    words = single(processor, "two red cat", pictures)
    assert encode_once(model, both) is both and encode_once(model, words) is words
