"""The measured results in the repository: the bars they are held to, and the README that quotes them."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "eval"))
import curve  # noqa: E402

from llava_pitome.bench.summary import brief, summarise  # noqa: E402

MEASURED = json.loads((ROOT / "eval/results/curve.json").read_text())["points"]
README = (ROOT / "README.md").read_text()


def test_the_readmes_table_is_the_measured_one():
    assert curve.tabulate(MEASURED) in README
    assert curve.cell(MEASURED[curve.BLANK]) in README


def test_every_point_was_measured_on_all_questions():
    assert len(MEASURED) == 2 + len(curve.METHODS) * len(curve.RATIOS)
    assert {row["samples"] for row in MEASURED.values()} == {3072}


def test_methods_are_compared_at_equal_token_counts():
    for ratio in curve.RATIOS:
        assert len({MEASURED[curve.point(m, ratio)]["image_tokens"] for m in curve.METHODS}) == 1


def test_the_questions_alone_give_little_away():
    assert MEASURED[curve.BLANK]["accuracy"]["mean"] <= 50


def test_the_unmerged_model_meets_its_bar():
    assert MEASURED[curve.UNMERGED]["accuracy"]["mean"] >= 90


@pytest.mark.parametrize("method", curve.METHODS)
def test_merging_has_something_to_lose(method):
    """Were the curve flat, the benchmark could not tell methods apart."""
    accuracy = [MEASURED[curve.point(method, r)]["accuracy"]["mean"] for r in (0.975, 0.8)]
    assert accuracy[0] - accuracy[1] > 3


SPEED = {file.stem: json.loads(file.read_text()) for file in (ROOT / "eval/results/speed").glob("*.json")}


@pytest.mark.parametrize("name", SPEED)
def test_the_speeds_in_readme_and_docs_are_the_measured_ones(name):
    assert brief(summarise(SPEED[name]["rows"])) in README + (ROOT / "docs/performance.md").read_text()


def test_towers_and_whole_models_were_timed():
    assert set(SPEED) >= {"tower", "llava-7b", "llava-7b-batches", "patches"}
    assert all(found["machine"]["processor"] and found["packages"]["torch"] for found in SPEED.values())


@pytest.mark.parametrize("name", SPEED)
def test_every_side_was_timed_as_often_as_the_dense_one(name):
    rows = SPEED[name]["rows"]
    assert all(
        len(taken) == SPEED[name]["options"]["rounds"] for r in rows for taken in r["seconds"].values()
    )
    assert {r["batch"] for r in rows} == set(SPEED[name]["options"]["batch"])
