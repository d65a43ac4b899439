"""Saving a merging model, and loading it again."""

import json

import pytest
import torch
from conftest import PATCHES
from prompts import IMAGE, PROMPTS, RECIPES, batch, features, generate, single

from llava_pitome import MergeConfig, load, merge_tokens, remove


def save(model, processor, folder, config):
    """The merging model's folder."""
    with merge_tokens(model, config, processor):
        model.save_pretrained(folder)
        processor.save_pretrained(folder)


@pytest.mark.parametrize("config", [*RECIPES, MergeConfig(ratio=(0.9, 0.8, 1.0, 0.5, 1.0, 0.9, 0.9))])
def test_a_saved_merging_model_is_loaded_merging(model, processor, pictures, tmp_path, config):
    save(model, processor, tmp_path, config)
    assert MergeConfig.from_pretrained(tmp_path) == config
    loaded, own = load(str(tmp_path))
    assert MergeConfig.from_dict(loaded.config.token_merging) == config
    with merge_tokens(model, config, processor):
        expected = generate(model, batch(processor, PROMPTS, pictures))
    assert torch.equal(generate(loaded, batch(own, PROMPTS, pictures)), expected)
    remove(loaded)
    assert "token_merging" not in loaded.config.to_dict()
    expected = generate(model, batch(processor, PROMPTS, pictures))
    assert torch.equal(generate(loaded, batch(own, PROMPTS, pictures)), expected)


def test_the_weights_saved_while_merging_are_the_plain_ones(model, processor, saved, tmp_path):
    save(model, processor, tmp_path / "merging", MergeConfig(ratio=0.8))
    weights = [folder / "model.safetensors" for folder in (tmp_path / "merging", saved)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_plain_checkpoint_is_loaded_plain(saved, pictures):
    model, processor = load(str(saved))
    assert not hasattr(model.config, "token_merging")
    assert (single(processor, PROMPTS[0], pictures).input_ids == IMAGE).sum() == PATCHES
    assert not model.training
    assert processor.tokenizer.padding_side == "left"


def test_a_merge_config_saved_beside_a_checkpoint_is_applied(saved, pictures):
    MergeConfig(tokens=5).save_pretrained(saved)
    _, processor = load(str(saved))
    assert (single(processor, PROMPTS[0], pictures).input_ids == IMAGE).sum() == 5


def test_a_given_config_replaces_the_saved_one(model, processor, pictures, tmp_path):
    save(model, processor, tmp_path, MergeConfig(tokens=5))
    loaded, own = load(str(tmp_path), MergeConfig(tokens=11))
    assert (single(own, PROMPTS[0], pictures).input_ids == IMAGE).sum() == 11
    remove(loaded)
    assert not hasattr(loaded.config, "token_merging")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"version": 1, "rato": 0.9}, "no field 'rato'; the nearest is 'ratio'"),
        ({"version": 9, "ratio": 0.9}, "has version 9"),
    ],
)
def test_a_saved_config_that_cannot_be_read_raises(saved, values, message):
    raw = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(raw | {"token_merging": values}))
    with pytest.raises(ValueError, match=message):
        load(str(saved))


@pytest.mark.parametrize(
    "path, options, message",
    [
        ("embedded", {"quantization": "2bit"}, "quantization='2bit' is unknown; allowed are 4bit, 8bit"),
        ("SAVED", {}, "holds a model of type 'clip_vision_model'. Supported: Llava"),
    ],
)
def test_an_unknown_quantization_or_model_raises(clip_folder, path, options, message):
    with pytest.raises(ValueError, match=message):
        load(path.replace("SAVED", str(clip_folder)), **options)


def test_transformers_loads_a_saved_merging_model_unmerged(model, processor, tmp_path):
    from transformers import LlavaForConditionalGeneration

    save(model, processor, tmp_path, MergeConfig(tokens=5))
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    pixels = {"pixel_values": torch.randn(1, 3, 48, 48)}
    assert torch.equal(features(plain, pixels), features(model, pixels))
    assert plain.config.token_merging["tokens"] == 5
