"""Drawing images that are cut into tiles, and videos."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_tiled_chat import film, make  # noqa: F401  # film is a fixture

from llava_pitome import MergeConfig
from llava_pitome.cli.draw import panels
from llava_pitome.cli.draw.configs import amount_in_own_place
from llava_pitome.cli.draw.heat import heat
from llava_pitome.cli.draw.overlay import BLANK, HATCH, PADDING, Outside, overlay, plain
from llava_pitome.cli.main import main
from llava_pitome.embedded.render import render
from llava_pitome.embedded.scenes import scene
from llava_pitome.models import hf_llava
from llava_pitome.models.image_counts import counts_of
from llava_pitome.tracing import trace_image

STEP = 16
SIZE = (120, 70)  # height and width


def picture():
    return Image.fromarray(render(scene(5))).resize(SIZE[::-1])


@pytest.fixture
def saved(tmp_path):
    """A function that saves a model of a kind; returns its folder and its token counts."""

    def save(kind, config=None):
        model, processor = make(kind, config)
        model.save_pretrained(tmp_path / kind)
        processor.save_pretrained(tmp_path / kind)
        picture().save(tmp_path / "a.png")
        return str(tmp_path / kind), counts_of(hf_llava.find(model))

    return save


def draw(capsys, *words):
    assert main(["draw", *map(str, words)]) == 0, capsys.readouterr().err
    lines = capsys.readouterr().out.splitlines(keepends=True)
    return "".join(
        line for line in lines if not line.startswith("[")
    )  # what DeepSpeed logs when it is imported


@pytest.mark.parametrize("kind", ["next-vicuna", "next-video", "onevision-odd"])
@pytest.mark.parametrize(
    "words, config",
    [
        (["--tokens", "60"], MergeConfig(tokens=60)),
        (["--ratio", "0.8"], MergeConfig(ratio=0.8)),
        (["--tokens-per-tile", "9", "--newlines", "none"], MergeConfig(tokens_per_tile=9, newlines="none")),
        ([], MergeConfig(ratio=0.9)),
    ],
)
def test_the_counts_are_those_of_the_image(kind, words, config, saved, tmp_path, capsys):
    folder, counts = saved(kind)
    out = draw(capsys, tmp_path / "a.png", "--model", folder, *words, "-o", tmp_path / "b.png", "--size", 96)
    tokens = counts.images(config, [SIZE])[0]
    layout = counts.tiling.image(*SIZE)
    newlines = 0 if config.newlines == "none" else layout.regions[1].num_newlines
    patches = sum(region.window.area for region in layout.regions)
    assert out.startswith(f"pitome, {panels.describe(config)}: {patches} patches, after layer ")
    if newlines:
        assert f", to the LLM {tokens}, of which {newlines} newlines\n" in out
    assert min(Image.open(tmp_path / "b.png").size) > 96


def test_a_saved_config_is_drawn(saved, tmp_path, capsys):
    folder, _ = saved("next-llama3", MergeConfig(tokens=70, method="tome"))
    out = draw(capsys, tmp_path / "a.png", "--model", folder, "-o", tmp_path / "b.png", "--size", 64)
    assert out.startswith("tome (as saved), 70 tokens: ") and ", to the LLM 70, " in out


@pytest.mark.parametrize("method", ["visionzip", "fastv", "divprune"])
@pytest.mark.parametrize("amount", [["--ratio", "0.9"], ["--tokens", "64"]])
def test_methods_of_other_places_keep_as_much(method, amount, saved, tmp_path, capsys):
    folder, _ = saved("next-mistral")
    out = draw(
        capsys, tmp_path / "a.png", "--model", folder, "--method", method, *amount, "-o", tmp_path / "b.png",
        "--question", "what is this", "--size", 64,
    )  # fmt: skip
    where = "in the LLM, decoder 1 " if method == "fastv" else "to the LLM "
    if amount[0] == "--tokens":
        assert f"{where}64" in out
    else:
        assert where in out


def test_amounts_in_other_places():
    assert amount_in_own_place("visionzip", {"tokens": 640}, 576, 23, True) == {"prefix": 640}
    share = MergeConfig(ratio=0.9).tokens_at(576, 23) / 576
    assert amount_in_own_place("visionzip", {"ratio": 0.9}, 576, 23, True) == {"prefix": share}
    assert amount_in_own_place("fastv", {"ratio": 0.9}, 576, 23, True) == {"decoder": {1: share}}
    assert amount_in_own_place("pitome", {"ratio": 0.9}, 576, 23, True) == {"ratio": 0.9}


@pytest.mark.parametrize("kind", ["next-video", "onevision"])
def test_the_frames_of_a_video_are_drawn(kind, film, saved, tmp_path, capsys):  # noqa: F811
    folder, counts = saved(kind)
    words = ["--model", folder, "--frames", 5, "-o", tmp_path / "b.png", "--size", 96]
    out = draw(capsys, film, *words, "--tokens-per-frame", 3, "--temporal", "true")
    tokens = counts.videos(MergeConfig(tokens_per_frame=3, temporal=True), [5])[0]
    assert out.startswith("pitome, 3 tokens a frame: 180 patches, ") and f"to the LLM {tokens}" in out
    assert Image.open(tmp_path / "b.png").width > 96


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--tokens", "3"], "tokens=3 does not fit: this image has "),
        (["--tokens", "9999"], "tokens=9999 does not fit: this image has "),
        (["--temporal", "true", "--ratio", "0.9"], "temporal=True is not allowed"),
        (["--resize", "3x4"], "resize=(3, 4) does not fit"),
        (["--layers", "7"], "--layers 7 is not allowed"),
    ],
)
def test_what_does_not_fit_is_refused(words, reason, saved, tmp_path, capsys):
    folder, _ = saved("next-vicuna")
    files = [str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png")]
    assert main(["draw", *files, "--model", folder, *words]) == 2
    assert reason in capsys.readouterr().err


def test_frames_need_a_model_that_takes_videos(film, saved, capsys):  # noqa: F811
    assert main(["draw", str(film), "--model", saved("next-vicuna")[0], "--frames", "3"]) == 2
    assert "--frames is not allowed with --model" in capsys.readouterr().err


def outside(cells=6):
    """The last cell is blank, the one before shows padding."""
    order = torch.arange(cells)
    return Outside(order == cells - 2, order == cells - 1)


@pytest.mark.parametrize("form", ["plain", "overlay", "heat"])
def test_padding_is_hatched_and_blank_cells_are_white(form):
    image = Image.new("RGB", (6 * STEP, STEP), (200, 30, 30))
    slot = torch.tensor([0, 0, 1, 2, -1, -1])
    if form == "plain":
        made = plain(image, STEP, (1, 6), outside())
    elif form == "overlay":
        made = overlay(image, slot, STEP, (1, 6), None, outside())
    else:
        values = torch.tensor([0.0, 0.0, 0.5, 1.0, float("nan"), float("nan")])
        made = heat(values, slot, STEP, (1, 6), None, outside())
    pixels = np.asarray(made).reshape(STEP, 6, STEP, 3)
    inside = pixels[:, 4, 3:]
    assert {tuple(c) for c in inside.reshape(-1, 3)} == {PADDING, HATCH}
    assert (pixels[:, 5] == BLANK).all()  # without a line between the two
    assert not (pixels[:, 2, 3:-3] == BLANK).all()


def test_captions_count_newlines_apart():
    model, processor = make("next-llama3")
    config = MergeConfig(tokens=60)
    traced = trace_image(model, processor, picture(), config)
    point = panels.Point("to the LLM", "prefix", 0)
    assert (
        panels.tokens(traced, point, 96).caption
        == f"{60 - traced.newlines} tokens, {traced.newlines} newlines"
    )
    assert panels.PADDING in panels.legend([traced], [])
