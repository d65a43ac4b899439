"""Two forward passes before a backward pass, checkpointed or not: the table in docs/training.md."""

import pytest
import torch
from conftest import make_model, make_processor
from prompts import PROMPTS, single

from llava_pitome import MergeConfig, merge_tokens

CONFIGS = {
    "unmerged": MergeConfig(ratio=1.0),
    "tower": MergeConfig(ratio=0.8),
    "tower, after the block": MergeConfig(ratio=0.8, site="block"),
    "projector": MergeConfig(prefix=9),
    "decoder": MergeConfig(decoder={1: 0.5}),
    "decoder, after the block": MergeConfig(decoder={1: 0.5}, site="block"),
    "best": MergeConfig.recipe("best", tokens=9),
    "resize": MergeConfig(resize=(4, 4)),
}
REFUSED = (
    "tower",
    "decoder",
    "best",
)  # with use_reentrant=True, where a layer's own hooks are not recomputed
SECOND = {  # whether the second pass has gradients, and its prompt
    "none": None,
    "same images": (True, 0),
    "other images": (True, 2),
    "text": (True, 3),
    "same images without gradients": (False, 0),
    "other images without gradients": (False, 2),
    "text without gradients": (False, 3),
}


def gradients(config, second, reentrant, pictures, start=0):
    """The gradients of one or two passes; `reentrant` is None without checkpointing."""
    model, processor = make_model().train(), make_processor()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with merge_tokens(model, config, processor):

        def loss(prompt):
            inputs = single(processor, PROMPTS[prompt], pictures[prompt:])
            return model(**inputs, labels=inputs.input_ids).loss

        total = loss(start)
        if second is not None:
            has_gradients, prompt = second
            with torch.set_grad_enabled(has_gradients):
                other = loss(prompt)
            total = total + other
        total.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def hooks_are_recomputed(reentrant):
    """Whether the hooks on a checkpointed layer itself run again in the backward pass."""
    model, calls = make_model().train(), []
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.model.language_model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    ids = torch.tensor([[1, 5, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    return len(calls) == 2


@pytest.mark.parametrize("second", SECOND.values(), ids=SECOND)
@pytest.mark.parametrize("name", list(CONFIGS)[::2])
def test_checkpointing_changes_no_gradient_of_two_passes(name, second, pictures):
    plain = gradients(CONFIGS[name], second, None, pictures)
    again = gradients(CONFIGS[name], second, False, pictures)
    assert plain.keys() == again.keys() and any("vision_tower" in name for name in plain)
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("second", SECOND.values(), ids=SECOND)
@pytest.mark.parametrize("name", CONFIGS)
def test_reentrant_checkpointing_changes_no_gradient_or_raises(name, second, pictures):
    plain = gradients(CONFIGS[name], second, None, pictures)
    if name in REFUSED and not hooks_are_recomputed(True):
        with pytest.raises(RuntimeError, match="'use_reentrant': False"):
            gradients(CONFIGS[name], second, True, pictures)
        return
    again = gradients(CONFIGS[name], second, True, pictures)
    assert plain.keys() == again.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient, rtol=1e-4, atol=1e-6, msg=key)


def test_a_pass_without_gradients_adds_none(pictures):
    """The table would prove nothing if a second pass had no effect of its own."""
    alone, without, both = (
        gradients(CONFIGS["tower"], SECOND[name], None, pictures)
        for name in ("none", "other images without gradients", "other images")
    )
    for key, gradient in alone.items():
        assert torch.equal(gradient, without[key])
    assert any(not torch.equal(gradient, both[key]) for key, gradient in alone.items())


@pytest.mark.parametrize("reentrant", [None, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_two_passes_are_the_sum_of_each_ones(name, reentrant, pictures):
    both = gradients(CONFIGS[name], SECOND["other images"], reentrant, pictures)
    first = gradients(CONFIGS[name], None, reentrant, pictures)
    second = gradients(CONFIGS[name], None, reentrant, pictures, start=2)
    for key, gradient in both.items():
        torch.testing.assert_close(gradient, first[key] + second[key], rtol=1e-4, atol=1e-6, msg=key)
