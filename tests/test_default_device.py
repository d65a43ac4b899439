"""Another default device changes nothing: "meta" stands for the "cuda" that vLLM sets while a model is made.

A tensor that is made there by accident has no values, so that computing with it raises or differs.
"""

import pytest
import torch
from conftest import make_model, make_processor
from prompts import PROMPTS, batch, generate

from llava_pitome import METHODS, MergeConfig, applied, apply, merge_tokens, parents, remove

PLACES = {"tower": {"ratio": 0.8}, "prefix": {"prefix": 0.5}, "decoder": {"decoder": {0: 0.5, 1: 6}}}
OTHERS = [
    {"recipe": "best", "tokens": 6},
    {"recipe": "best", "ratio": 0.9, "decoder": {0: 0.5}},
    {"recipe": "released", "ratio": 0.7},
    {"recipe": "paper", "resize": (4, 5), "decoder": {0: 2}, "positions": "original"},
    {"recipe": "paper", "tokens": 6, "prefix_share": 0.5, "prefix_metric": "keys"},
    {"recipe": "paper", "ratio": 0.3, "parameters": {"candidates": 6.0, "split": "raster"}},
]


def changes():
    """Yields what a config of every method in every place of its holds, and others."""
    for name, method in METHODS.items():
        for place in method.places:
            values = {"recipe": "paper", "method": name, **PLACES[place]}
            if method.needs_grid and place == "decoder":
                values["decoder"] = {0: 0.5}
            yield pytest.param(values, id=f"{name}-{place}")
    yield from (pytest.param(values, id=str(values)) for values in OTHERS)


@pytest.mark.parametrize("tower, attention", [("clip", "sdpa"), ("siglip", "eager")])
@pytest.mark.parametrize("values", changes())
def test_a_model_merges_the_same_under_another_default_device(values, tower, attention, pictures):
    model, processor = make_model(tower), make_processor(tower)
    model.set_attn_implementation(attention)
    expected = MergeConfig.recipe(values["recipe"], **{k: v for k, v in values.items() if k != "recipe"})
    with merge_tokens(model, expected, processor) as handle, torch.no_grad():
        inputs = batch(processor, PROMPTS, pictures)
        logits, answers = model(**inputs).logits, generate(model, inputs, 3)
        plans = [plan.slot for plan in handle.plans()]
    with torch.device("meta"), torch.no_grad():
        config = MergeConfig.recipe(values["recipe"], **{k: v for k, v in values.items() if k != "recipe"})
        handle = apply(model, config, processor)
        assert applied(model) == config == expected
        assert torch.equal(model(**inputs).logits, logits)
        assert torch.equal(generate(model, inputs, 3), answers)
        assert all(map(torch.equal, plans, [plan.slot for plan in handle.plans()]))
        remove(model)


@pytest.mark.parametrize(
    "values", [{"ratio": 0.8}, {"tokens": 6, "positions": "original"}, {"decoder": {0: 0.5}}]
)
def test_gradients_are_the_same_under_another_default_device(values, pictures):
    found, processor = [], make_processor()
    for device in ("cpu", "meta"):
        model = make_model().train()
        apply(model, MergeConfig(**values), processor)
        inputs = batch(processor, PROMPTS, pictures)
        with torch.device(device):
            model(**inputs, labels=inputs.input_ids).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=0, msg=name)


def test_parents_are_the_same_under_another_default_device():
    x = torch.randn(2, 36, 8, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    for method, kind in METHODS.items():
        if kind.needs:
            continue
        expected = parents(x, 30, method)  # in rounds
        with torch.device("meta"):
            assert torch.equal(parents(x, 30, method), expected)
