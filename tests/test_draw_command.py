"""`llava-pitome draw`: what it writes, what it says, and what it refuses before a model is loaded."""

import argparse

import pytest
import torch
from conftest import make_model, make_processor
from PIL import Image

from llava_pitome import METHODS, MergeConfig
from llava_pitome.cli.draw.choices import configs, layers
from llava_pitome.cli.main import main
from llava_pitome.models import checkpoints

PROMPT = "<image> what is this"


@pytest.fixture
def photo(tmp_path, pictures):
    pictures[1].resize((90, 60)).save(tmp_path / "photo.jpg")
    return str(tmp_path / "photo.jpg")


@pytest.fixture
def no_model(monkeypatch):
    """Fails where a model is loaded."""

    def load(*_args, **_options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(checkpoints, "load", load)


def draw(capsys, *words):
    assert main(["draw", *map(str, words)]) == 0
    return capsys.readouterr().out


def refused(capsys, *words):
    """What is said where the command ends with 2."""
    try:
        code = main(["draw", *map(str, words)])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    return capsys.readouterr().err


def test_a_sheet_is_written_and_the_tokens_are_told(capsys, photo, saved, tmp_path):
    out = tmp_path / "out.png"
    said = draw(capsys, photo, "--model", saved, "--ratio", "0.8", "--layers", "7,1", "-o", out)
    assert said.endswith(f"pitome, ratio 0.8: 36 patches, behind layer 1 29, behind layer 7 9\n{out}\n")
    with Image.open(out) as sheet:
        assert sheet.format == "PNG" and sheet.width > 3 * 200 and sheet.height > 2 * 200


def test_without_layers_it_looks_at_four_up_to_the_last_that_merges(capsys, photo, saved, tmp_path):
    where = ["--model", saved, "-o", tmp_path / "out.png"]
    assert "layer 2 24, behind layer 4 16, behind layer 6 11, behind layer 7 9" in draw(
        capsys, photo, "--ratio", "0.8", *where
    )
    half = ["--merging", '{"depths": [0.0, 0.5]}', "--ratio", "0.8"]
    assert "behind layer 1 29, behind layer 2 24, behind layer 3 20, behind layer 4 16\n" in draw(
        capsys, photo, *half, *where
    )


def test_several_methods_share_one_model_and_each_runs_once(capsys, photo, saved, tmp_path, monkeypatch):
    loads, runs, load, encode = [], [], checkpoints.load, torch.nn.Conv2d.forward
    monkeypatch.setattr(checkpoints, "load", lambda *a, **o: loads.append(a) or load(*a, **o))
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda *a: runs.append(1) or encode(*a))
    said = draw(capsys, photo, "--model", saved, "--method", "pitome,tome,random", "-o", tmp_path / "o.webp")
    assert [line.split(",")[0] for line in said.splitlines()[:3]] == ["pitome", "tome", "random"]
    assert (len(loads), len(runs)) == (1, 3)
    with Image.open(tmp_path / "o.webp") as sheet:
        assert sheet.format == "WEBP"


def test_every_method_is_drawn_where_its_authors_merge(capsys, photo, saved, tmp_path):
    words = [
        "--model",
        saved,
        "--tokens",
        9,
        "--question",
        PROMPT,
        "--energy",
        "all",
        "--layers",
        7,
        "--size",
        72,
    ]
    said = draw(capsys, photo, *words, "--method", ",".join(METHODS), "-o", tmp_path / "o.png")
    lines = said.splitlines()
    assert len(lines) == len(METHODS) + 1
    for (name, method), line in zip(METHODS.items(), lines):
        where = {"tower": "9 tokens:", "prefix": "9 tokens at the prefix:", "decoder": "9 tokens in the LLM:"}
        assert line.startswith(f"{name}, {where[method.places[0]]}")
        assert line.endswith("in the LLM, decoder 1 9")


def test_a_checkpoint_that_was_saved_merging_is_drawn_as_it_merges(capsys, photo, tmp_path):
    model, processor = make_model(), make_processor()
    model.config.token_merging = MergeConfig(ratio=0.7, method="tome").to_dict()
    model.save_pretrained(tmp_path / "merging")
    processor.save_pretrained(tmp_path / "merging")
    where = ["--model", tmp_path / "merging", "-o", tmp_path / "o.png"]
    assert draw(capsys, photo, *where).startswith("tome (as saved), ratio 0.7: 36 patches")
    assert draw(capsys, photo, "--method", "random", *where).startswith("random, ratio 0.9: 36 patches")


def test_scenes_need_no_file(capsys, saved, tmp_path):
    sheets = []
    for name in ("embedded", "embedded:3", "embedded:3"):
        draw(capsys, name, "--model", saved, "-o", tmp_path / "o.png")
        sheets.append((tmp_path / "o.png").read_bytes())
    assert sheets[0] != sheets[1] == sheets[2]


def test_the_trained_model_is_drawn_too(capsys, tmp_path):
    said = draw(capsys, "embedded", "--recipe", "best", "--tokens", 20, "-o", tmp_path / "o.jpg")
    assert said.startswith("pitome (best), 20 tokens: 196 patches, ") and "to the LLM 20\n" in said


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--ratio", "1.5"], "'1.5' is not allowed: it must be a number in (0, 1]"),
        (["--ratio", "0.9", "--tokens", "5"], "give ratio or tokens, and not both"),
        (["--tokens", "500"], "allowed is 1 to 36"),
        (["--method", "pitme"], "'pitme' is no method; the nearest is 'pitome'"),
        (["--method", "tome,tome"], "names a method twice"),
        (["--layers", "8"], "--layers 8 is not allowed: features are read behind layer 7, so"),
        (["--layers", "0"], "whole numbers from 1"),
        (["--recipe", "released", "--method", "tome"], "method 'tome' defines no order"),
        (["--merging", "[]"], "'[]' is not allowed: it must be a JSON object"),
        (["--merging", '{"methd": "tome"}'], "MergeConfig has no field 'methd'; the nearest is 'method'"),
        (["--merging", '{"method": "x"}'], "method='x' is unknown"),
        (["--merging", '{"ratio": 0.5}', "--ratio", "0.5"], "ratio stands in merging and beside it"),
        (["--merging", '{"prefix": 9}', "--method", "fastv"], "method 'fastv' cannot merge in the prefix"),
        (["--method", "fastv", "--question", " "], "--question ' ' is not allowed: fastv"),
        (["--ratio", "0.5,0.5"], "ratio holds 2 shares; the tower has 7 layers"),
        (["--size", "9"], "a whole number from 64 to 1024"),
        (["--device", "tpu"], "--device tpu is not there; allowed are cpu"),
        (["--output", "out.gif"], "--output out.gif must end in one of .png, .jpg, .jpeg, .webp"),
        (["--output", "nowhere/out.png"], "there is no folder nowhere"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_a_model_is_loaded(
    words, reason, capsys, photo, saved, no_model, tmp_path
):
    given = words if "--output" in words else [*words, "--output", tmp_path / "o.png"]
    assert reason in refused(capsys, photo, "--model", saved, *given)
    assert not (tmp_path / "o.png").exists()


@pytest.mark.parametrize(
    "named, reason",
    [
        ("missing.png", "missing.png is not there"),
        ("embedded:x", "embedded:x is no embedded scene"),
        ("embedded:", "embedded: is no embedded scene"),
        (__file__, "is no picture"),
    ],
)
def test_pictures_that_cannot_be_opened_are_refused_before_a_model_is_loaded(
    named, reason, capsys, saved, no_model
):
    assert reason in refused(capsys, named, "--model", saved)


def test_a_model_that_is_not_there_is_refused(capsys, photo, no_model, tmp_path):
    assert "is neither a folder with a model" in refused(
        capsys, photo, "--model", tmp_path / "nothing", "-o", tmp_path / "o.png"
    )


def test_a_folder_that_ends_like_a_picture_is_no_output(capsys, photo, saved, no_model, tmp_path):
    (tmp_path / "folder.png").mkdir()
    assert "is a folder; it must be a file" in refused(
        capsys, photo, "--model", saved, "-o", tmp_path / "folder.png"
    )


def test_an_output_that_was_there_is_kept_where_the_command_is_refused(capsys, photo, saved, tmp_path):
    (tmp_path / "o.png").write_bytes(b"precious")
    refused(capsys, photo, "--model", saved, "--tokens", 99, "-o", tmp_path / "o.png")
    assert (tmp_path / "o.png").read_bytes() == b"precious"


def test_layers_are_chosen_by_the_method_that_merges_last():
    early, late = MergeConfig(ratio=0.9, depths=(0, 0.3)), MergeConfig(ratio=0.9)
    assert layers(None, {"a": early}, 576, 23) == [2, 4, 6, 7]
    assert layers(None, {"a": early, "b": late}, 576, 23) == [6, 12, 18, 23]
    assert layers(None, {"a": MergeConfig(prefix=64)}, 576, 23) == []
    assert layers((23, 6, 6), {"a": late}, 576, 23) == [6, 23]


def test_how_far_is_said_once_for_every_place():
    options = argparse.Namespace(
        ratio=0.9, tokens=None, recipe="paper", merging=None, method=["pitome", "grid", "fastv"], model=""
    )
    found = configs(options, 576, 23)
    assert found == {
        "pitome": MergeConfig(ratio=0.9),
        "grid": MergeConfig(method="grid", prefix=54),
        "fastv": MergeConfig(method="fastv", decoder={1: 54}),
    }
