"""`llava-pitome draw`: the file and the text that it writes, and what it refuses before a model is loaded."""

import argparse

import pytest
import torch
from conftest import make_model, make_processor
from PIL import Image

from llava_pitome import METHODS, MergeConfig
from llava_pitome.cli.draw.configs import amount_in_own_place, method_configs, shown_layers
from llava_pitome.cli.main import main
from llava_pitome.models import checkpoints

PROMPT = "<image> what is this"


@pytest.fixture
def image_file(tmp_path, pictures):
    pictures[1].resize((90, 60)).save(tmp_path / "image.jpg")
    return str(tmp_path / "image.jpg")


@pytest.fixture
def draw(capsys, tmp_path):
    """Runs the command, writes to o.png, and returns its text."""

    def run(image, *words):
        words = words if "-o" in words else [*words, "-o", tmp_path / "o.png"]
        capsys.readouterr()  # deepspeed writes a line when it is imported, which saving a model does
        assert main(["draw", image, *map(str, words)]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys, monkeypatch):
    """Runs a command that ends with 2 before a model is loaded, and returns its error."""

    def run(*words):
        monkeypatch.setattr(checkpoints, "load", lambda *_, **__: pytest.fail("a model was loaded"))
        try:
            status = main(["draw", *map(str, words)])
        except SystemExit as stop:  # argparse
            status = stop.code
        assert status == 2
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    "ending, file_format", [(".png", "PNG"), (".jpg", "JPEG"), (".jpeg", "JPEG"), (".webp", "WEBP")]
)
def test_a_figure_is_written_and_its_token_counts(ending, file_format, draw, image_file, saved, tmp_path):
    file = tmp_path / f"out{ending}"
    text = draw(image_file, "--model", saved, "--ratio", "0.8", "--layers", "7,1", "-o", file)
    assert text.endswith(f"pitome, ratio 0.8: 36 patches, after layer 1 29, after layer 7 9\n{file}\n")
    with Image.open(file) as figure:
        assert figure.format == file_format and figure.width > 3 * 200 and figure.height > 2 * 200


@pytest.mark.parametrize(
    "words, counts",
    [
        ([], "layer 2 24, after layer 4 16, after layer 6 11, after layer 7 9\n"),
        (["--depths", "0,0.5"], "layer 1 29, after layer 2 24, after layer 3 20, after layer 4 16\n"),
    ],
)
def test_by_default_four_layers_are_shown_up_to_the_last_that_merges(words, counts, draw, image_file, saved):
    assert counts in draw(image_file, "--model", saved, "--ratio", "0.8", *words)


def test_several_methods_share_one_model_and_run_once_each(draw, image_file, saved, monkeypatch):
    loads, runs, load, encode = [], [], checkpoints.load, torch.nn.Conv2d.forward
    monkeypatch.setattr(checkpoints, "load", lambda *a, **o: loads.append(a) or load(*a, **o))
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda *a: runs.append(1) or encode(*a))
    text = draw(image_file, "--model", saved, "--method", "pitome,tome,random")
    assert [line.split(",")[0] for line in text.splitlines()[:3]] == ["pitome", "tome", "random"]
    assert (len(loads), len(runs)) == (1, 3)


def test_every_method_is_drawn_in_its_own_place(draw, image_file, saved):
    words = ["--tokens", 9, "--question", PROMPT, "--energy", "all", "--layers", 7, "--size", 72]
    text = draw(image_file, "--model", saved, *words, "--method", ",".join(METHODS))
    lines = text.splitlines()
    assert len(lines) == len(METHODS) + 1
    where = {"tower": "9 tokens:", "prefix": "9 tokens at the prefix:", "decoder": "9 tokens in the LLM:"}
    for (name, method), line in zip(METHODS.items(), lines):
        assert line.startswith(f"{name}, {where[method.places[0]]}")
        assert line.endswith("in the LLM, decoder 1 9")


def test_a_checkpoint_saved_with_a_config_is_drawn_with_it(draw, image_file, tmp_path):
    model, processor = make_model(), make_processor()
    model.config.token_merging = MergeConfig(ratio=0.7, method="tome").to_dict()
    model.save_pretrained(tmp_path / "merging")
    processor.save_pretrained(tmp_path / "merging")
    model = ["--model", tmp_path / "merging"]
    assert draw(image_file, *model).startswith("tome (as saved), ratio 0.7: 36 patches")
    assert draw(image_file, "--method", "random", *model).startswith("random, ratio 0.9: 36 patches")
    assert draw(image_file, "--prefix", "9", *model).startswith("pitome, 9 tokens at the prefix: 36 patches")


def test_scenes_need_no_file(draw, saved, tmp_path):
    figures = []
    for name in ("embedded", "embedded:3", "embedded:3"):
        draw(name, "--model", saved)
        figures.append((tmp_path / "o.png").read_bytes())
    assert figures[0] != figures[1] == figures[2]


def test_the_embedded_model_is_drawn(draw):
    text = draw("embedded", "--recipe", "best", "--tokens", 20)
    assert text.startswith("pitome (best), 20 tokens: 196 patches, ") and "to the LLM 20\n" in text


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--ratio", "1.5"], "'1.5' is not allowed: it must be a number in (0, 1]"),
        (["--ratio", "0.9", "--tokens", "5"], "give ratio or tokens, and not both"),
        (["--tokens", "500"], "allowed is 1 to 36"),
        (["--method", "pitme"], "the nearest is 'pitome'"),
        (["--method", "tome,tome"], "one of them is given twice"),
        (["--layers", "8"], "--layers 8 is not allowed: features are read after layer 7, so"),
        (["--layers", "0"], "whole numbers from 1"),
        (["--recipe", "released", "--method", "tome"], "method 'tome' defines no order"),
        (["--merging", "[]"], "'[]' is not allowed: it must be a JSON object"),
        (["--merging", '{"methd": "tome"}'], "MergeConfig has no field 'methd'; the nearest is 'method'"),
        (["--merging", '{"method": "x"}'], "method='x' is unknown"),
        (["--merging", '{"ratio": 0.5}', "--ratio", "0.5"], "ratio is given in merging and beside it"),
        (["--merging", '{"prefix": 9}', "--method", "fastv"], "method 'fastv' cannot merge in the prefix"),
        (["--prefix", "9", "--method", "fastv"], "method 'fastv' cannot merge in the prefix"),
        (["--method", "fastv", "--question", " "], "--question ' ' is not allowed: fastv"),
        (["--ratio", "0.5,0.5"], "ratio holds 2 shares; the tower has 7 layers"),
        (["--size", "9"], "a whole number from 64 to 1024"),
        (["--energy", "some"], "'some' is not allowed: it must be own | all | none"),
        (["--device", "tpu"], "--device tpu is not available; allowed are cpu"),
        (["--output", "out.gif"], "--output out.gif must end in one of .png, .jpg, .jpeg, .webp"),
        (["--output", "nowhere/out.png"], "there is no folder nowhere"),
        (["--model", "/nowhere"], "is neither a folder with a model"),
    ],
)  # fmt: skip
def test_options_that_are_not_allowed_are_refused_before_a_model_is_loaded(
    words, reason, refused, image_file, saved, tmp_path
):
    assert reason in refused(image_file, "--model", saved, "--output", tmp_path / "o.png", *words)
    assert not (tmp_path / "o.png").exists()


@pytest.mark.parametrize(
    "name, reason",
    [
        ("missing.png", "missing.png does not exist"), (__file__, "is no image"),
        ("embedded:x", "embedded:x is no embedded scene"), ("embedded:", "embedded: is no embedded scene"),
    ],
)  # fmt: skip
def test_images_that_cannot_be_opened_are_refused_before_a_model_is_loaded(name, reason, refused, saved):
    assert reason in refused(name, "--model", saved)


def test_an_output_that_exists_is_kept_by_a_refused_command(refused, image_file, saved, tmp_path):
    (tmp_path / "o.png").write_bytes(b"content")
    (tmp_path / "folder.png").mkdir()
    refused(image_file, "--model", saved, "--tokens", 99, "-o", tmp_path / "o.png")
    assert (tmp_path / "o.png").read_bytes() == b"content"
    assert "is a folder; it must be a file" in refused(image_file, "-o", tmp_path / "folder.png")


def test_layers_are_chosen_by_the_method_that_merges_last():
    early, late = MergeConfig(ratio=0.9, depths=(0, 0.3)), MergeConfig(ratio=0.9)
    for wanted, configs, expected in (
        (None, [early], [2, 4, 6, 7]), (None, [early, late], [6, 12, 18, 23]),
        (None, [MergeConfig(prefix=64)], []), ((23, 6, 6), [late], [6, 23]),
    ):  # fmt: skip
        assert shown_layers(wanted, dict(enumerate(configs)), 576, 23) == expected


def test_one_ratio_leaves_the_same_tokens_in_every_place():
    options = argparse.Namespace(
        ratio=0.9, tokens=None, recipe="paper", merging=None, method=["pitome", "grid", "fastv"], model=""
    )
    assert method_configs(options, 576, 23) == {
        "pitome": MergeConfig(ratio=0.9),
        "grid": MergeConfig(method="grid", prefix=54),
        "fastv": MergeConfig(method="fastv", decoder={1: 54}),
    }
    one = MergeConfig(method="grid", **amount_in_own_place("grid", {"ratio": None, "tokens": 1}, 576, 23))
    assert one.tokens_at(576, 23) == 1
