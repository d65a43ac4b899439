from itertools import pairwise

import pytest
import test_kin
import torch
from conftest import LAYERS, PATCHES, make_model, make_processor, make_vip_llava

from llava_pitome import MergeConfig, load, merge_tokens
from llava_pitome.flops import closed_form, counted, literature
from llava_pitome.models.hf_llava import find, shapes

FEATURE = LAYERS - 1
DENSE = (PATCHES,) * (FEATURE + 1)


def prompt(image, processor=None):
    return (processor or make_processor())(text="<image> what is this", images=image, return_tensors="pt")


def text_tokens(inputs, image_tokens=PATCHES):
    return inputs.input_ids.shape[1] - image_tokens


MODELS = {
    "llava": make_model,
    "several feature layers": lambda: make_model(vision_feature_layer=[-2, 0, 3]),
    "vip": make_vip_llava,
    **test_kin.MODELS,
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", MODELS)
def test_closed_form_equals_the_count_of_a_dense_model(kind, attention, pictures):
    model, processor = MODELS[kind](), make_processor("siglip" if kind == "interleave" else "clip")
    inputs = prompt(pictures[0], processor)
    model.set_attn_implementation(attention)
    dense = (PATCHES,) * (find(model).num_feature_layers + 1)
    assert counted(model, inputs) == closed_form(model, dense, text_tokens(inputs))


def test_the_count_of_a_merging_tower_adds_matching_and_merging_to_the_closed_form(pictures):
    model, processor, config = make_model(), make_processor(), MergeConfig(ratio=0.8)
    dense = counted(model, prompt(pictures[0], processor))
    with merge_tokens(model, config, processor):
        inputs = prompt(pictures[0], processor)
        merged = counted(model, inputs)
    lengths = config.lengths(PATCHES, FEATURE)
    formula = closed_form(model, lengths, text_tokens(inputs, lengths[-1]))
    assert (merged.projector, merged.llm) == (formula.projector, formula.llm)
    removed = [before - after for before, after in pairwise(lengths)]
    similarities = sum(2 * n * n * 8 for n in lengths[:-1])  # of keys averaged over heads: 8 channels
    merging = sum(2 * r * r * (8 + 32) for r in removed)  # similarities of those that merge, and their sums
    assert merged.tower - formula.tower == similarities + merging
    assert merged.total < 0.6 * dense.total


def test_a_merge_after_the_projector_counts_with_the_projector(pictures):
    model, processor, config = make_model(), make_processor(), MergeConfig(prefix=9)
    with merge_tokens(model, config, processor):
        inputs = prompt(pictures[0], processor)
        merged = counted(model, inputs)
    formula = closed_form(model, DENSE, text_tokens(inputs, 9), (9,) * 4)
    assert (merged.tower, merged.llm) == (formula.tower, formula.llm)
    assert merged.projector > formula.projector


@pytest.mark.parametrize("site", ["attention", "block"])
@pytest.mark.parametrize(
    "method, decoder", [("grid", {0: 12}), ("grid", {1: 0.5}), ("random", {0: 20, 1: 15})]
)
def test_the_closed_form_includes_merging_layers_of_the_language_model(site, method, decoder, pictures):
    model, processor = make_model(), make_processor()
    inputs = prompt(pictures[0], processor)
    config = MergeConfig(decoder=decoder, method=method, site=site)
    lengths = config.llm_lengths(PATCHES, 3)
    with merge_tokens(model, config, processor):
        merged = counted(model, inputs)
    formula = closed_form(model, DENSE, text_tokens(inputs), lengths, site)
    assert (merged.tower, merged.projector) == (formula.tower, formula.projector)
    steps = [(before, before - after) for before, after in pairwise(lengths)]
    merging = sum(2 * r * r * 32 for _, r in steps)  # the sums of those that merge
    similarities = sum(2 * r * (n - r) * 8 for n, r in steps) if method == "random" else 0
    assert merged.llm - formula.llm == merging + similarities
    assert formula.llm < closed_form(model, DENSE, text_tokens(inputs)).llm


def test_site_decides_whether_the_mlp_of_a_merging_block_runs_before_or_after():
    s = shapes(make_model())
    llm = {
        (last, site): closed_form(s, DENSE, 5, (36, 36, 36, last), site).llm
        for last in (36, 10)
        for site in ("attention", "block")
    }
    assert llm[36, "attention"] - llm[10, "attention"] == 26 * 2 * 3 * s.llm_width * s.llm_mlp
    assert llm[10, "block"] == llm[36, "attention"]
    tower = {site: closed_form(s, (36, *[20] * 7), 5, site=site).tower for site in ("attention", "block")}
    assert tower["block"] - tower["attention"] == 16 * 2 * 2 * s.tower_width * s.tower_mlp


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"llm_lengths": (36, 9)}, "llm_lengths holds 2 numbers; 3 layers need 4"),
        ({"site": "inside"}, "site='inside' is unknown; allowed are 'attention', 'block'"),
    ],
)
def test_closed_form_refuses_wrong_lengths_and_sites(arguments, message):
    with pytest.raises(ValueError, match=message):
        closed_form(make_model(), DENSE, 5, **arguments)


def test_formulas_take_a_model_or_its_shapes():
    model, lengths = make_model(), (36, 30, 20, 20, 9, 9, 9, 9)
    assert closed_form(shapes(model), lengths, 7) == closed_form(model, lengths, 7)
    by_hand = 3 * (4 * 10 * 32**2 + 2 * 10**2 * 32 + 2 * 10 * 32 * 64)
    assert literature(shapes(model), 10) == literature(model, 10) == by_hand


def test_counting_leaves_the_model_unchanged(pictures):
    model, inputs = make_model(), prompt(pictures[0])
    before = model(**inputs).logits
    counted(model, inputs)
    assert torch.equal(model(**inputs).logits, before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantized_language_model_counts_like_the_plain_one(quantization):
    from PIL import Image

    inputs = {"text": "USER: <image>\nIs there a ring? ASSISTANT:", "images": Image.new("RGB", (112, 112))}
    counts = []
    for kind in (None, quantization):
        model, processor = load("embedded", quantization=kind)
        counts.append(counted(model, processor(**inputs, return_tensors="pt").to(dtype=model.dtype)))
    assert counts[0] == counts[1]
