"""Original checkpoints in the Hugging Face class: the same logits, answers, ids and pixel values."""

from contextlib import nullcontext

import originals
import pytest
import torch
from conftest import PATCHES
from originals import PROMPTS, ROWS, change_config, converted_inputs, generate, original_inputs
from prompts import images_of

from llava_pitome import MergeConfig, load, merge_tokens

CONFIGS = [
    None,
    MergeConfig(ratio=0.9),
    MergeConfig.recipe("released", ratio=0.9),
    MergeConfig(tokens=7),
    MergeConfig(prefix=0.4),
    MergeConfig(prefix=0.5, decoder={0: 0.5, 1: 3}, llm_proportional=True),
    MergeConfig.recipe("best", tokens=6),
]


@pytest.fixture
def images():
    return originals.make_images()


def merged(model, config, processor=None):
    return nullcontext() if config is None else merge_tokens(model, config, processor)


def flat_images(prompts, images):
    return [image for prompt in prompts for image in images_of(prompt, images)]


@pytest.mark.parametrize("config", CONFIGS)
def test_logits_answers_and_beams_equal_those_of_the_original(original, original_folder, images, config):
    model, processor = load(str(original_folder))
    expected_inputs = original_inputs(original, original_folder, PROMPTS, flat_images(PROMPTS, images))
    singles = PROMPTS[::2]  # of one image each: transformers 5.17 mixes up the beams of several
    single_inputs = original_inputs(original, original_folder, singles, flat_images(singles, images))
    with merged(original, config), merged(model, config, processor), torch.no_grad():
        inputs = converted_inputs(processor, PROMPTS, images)
        logits, expected = model(**inputs).logits[..., :ROWS], original(**expected_inputs).logits
        mask = inputs["attention_mask"].bool()
        assert logits.shape == expected.shape
        torch.testing.assert_close(logits[mask], expected[mask], rtol=0, atol=1e-5)
        assert torch.equal(generate(model, inputs), generate(original, expected_inputs))
        beams = generate(model, converted_inputs(processor, singles, images), num_beams=2)
        assert torch.equal(beams, generate(original, single_inputs, num_beams=2))


def test_each_prompt_alone_has_the_logits_of_the_original(original, original_folder, images):
    model, processor = load(str(original_folder), MergeConfig(ratio=0.9))
    with merge_tokens(original, MergeConfig(ratio=0.9)), torch.no_grad():
        for prompt in PROMPTS:
            inputs = original_inputs(original, original_folder, [prompt], flat_images([prompt], images))
            logits = model(**converted_inputs(processor, [prompt], images)).logits[..., :ROWS]
            torch.testing.assert_close(logits, original(**inputs).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_equal_those_of_the_original_also_once_saved(original, vocabulary, tmp_path, images, legacy):
    folder = originals.save(original, vocabulary, tmp_path / "original", {"legacy": legacy})
    model, processor = load(str(folder))
    model.save_pretrained(tmp_path / "converted")
    processor.save_pretrained(tmp_path / "converted")
    saved = load(str(tmp_path / "converted"))[1]
    for prompt in [*PROMPTS, "<image>\n", "\n<image>\n", "a\n\n<image>\n\nb </s>a"]:
        expected = original_inputs(original, folder, [prompt])["input_ids"][0].tolist()
        for converted in (processor, saved):
            ids = converted_inputs(converted, [prompt], images).input_ids[0]
            is_image = ids == converted.image_token_id
            kept = ~is_image | (is_image.cumsum(0) % PATCHES == 1)  # one placeholder of each image
            assert ids.masked_fill(is_image, originals.IMAGE)[kept].tolist() == expected, prompt


def test_the_chat_template_writes_the_prompts_of_the_original(original_folder):
    _, processor = load(str(original_folder))
    system = PROMPTS[0].partition(" USER:")[0]
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a red cat"}]},
        {"role": "user", "content": [{"type": "text", "text": "And that?"}]},
    ]
    for count, expected in ((2, PROMPTS[0]), (4, PROMPTS[2])):
        assert processor.apply_chat_template(messages[:count], add_generation_prompt=True) == expected


@pytest.mark.parametrize("aspect", ["pad", "square", None])
def test_pixel_values_equal_those_of_the_original(original, original_folder, images, monkeypatch, aspect):
    _, processor = load(str(change_config(original_folder, image_aspect_ratio=aspect)))
    monkeypatch.setattr(original.config, "image_aspect_ratio", aspect)
    expected = original_inputs(original, original_folder, PROMPTS, images)["images"]
    assert torch.equal(processor.image_processor(images, return_tensors="pt")["pixel_values"], expected)
    assert processor.image_processor.do_pad == (aspect == "pad")
