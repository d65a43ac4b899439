"""Models that cut images into tiles, complete: identity at ratio 1, removal, batches, generation."""

import copy

import pytest
import torch
from prompts import generate
from test_tower import state
from tiled import (
    KINDS,
    batches,
    features_of,
    inputs_of,
    make_tiled,
    make_tiled_processor,
    prompts_of,
    takes_videos,
)

from llava_pitome import MergeConfig, apply, merge_tokens, remove
from llava_pitome.api import applied

MERGING = {
    "ratio": {"ratio": 0.9},
    "shared": {"ratio": 0.8, "prefix_share": 0.5, "newlines": "scaled"},
    "joint": {
        "ratio": 0.8, "prefix_share": 1.0, "tile_shares": "joint", "temporal": True, "method": "tome",
    },
    "by tile": {"tokens_per_tile": 5, "tokens_per_frame": 2, "across_tiles": False, "newlines": "none"},
    "prefix": {"prefix": 0.3, "metric": "hidden", "prefix_metric": "keys"},
    "thumbnail": {"ratio": 0.9, "tile_shares": "thumbnail"},
}  # fmt: skip


def merging(name, kind):
    """The config without what a kind of models has no use for."""
    fields = MERGING[name]
    if not takes_videos(kind):
        fields = {k: v for k, v in fields.items() if k not in ("temporal", "tokens_per_frame")}
    return MergeConfig(**fields)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def outputs(model, inputs):
    """Features, logits and generated ids."""
    with torch.no_grad():
        return [*features_of(model, inputs), logits(model, inputs), generate(model, inputs, 3)]


def same(found, expected):
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("kind, name", batches())
def test_a_ratio_of_1_changes_no_bit(kind, name):
    model, processor = make_tiled(kind), make_tiled_processor(kind)
    inputs = inputs_of(processor, prompts_of(kind)[name])
    expected = outputs(model, inputs)
    with merge_tokens(model, MergeConfig(ratio=1.0), processor):
        again = inputs_of(processor, prompts_of(kind)[name])
        assert all(torch.equal(again[key], inputs[key]) for key in inputs)
        assert same(outputs(model, again), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_of_all_tokens_changes_no_bit(kind):
    """It takes every step of a merge: packed tokens are taken apart, and put together again."""
    model, processor = make_tiled(kind), make_tiled_processor(kind)
    for prompt in prompts_of(kind)["images"]:
        inputs = inputs_of(processor, [prompt])
        if not prompt.images:
            continue
        expected = outputs(model, inputs)
        config = MergeConfig(tokens=len(expected[0]))
        with merge_tokens(model, config, processor):
            assert same(outputs(model, inputs_of(processor, [prompt])), expected)
    for prompt in prompts_of(kind).get("videos", [])[::2]:
        inputs = inputs_of(processor, [prompt])
        expected = outputs(model, inputs)
        for temporal in (False, True):
            config = MergeConfig(tokens_per_video=len(expected[0]), temporal=temporal)
            with merge_tokens(model, config, processor):
                assert same(outputs(model, inputs_of(processor, [prompt])), expected)


class Stop(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind, name", batches())
def test_nothing_is_left_behind(kind, name, fails):
    model, processor = make_tiled(kind), make_tiled_processor(kind)
    prompts = prompts_of(kind)[name]
    inputs = inputs_of(processor, prompts)
    expected = outputs(model, inputs)
    before, weights = state(model), copy.deepcopy(model.state_dict())
    written = sorted(vars(processor))

    def stop(*_):
        raise Stop

    for config in (merging("shared", kind), merging("joint", kind)):
        try:
            with merge_tokens(model, config, processor):
                merged = inputs_of(processor, prompts)
                assert merged["input_ids"].shape[1] < inputs["input_ids"].shape[1]
                logits(model, merged)
                if fails:
                    hook = model.model.vision_tower.encoder.layers[2].mlp.register_forward_hook(stop)
                    try:
                        logits(model, merged)
                    finally:
                        hook.remove()
        except Stop:
            assert fails
    assert state(model) == before and sorted(vars(processor)) == written
    assert applied(model) is None
    found = model.state_dict()
    assert found.keys() == weights.keys() and all(torch.equal(found[k], weights[k]) for k in weights)
    again = inputs_of(processor, prompts)
    assert all(torch.equal(again[key], inputs[key]) for key in inputs)
    assert same(outputs(model, again), expected)


@pytest.mark.parametrize("config", MERGING)
@pytest.mark.parametrize("kind, name", batches())
def test_a_batch_gives_what_each_prompt_gives_alone(kind, name, config):
    model, processor = make_tiled(kind), make_tiled_processor(kind)
    prompts = prompts_of(kind)[name]
    with merge_tokens(model, merging(config, kind), processor):
        inputs = inputs_of(processor, prompts)
        together, answers = logits(model, inputs), generate(model, inputs, 3)
        features = iter(features_of(model, inputs))
        for prompt, row, answer in zip(prompts, together, answers):
            alone = inputs_of(processor, [prompt])
            length = alone["input_ids"].shape[1]
            torch.testing.assert_close(row[-length:], logits(model, alone)[0], rtol=0, atol=2e-5)
            assert torch.equal(generate(model, alone, 3)[0], answer)
            if name != "images and videos":
                for expected in features_of(model, alone):
                    torch.testing.assert_close(next(features), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", ["shared", "joint"])
def test_sampled_beams_and_sequences_are_those_of_each_prompt_alone(kind, config):
    model, processor = make_tiled(kind), make_tiled_processor(kind)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "num_beams": 3, "num_return_sequences": 2}
    with merge_tokens(model, merging(config, kind), processor):
        for prompts in prompts_of(kind).values():
            inputs = inputs_of(processor, prompts[:2])
            found = model.generate(**inputs, **options, do_sample=False)
            assert found.shape == (4, inputs["input_ids"].shape[1] + 3)
            alone = inputs_of(processor, prompts[:1])
            expected = model.generate(**alone, **options, do_sample=False)
            assert torch.equal(found[:2, -3:], expected[:, -3:])


@pytest.mark.parametrize("kind, name", [x for x in batches() if x[1] in ("images", "videos")])
def test_a_conversation_goes_on_with_its_cache(kind, name):
    """A second turn with the first one's cache gives the logits of both turns in one prompt."""
    model, processor = make_tiled(kind), make_tiled_processor(kind)
    first = prompts_of(kind)[name][0]
    both = first._replace(text=first.text + " is this red")
    with merge_tokens(model, merging("shared", kind), processor), torch.no_grad():
        inputs, whole = (inputs_of(processor, [prompt]) for prompt in (first, both))
        length = inputs["input_ids"].shape[1]
        cache = model(**inputs, use_cache=True).past_key_values
        second = model(
            input_ids=whole["input_ids"][:, length:],
            attention_mask=whole["attention_mask"],
            past_key_values=cache,
        )
        torch.testing.assert_close(second.logits, model(**whole).logits[:, length:], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_configs_replace_each_other_and_come_back(kind):
    model, processor = make_tiled(kind), make_tiled_processor(kind)
    prompts = prompts_of(kind)["images"]
    apply(model, merging("ratio", kind), processor)
    expected = outputs(model, inputs_of(processor, prompts))
    with merge_tokens(model, merging("by tile", kind), processor):
        assert not same(outputs(model, inputs_of(processor, prompts)), expected)
    assert same(outputs(model, inputs_of(processor, prompts)), expected)
    apply(model, merging("shared", kind), processor)
    apply(model, merging("ratio", kind), processor)
    assert same(outputs(model, inputs_of(processor, prompts)), expected)
    remove(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_config_merges_the_same_again(kind, tmp_path):
    model, processor = make_tiled(kind), make_tiled_processor(kind)
    prompts = prompts_of(kind)["images"]
    apply(model, merging("shared", kind), processor)
    expected = outputs(model, inputs_of(processor, prompts))
    model.save_pretrained(tmp_path)
    other, own = type(model).from_pretrained(tmp_path), make_tiled_processor(kind)
    apply(other, None, own)
    assert applied(other) == merging("shared", kind)
    assert same(outputs(other, inputs_of(own, prompts)), expected)
