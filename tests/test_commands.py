"""The command line: lazy imports, exit statuses, and the options that select a model."""

import argparse
import subprocess
import sys

import pytest

from llava_pitome import MergeConfig
from llava_pitome.cli.main import COMMANDS, main
from llava_pitome.cli.options import add_flags, merge_config, merge_options


def parsed(*words):
    from llava_pitome.cli.model_options import MODEL_OPTIONS

    parser = argparse.ArgumentParser()
    add_flags(parser, MODEL_OPTIONS | merge_options())
    return parser.parse_args(words)


def test_the_list_of_commands_imports_none_of_them():
    script = "import sys; from llava_pitome.cli.main import main; import atexit; atexit.register(lambda: " \
        "print(*(m for m in sys.modules if m.startswith('llava_pitome.cli')))); main(['--help'])"  # fmt: skip
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert all(
        f"  {name} " in shown and command.help in " ".join(shown.split())
        for name, command in COMMANDS.items()
    )
    assert shown.splitlines()[-1].split() == ["llava_pitome.cli", "llava_pitome.cli.main"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0 and f"usage: llava-pitome {name}" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["paint"], ["--paint"]])
def test_an_unknown_command_is_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and "usage: llava-pitome" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, status, message",
    [
        (KeyboardInterrupt(), 130, ""),
        (ValueError("ratio=2"), 2, "llava-pitome convert: ratio=2\n"),
        (
            ModuleNotFoundError(name="peft"),
            2,
            "needs peft, which is not installed: pip install 'llava-pitome[peft]'",
        ),
        (
            ModuleNotFoundError(name="PIL"),
            2,
            "needs PIL, which is not installed: pip install 'llava-pitome[models]'",
        ),
    ],
)
def test_a_command_that_fails_ends_with_a_status_and_no_traceback(
    error, status, message, monkeypatch, capsys
):
    def fails(_options):
        raise error

    monkeypatch.setattr("llava_pitome.cli.convert.run", fails)
    assert main(["convert", "a", "b"]) == status
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown


def test_a_missing_package_of_a_command_names_its_extra(monkeypatch, capsys):
    for name in ("matplotlib", "matplotlib.axes", "llava_pitome.cli.draw.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "llava_pitome.cli.draw.figure")
    monkeypatch.delattr("llava_pitome.cli.draw.figure", raising=False)
    assert main(["draw", "embedded"]) == 2
    assert "needs matplotlib" in (shown := capsys.readouterr().err) and "llava-pitome[bench]" in shown


@pytest.mark.parametrize("words", [["--dtype", "float32", "new"], ["new", "--dtype", "float32"]])
def test_flags_of_convert_may_stand_anywhere(words, capsys):
    assert main(["convert", "/not/there", *words]) == 2
    assert "/not/there" in capsys.readouterr().err


def test_devices_and_dtypes_are_checked_before_a_model_is_loaded(monkeypatch):
    import torch

    from llava_pitome.cli.model_options import check_model

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in ("cpu", "cuda", "cuda:0", "cuda:1"):
        check_model(parsed("--device", device))
    check_model(parsed("--dtype", "float16"))
    with pytest.raises(ValueError, match="cuda:2 is not available; allowed are cpu, cuda, cuda:0, cuda:1"):
        check_model(parsed("--device", "cuda:2"))
    with pytest.raises(ValueError, match="float16 is hundreds of times slower"):
        check_model(parsed("--dtype", "float16", "--device", "cpu"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="--device cuda is not available; allowed are cpu"):
        check_model(parsed("--device", "cuda"))


def test_four_bits_without_bitsandbytes_are_refused(monkeypatch):
    from llava_pitome.cli import model_options

    monkeypatch.setattr(model_options, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"bitsandbytes.*llava-pitome\[quantization\]"):
        model_options.check_model(parsed("--load-4bit"))


def test_the_selected_model_is_loaded(saved):
    import torch

    from llava_pitome.cli.model_options import load

    options = parsed("--model", str(saved), "--dtype", "bfloat16", "--device", "cpu", "--ratio", "0.8")
    model, processor = load(options, merge_config(vars(options)))
    assert (model.dtype, model.device) == (torch.bfloat16, torch.device("cpu"))
    assert model.config.token_merging == MergeConfig(ratio=0.8).to_dict()
    assert processor.tokenizer.padding_side == "left"
