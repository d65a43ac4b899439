"""Checkpoints of the original package in the Hugging Face class: the same logits, answers, ids and pixels."""

from contextlib import nullcontext

import originals
import pytest
import torch
from conftest import PATCHES
from originals import PROMPTS, ROWS, answer, asked, changed, flat, generate, given

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
def folder(original_folder):
    return original_folder


@pytest.fixture
def pictures():
    return originals.make_pictures()


def merging(model, config, processor=None):
    return nullcontext() if config is None else merge_tokens(model, config, processor)


@pytest.mark.parametrize("config", CONFIGS)
def test_both_classes_have_the_same_logits_and_answers(original, folder, pictures, config):
    model, processor = load(str(folder))
    theirs = given(original, folder, PROMPTS, flat(PROMPTS, pictures))
    with merging(original, config), merging(model, config, processor), torch.no_grad():
        ours = asked(processor, PROMPTS, pictures)
        logits = model(**ours).logits[..., :ROWS]
        expected = original(**theirs).logits
        real = ours["attention_mask"].bool()
        assert logits.shape == expected.shape
        torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-5)
        assert torch.equal(answer(model, ours), generate(original, theirs))


@pytest.mark.parametrize("config", CONFIGS)
def test_both_classes_have_the_same_beams(original, folder, pictures, config):
    prompts = PROMPTS[::2]  # of one picture each: transformers 5.17 confuses the beams of several
    model, processor = load(str(folder))
    theirs = given(original, folder, prompts, flat(prompts, pictures))
    with merging(original, config), merging(model, config, processor):
        ours = asked(processor, prompts, pictures)
        expected = generate(original, theirs, num_beams=2)
        assert torch.equal(answer(model, ours, num_beams=2), expected)


def test_every_prompt_alone_has_the_same_logits(original, folder, pictures):
    model, processor = load(str(folder), MergeConfig(ratio=0.9))
    with merge_tokens(original, MergeConfig(ratio=0.9)), torch.no_grad():
        for prompt in PROMPTS:
            theirs = given(original, folder, [prompt], flat([prompt], pictures))
            logits = model(**asked(processor, [prompt], pictures)).logits[..., :ROWS]
            torch.testing.assert_close(logits, original(**theirs).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("legacy", [True, False])
def test_prompts_become_the_same_ids_also_once_saved_and_loaded(
    original, vocabulary, tmp_path, pictures, legacy
):
    folder = originals.save(original, vocabulary, tmp_path / "original", {"legacy": legacy})
    model, processor = load(str(folder))
    model.save_pretrained(tmp_path / "converted")
    processor.save_pretrained(tmp_path / "converted")
    again = load(str(tmp_path / "converted"))[1]
    for prompt in [*PROMPTS, "<image>\n", "\n<image>\n", "a\n\n<image>\n\nb </s>a"]:
        expected = given(original, folder, [prompt])["input_ids"][0].tolist()
        for one in (processor, again):
            ids = asked(one, [prompt], pictures).input_ids[0]
            image = ids == one.image_token_id
            kept = ~image | (image.cumsum(0) % PATCHES == 1)  # one of each picture
            ids = ids.masked_fill(image, originals.IMAGE)[kept]
            assert ids.tolist() == expected, prompt


def test_the_chat_template_writes_the_packages_own_prompts(folder):
    _, processor = load(str(folder))
    system = PROMPTS[0].partition(" USER:")[0]
    picture = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": picture},
        {"role": "assistant", "content": [{"type": "text", "text": "a red cat"}]},
        {"role": "user", "content": [{"type": "text", "text": "And that?"}]},
    ]
    for count, expected in ((2, PROMPTS[0]), (4, PROMPTS[2])):
        assert processor.apply_chat_template(messages[:count], add_generation_prompt=True) == expected


@pytest.mark.parametrize("aspect", ["pad", "square", None])
def test_pictures_become_the_same_pixels(original, folder, pictures, aspect):
    _, processor = load(str(changed(folder, image_aspect_ratio=aspect)))
    before = original.config.image_aspect_ratio
    original.config.image_aspect_ratio = aspect
    expected = given(original, folder, PROMPTS, pictures)["images"]
    original.config.image_aspect_ratio = before
    assert torch.equal(processor.image_processor(pictures, return_tensors="pt")["pixel_values"], expected)
    assert processor.image_processor.do_pad == (aspect == "pad")
