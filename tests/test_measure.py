from itertools import pairwise

import pytest
import torch
from conftest import LAYERS, PATCHES, make_model, make_processor

from llava_pitome import MergeConfig, load, merge_tokens
from llava_pitome.measure import closed_form, counted, literature

FEATURE = LAYERS - 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_formula_counts_what_runs_in_a_plain_model(attention, pictures):
    model, processor = make_model(), make_processor()
    model.set_attn_implementation(attention)
    inputs = processor(text="<image> what is this", images=pictures[:1], return_tensors="pt")
    text = inputs.input_ids.shape[1] - PATCHES
    assert counted(model, inputs) == closed_form(model, (PATCHES,) * (FEATURE + 1), text)


def test_merging_costs_little_more_than_the_formula_and_far_less_than_the_plain_model(pictures):
    model, processor = make_model(), make_processor()
    plain = counted(model, processor(text="<image> what is this", images=pictures[:1], return_tensors="pt"))
    with merge_tokens(model, MergeConfig(ratio=0.8), processor) as merging:
        inputs = processor(text="<image> what is this", images=pictures[:1], return_tensors="pt")
        merged = counted(model, inputs)
    lengths = merging.tower.lengths(PATCHES)
    formula = closed_form(model, lengths, inputs.input_ids.shape[1] - lengths[-1])
    assert (merged.projector, merged.llm) == (formula.projector, formula.llm)
    overhead = merged.tower - formula.tower
    gone = [before - after for before, after in pairwise(lengths)]
    similarities = sum(2 * n * n * 8 for n in lengths[:-1])  # of keys averaged over heads: 8 channels
    joining = sum(2 * r * r * (8 + 32) for r in gone)  # who joins whom, and the sums of those who join
    assert overhead == similarities + joining
    assert merged.total < 0.6 * plain.total


def test_counting_runs_without_gradients_and_changes_nothing(pictures):
    model, processor = make_model(), make_processor()
    inputs = processor(text="<image> what is this", images=pictures[:1], return_tensors="pt")
    before = model(**inputs).logits
    counted(model, inputs)
    assert torch.equal(model(**inputs).logits, before)
    assert all(p.grad is None for p in model.parameters())


def test_the_literatures_formula_by_hand():
    assert literature(make_model(), 10) == 3 * (4 * 10 * 32**2 + 2 * 10**2 * 32 + 2 * 10 * 32 * 64)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantized_language_model_counts_like_the_plain_one(quantization):
    from PIL import Image

    prompt = {"text": "USER: <image>\nIs there a ring? ASSISTANT:", "images": Image.new("RGB", (112, 112))}
    found = []
    for kind in (None, quantization):
        model, processor = load("embedded", quantization=kind)
        found.append(counted(model, processor(**prompt, return_tensors="pt").to(dtype=model.dtype)))
    assert found[0] == found[1]
