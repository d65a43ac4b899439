"""Commands with an adapter that does not say how it merged: refused, and loaded where options say it."""

import io
import sys

import pytest
import torch

from llava_pitome import MergeConfig, load
from llava_pitome.api import applied
from llava_pitome.cli.main import main

SILENT = "does not say how it merged"


@pytest.fixture(scope="module")
def silent(tmp_path_factory):
    """An adapter of the embedded model, saved while it did not merge."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    model, _ = load("embedded")
    get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj")).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "words",
    [["chat"], ["draw", "embedded"], ["serve", "--port", "0"], ["web", "--port", "0"]],
    ids=lambda words: words[0],
)
def test_a_command_refuses_it(silent, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert main([*words, "--model", silent]) == 2
    assert SILENT in capsys.readouterr().err


@pytest.mark.parametrize("ratio", ["1.0", "0.9"])
def test_a_command_loads_it_with_a_ratio(silent, ratio, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes or no?\n"))
    words = ["--model", silent, "--ratio", ratio]
    assert main(["chat", *words, "--max-new-tokens", "2"]) == 0
    assert main(["draw", "embedded", *words, "-o", str(tmp_path / "o.png")]) == 0
    assert (tmp_path / "o.png").exists()


def test_eval_refuses_it_unless_options_say_how_to_merge(silent):
    from eval.run import OPTIONS, merge_config
    from llava_pitome.cli.options import parse

    with pytest.raises(ValueError, match=SILENT):
        merge_config(parse([f"model={silent}"], OPTIONS))
    for word, config in (
        ("ratio=1.0", MergeConfig(ratio=1.0)),
        ("tokens=20", MergeConfig(tokens=20)),
        ('merging={"prefix": 9}', MergeConfig(prefix=9)),
        ("recipe=best", MergeConfig.recipe("best", ratio=0.9)),
    ):
        assert merge_config(parse([f"model={silent}", word], OPTIONS)) == config


@pytest.mark.parametrize("options, expected", [({}, None), ({"ratio": 0.9}, MergeConfig(ratio=0.9))])
def test_lmms_eval_merges_as_its_options_say(silent, options, expected):
    from llava_pitome.integrations.lmms_eval import LlavaPitome

    model = LlavaPitome(silent, **options)
    assert applied(model.model) == expected


def test_vllm_refuses_every_adapter(silent):
    from llava_pitome.integrations.vllm import serve_command

    with pytest.raises(ValueError, match="is an adapter; merge it into its base model"):
        serve_command._config(silent)


def test_an_adapter_merged_into_its_base_is_a_checkpoint(silent, tmp_path):
    model, processor = load(silent, MergeConfig(ratio=1.0))
    model.merge_and_unload().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    plain, _ = load(str(tmp_path))
    assert applied(plain) == MergeConfig(ratio=1.0)
    expected = load("embedded")[0].state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in plain.state_dict().items())
