import json

import pytest
import torch
from conftest import PATCHES
from prompts import IMAGE, PROMPTS, RECIPES, batch, features, generate, single
from transformers import (
    AutoConfig,
    LlavaForConditionalGeneration,
)

from llava_pitome import MergeConfig, load, merge_tokens, remove


@pytest.mark.parametrize("config", [*RECIPES, MergeConfig(ratio=(0.9, 0.8, 1.0, 0.5, 1.0, 0.9, 0.9))])
def test_a_saved_model_merges_again_once_loaded(model, processor, pictures, tmp_path, config):
    with merge_tokens(model, config, processor):
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        expected = generate(model, batch(processor, PROMPTS, pictures))
    assert (
        MergeConfig.from_dict(json.loads((tmp_path / "config.json").read_text())["token_merging"]) == config
    )
    loaded, own = load(str(tmp_path))
    assert MergeConfig.from_dict(loaded.config.token_merging) == config
    assert torch.equal(generate(loaded, batch(own, PROMPTS, pictures)), expected)
    remove(loaded)
    assert not hasattr(loaded.config, "token_merging")
    assert "token_merging" not in loaded.config.to_dict()
    assert torch.equal(
        generate(loaded, batch(own, PROMPTS, pictures)), generate(model, batch(processor, PROMPTS, pictures))
    )


def test_the_weights_that_are_saved_while_merging_are_the_plain_ones(model, saved, tmp_path):
    with merge_tokens(model, MergeConfig(ratio=0.8)):
        model.save_pretrained(tmp_path / "merging")
    assert (tmp_path / "merging/model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()


def test_a_plain_checkpoint_loads_plain(saved, pictures):
    model, processor = load(str(saved))
    assert not hasattr(model.config, "token_merging")
    assert (single(processor, PROMPTS[0], pictures).input_ids == IMAGE).sum() == PATCHES
    assert not model.training
    assert processor.tokenizer.padding_side == "left"


def test_a_config_that_is_given_wins_over_the_saved_one(model, processor, pictures, tmp_path):
    with merge_tokens(model, MergeConfig(tokens=5), processor):
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
    loaded, own = load(str(tmp_path), MergeConfig(tokens=11))
    assert (single(own, PROMPTS[0], pictures).input_ids == IMAGE).sum() == 11
    remove(loaded)
    assert not hasattr(loaded.config, "token_merging")


def test_a_checkpoint_with_a_broken_config_raises_with_the_nearest_name(model, processor, tmp_path):
    model.config.token_merging = {"version": 1, "rato": 0.9}
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no field 'rato'; the nearest is 'ratio'"):
        load(str(tmp_path))


def test_merging_loads_unmerged_where_transformers_loads_it(model, processor, tmp_path):
    with merge_tokens(model, MergeConfig(tokens=5), processor):
        model.save_pretrained(tmp_path)
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 48, 48)
    assert torch.equal(features(plain, {"pixel_values": pixels}), features(model, {"pixel_values": pixels}))
    assert AutoConfig.from_pretrained(tmp_path).token_merging["tokens"] == 5
