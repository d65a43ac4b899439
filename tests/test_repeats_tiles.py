"""Images and videos that repeat in a batch go through the tower once, also where they are cut into tiles."""

import pytest
import torch
from tiled import make_tiled, make_tiled_processor, noise

from llava_pitome import MergeConfig, merge_tokens
from llava_pitome.models.image_dedup import encode_once

CONFIGS = [
    MergeConfig(ratio=1.0),
    MergeConfig(ratio=0.8),
    MergeConfig(tokens_per_tile=9, prefix_share=0.5),
    MergeConfig(ratio=0.8, decoder={0: 0.5}, llm_proportional=True, positions="original"),
]
ONE, TWO, THREE = noise(50, 100), noise(50, 100, 1), noise(90, 60)
SMALL = ONE.resize((50, 25))  # another image with pixels of another size
IMAGES = {  # those of each prompt, and the tiles of the distinct ones
    "next-mistral": ([[ONE], [TWO], [], [TWO, ONE], [THREE], [ONE]], 3 + 3 + 5),
    "onevision": ([[ONE], [TWO], [], [TWO, ONE], [ONE, THREE], [ONE]], 3 + 3 + 1 + 1 + 1),
    "onevision one shared": ([[ONE], [TWO, TWO], [ONE]], 3 + 1 + 1),
    "onevision all shared": ([[ONE, TWO], [TWO, ONE]], 1 + 1),
}


def generate(model, inputs):
    return model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)


@pytest.fixture
def encoded():
    """A function that lists the tiles of every call of a model's tower."""

    def watch(model):
        calls = []
        model.model.vision_tower.register_forward_pre_hook(
            lambda _m, args, kwargs: calls.append(len(args[0] if args else kwargs["pixel_values"])),
            with_kwargs=True,
        )
        return calls

    return watch


@pytest.mark.parametrize("case", IMAGES)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: str(c.changes()))
def test_answers_are_those_of_every_image_by_itself(case, config, encoded):
    kind = case.split()[0]
    images, tiles = IMAGES[case]
    model, processor = make_tiled(kind).double(), make_tiled_processor(kind)
    texts = [
        "<image>" * len(own) + f" what is {word}"
        for own, word in zip(images, ["this", "that", "a", "cat", "dog"] * 2)
    ]
    with merge_tokens(model, config, processor), torch.no_grad():
        inputs = processor(images=images, text=texts, return_tensors="pt", padding=True).to(torch.float64)
        expected = generate(model, inputs)
        calls = encoded(model)
        found = generate(model, encode_once(model, dict(inputs)))
    assert found.tolist() == expected.tolist()
    assert sum(calls) == tiles


@pytest.mark.parametrize("kind", ["next-video", "onevision"])
@pytest.mark.parametrize("config", [MergeConfig(ratio=1.0), MergeConfig(tokens_per_frame=4)], ids=str)
def test_answers_are_those_of_every_video_by_itself(kind, config, encoded):
    model, processor = make_tiled(kind).double(), make_tiled_processor(kind)
    one, two = ([noise(48, 48, seed + i) for i in range(3)] for seed in (0, 9))
    texts = ["<video> what is this", "<video> two red cat", "<video> that"]
    with merge_tokens(model, config, processor), torch.no_grad():
        inputs = processor(videos=[one, two, one], text=texts, return_tensors="pt", padding=True)
        inputs = inputs.to(torch.float64)
        expected = generate(model, inputs)
        calls = encoded(model)
        found = generate(model, encode_once(model, dict(inputs)))
    assert found.tolist() == expected.tolist()
    assert calls == [6]


@pytest.mark.parametrize("images", [[ONE, TWO], [ONE, SMALL]])
def test_images_that_do_not_repeat_are_left_as_they_are(images):
    model, processor = make_tiled("next-mistral"), make_tiled_processor("next-mistral")
    inputs = processor(images=images, text=["<image> a", "<image> cat"], return_tensors="pt", padding=True)
    assert encode_once(model, inputs) is inputs


def test_images_of_one_colour_and_two_sizes_are_not_the_same():
    from PIL import Image

    model, processor = make_tiled("next-mistral"), make_tiled_processor("next-mistral")
    images = [Image.new("RGB", size, "red") for size in ((100, 50), (200, 100))]
    inputs = processor(images=images, text=["<image> a", "<image> cat"], return_tensors="pt", padding=True)
    assert torch.equal(inputs["pixel_values"][0], inputs["pixel_values"][1])
    assert encode_once(model, inputs) is inputs
