"""How commands are told a model and how to merge."""

import argparse

import pytest
import torch

from llava_pitome import MergeConfig
from llava_pitome.cli import model_options as commands
from llava_pitome.cli.main import main


def parsed(*words, several=False):
    parser = argparse.ArgumentParser()
    commands.describe_model(parser)
    commands.describe_merging(parser, several)
    return parser.parse_args(words)


def test_the_options_make_the_config():
    assert commands.config(parsed()) is None
    assert commands.config(parsed("--ratio", "0.9")) == MergeConfig(ratio=0.9)
    assert commands.config(parsed("--ratio", "0.9,0.8")) == MergeConfig(ratio=(0.9, 0.8))
    further = parsed("--tokens", "64", "--method", "tome", "--merging", '{"prefix_share": 0.5}')
    assert commands.config(further) == MergeConfig(tokens=64, method="tome", prefix_share=0.5)
    best = parsed("--recipe", "best", "--tokens", "20")
    assert commands.config(best) == MergeConfig.recipe("best", tokens=20)


@pytest.mark.parametrize(
    "words", [("--method", "tome"), ("--recipe", "best"), ("--merging", '{"site": "block"}')]
)
def test_how_without_how_far_raises(words):
    with pytest.raises(ValueError, match="says how to merge but not how far: give one of ratio, tokens"):
        commands.config(parsed(*words))


def test_what_is_said_twice_raises():
    with pytest.raises(ValueError, match="method, ratio stands in merging and beside it; give it once"):
        requested("paper", {"ratio": 0.9, "method": "tome"}, {"ratio": 0.9, "method": "tome"})
    assert requested("paper", {"ratio": None}, {"ratio": 0.9}) == MergeConfig(ratio=0.9)
    assert requested("paper", {}, None) is None


def test_several_methods_are_read_where_several_are_wanted(capsys):
    assert parsed("--method", "tome, pitome", several=True).method == ["tome", "pitome"]
    with pytest.raises(SystemExit):
        parsed("--method", "tome,pitome")
    assert "'tome,pitome' is no method; the nearest is" in capsys.readouterr().err


def test_devices_and_dtypes_are_checked_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in ("cpu", "cuda", "cuda:0", "cuda:1"):
        commands.check_model(parsed("--device", device))
    with pytest.raises(ValueError, match="cuda:2 is not there; allowed are cpu, cuda, cuda:0, cuda:1"):
        commands.check_model(parsed("--device", "cuda:2"))
    commands.check_model(parsed("--dtype", "float16"))
    with pytest.raises(ValueError, match="float16 is hundreds of times slower"):
        commands.check_model(parsed("--dtype", "float16", "--device", "cpu"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="--device cuda is not there; allowed are cpu"):
        commands.check_model(parsed("--device", "cuda"))


def test_the_model_is_loaded_as_it_is_asked_for(saved):
    options = parsed("--model", str(saved), "--dtype", "bfloat16", "--device", "cpu", "--ratio", "0.8")
    model, processor = commands.load(options, commands.config(options))
    assert (model.dtype, model.device) == (torch.bfloat16, torch.device("cpu"))
    assert model.config.token_merging == MergeConfig(ratio=0.8).to_dict()
    assert processor.tokenizer.padding_side == "left"


def test_who_interrupts_a_command_is_not_shown_a_traceback(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("llava_pitome.cli.model_options.load", interrupted)
    assert main(["serve", "--port", "0"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_four_bits_without_their_package_are_refused_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr(commands, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"bitsandbytes.*llava-pitome\[quantization\]"):
        commands.check_model(parsed("--load-4bit"))
