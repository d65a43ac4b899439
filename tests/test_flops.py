from itertools import pairwise

import pytest
import torch
from conftest import LAYERS, PATCHES, make_model, make_processor

from llava_pitome import MergeConfig, load, merge_tokens
from llava_pitome.flops import closed_form, counted, literature
from llava_pitome.models.hf_llava import shapes

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


def test_sizes_alone_do_as_well_as_a_model():
    model = make_model()
    lengths = (36, 30, 20, 20, 9, 9, 9, 9)
    assert closed_form(shapes(model), lengths, 7) == closed_form(model, lengths, 7)
    assert literature(shapes(model), 10) == literature(model, 10)


@pytest.mark.parametrize("site", ["attention", "block"])
@pytest.mark.parametrize(
    "method, decoder", [("grid", {0: 12}), ("grid", {1: 0.5}), ("random", {0: 20, 1: 15})]
)
def test_layers_of_the_language_model_that_merge_are_in_the_formula(site, method, decoder, pictures):
    model, processor = make_model(), make_processor()
    inputs = processor(text="<image> what is this", images=pictures[:1], return_tensors="pt")
    text = inputs.input_ids.shape[1] - PATCHES
    config = MergeConfig(decoder=decoder, method=method, site=site)
    lengths = config.llm_lengths(PATCHES, 3)
    with merge_tokens(model, config, processor):
        merged = counted(model, inputs)
    formula = closed_form(model, (PATCHES,) * (FEATURE + 1), text, lengths, site)
    assert (merged.tower, merged.projector) == (formula.tower, formula.projector)
    steps = [(before, before - after) for before, after in pairwise(lengths)]
    joining = sum(2 * r * r * 32 for _, r in steps)  # the sums of those who join
    similarities = sum(2 * r * (n - r) * 8 for n, r in steps) if method == "random" else 0
    assert merged.llm - formula.llm == joining + similarities
    assert formula.llm < closed_form(model, (PATCHES,) * (FEATURE + 1), text).llm


def test_a_layer_that_merges_has_its_attention_before_and_its_mlp_after_or_both_before():
    s = shapes(make_model())

    def llm(lengths, site):
        return closed_form(s, (36,) * (FEATURE + 1), 5, lengths, site).llm

    mlp = 2 * 3 * s.llm_width * s.llm_mlp  # FLOPs a token
    plain, early, late = (
        llm((36,) * 4, "attention"),
        llm((36, 36, 36, 10), "attention"),
        llm((36, 36, 36, 10), "block"),
    )
    assert plain - early == 26 * mlp
    assert late == plain


def test_a_tower_that_merges_behind_its_blocks_has_its_mlps_before():
    s = shapes(make_model())
    lengths = (36, 20, 20, 20, 20, 20, 20, 20)
    behind, between = (closed_form(s, lengths, 5, site=site).tower for site in ("block", "attention"))
    assert behind - between == 16 * 2 * 2 * s.tower_width * s.tower_mlp


def test_lengths_that_do_not_fit_and_unknown_sites_are_errors():
    with pytest.raises(ValueError, match="llm_lengths holds 2 numbers; 3 layers need 4"):
        closed_form(make_model(), (36,) * 8, 5, (36, 9))
    with pytest.raises(ValueError, match="site='inside' is unknown; allowed are 'attention', 'block'"):
        closed_form(make_model(), (36,) * 8, 5, site="inside")


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
