"""The committed results: their lower bounds, and the documents that quote them."""

import argparse
import csv
import json
import re
import shlex
from pathlib import Path

import pytest

from eval import ablate, throughput
from eval.report import tables
from eval.report.rows import Row
from llava_pitome.cli.bench import command
from llava_pitome.cli.bench.report import short_table, summarise
from llava_pitome.cli.options import parse
from llava_pitome.methods import METHODS as REGISTERED
from train import bench, compare, options

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "eval/results"
README, METHODS, ACCURACY, PERFORMANCE, TRAINING = (
    (ROOT / page).read_text()
    for page in (
        "README.md",
        *(f"docs/{name}.md" for name in ("methods", "accuracy", "performance", "training")),
    )
)
PEERS = [name for name in REGISTERED if name != "pitome"]
ABLATIONS = json.loads((RESULTS / "ablations.json").read_text())
TOKENS = (98, 59, 39, 20)  # of 196: 50, 70, 80 and 90 % of them go


def sweep_rows() -> list[Row]:
    """The rows of the committed sweep, as far as its short table needs them."""
    with (RESULTS / "sweep/report.csv").open() as file:
        return [
            Row(
                row["name"], row["method"], row["place"], int(row["tokens"]) if row["tokens"] else None,
                int(row["seeds"]), None, int(row["image_tokens"]), float(row["llm_tokens"]),
                float(row["score"]), {},
            )
            for row in csv.DictReader(file)
        ]  # fmt: skip


SWEEP = sweep_rows()


def score(method: str, place: str, tokens: int | None) -> float:
    (row,) = (r for r in SWEEP if (r.method, r.place, r.tokens) == (method, place, tokens))
    return row.score


def test_the_table_of_accuracies_is_the_measured_one():
    assert tables.markdown(tables.short_table(SWEEP)) in ACCURACY


SHOWN = ("best:tome", "best", "sparsevlm", "tome", "pitome", "random", "resize")  # in the README


def test_the_readmes_accuracies_are_measured_ones():
    assert tables.markdown(tables.short_table([row for row in SWEEP if row.method in SHOWN])) in README
    assert f"seven of {len(tables.short_table(SWEEP))} methods" in README
    unmerged = f"{score('unmerged', '', None):.1f}"
    assert f"which reaches {unmerged} unmerged" in README and f"the model reaches {unmerged};" in ACCURACY


def test_pitome_is_behind_tome_and_ahead_of_random_and_smaller_images():
    paper, tome, random = ([score(name, "tower", n) for n in TOKENS] for name in ("pitome", "tome", "random"))
    small = [score("resize", "input", n) for n in TOKENS]
    worse = [f"{b - a:.1f}" for a, b in zip(paper, tome)]
    assert f"worse than ToMe, by {', '.join(worse[:-1])} and {worse[-1]} points" in ACCURACY
    assert all(a < b and a > max(c, d) for a, b, c, d in zip(paper, tome, random, small))


def test_the_committed_report_isfill_defaults():
    report = (RESULTS / "sweep/report.md").read_text()
    assert "questions: all" in report and "WITHOUT RESULTS" not in report and "OTHER CODE" not in report
    assert "Timed interleaved" in report
    assert tables.markdown(tables.short_table(SWEEP)) in report


def test_every_method_was_evaluated_in_its_own_place_at_every_number_of_tokens():
    for method in (*PEERS, "pitome", "best", "released", "resize"):
        found = {row.tokens for row in SWEEP if row.method == method and row.is_at_home}
        assert found == set(TOKENS), method


def test_the_questions_alone_reveal_little():
    blank = json.loads((RESULTS / "blank.json").read_text())["rows"]
    assert len(blank) == 1 and blank[0]["samples"] == 3072
    assert blank[0]["accuracy"]["mean"] <= 50
    assert f"{blank[0]['accuracy']['mean']:.1f} ± {blank[0]['accuracy']['stderr']:.1f}" in ACCURACY


def test_the_unmerged_model_reaches_90_per_cent():
    assert score("unmerged", "", None) >= 90


@pytest.mark.parametrize("method", ["pitome", "tome", "random"])
def test_merging_more_tokens_costs_accuracy(method):
    """With a flat curve the benchmark could not distinguish methods."""
    assert score(method, "tower", 98) - score(method, "tower", 20) > 3


def test_the_ablations_in_the_documents_are_the_measured_ones():
    assert ablate.markdown(ABLATIONS["rows"]) in METHODS
    assert {row["change"]: row["config"] for row in ABLATIONS["rows"]} == {
        name: json.loads(json.dumps(change))
        for changes in ablate.ROWS.values()
        for name, change in changes.items()
    }


SPEED = {file.stem: json.loads(file.read_text()) for file in (RESULTS / "speed").glob("*.json")}


@pytest.mark.parametrize("name", SPEED)
def test_the_speeds_in_the_documents_are_the_measured_ones(name):
    assert short_table(summarise(SPEED[name]["rows"])) in PERFORMANCE


def test_the_readmes_speeds_are_measured_ones():
    sides = ("dense", *(f"{ratio}, own attention" for ratio in (0.975, 0.95, 0.9)))
    assert (
        short_table(summarise([row for row in SPEED["llava-7b"]["rows"] if row["side"] in sides])) in README
    )


def documented_benchmarks() -> list[dict]:
    """The options of every bench command in docs/performance.md without those of the machine."""
    parser = argparse.ArgumentParser()
    command.describe(parser.add_subparsers(), "bench")
    code = re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"```.*?```", "", PERFORMANCE, flags=re.DOTALL))
    code += [line.partition("#")[0] for line in PERFORMANCE.splitlines() if line.startswith("llava-pitome")]
    found = []
    for words in (text.split() for text in code if "llava-pitome bench" in text):
        options = parser.parse_args(words[words.index("bench") :])
        own = {"device", "threads", "output", "profile", "quick"} | (
            {"kernels"} if options.kernels is None else set()
        )
        command.fill_defaults(options)
        found.append({key: value for key, value in vars(options).items() if key not in own})
    return found


@pytest.mark.parametrize("name", SPEED)
def test_the_command_of_every_benchmark_is_documented(name):
    defaults = {key: option.default for key, option in command.OPTIONS.items()}
    taken = defaults | SPEED[name]["options"]
    assert any(all(taken[key] == value for key, value in words.items()) for words in documented_benchmarks())


def test_towers_and_complete_models_were_timed():
    assert set(SPEED) >= {"tower", "llava-7b", "llava-7b-batches", "patches"}
    assert all(found["machine"]["processor"] and found["packages"]["torch"] for found in SPEED.values())


@pytest.mark.parametrize("name", SPEED)
def test_every_side_was_timed_as_often_as_the_dense_one(name):
    rows = SPEED[name]["rows"]
    assert all(
        len(taken) == SPEED[name]["options"]["rounds"] for r in rows for taken in r["seconds"].values()
    )
    assert {r["batch"] for r in rows} == set(SPEED[name]["options"]["batch"])


RUNS = {name: compare.read(RESULTS / "adapters" / name) for name in (
    "best-tower-distilled", "best-tower-plain", "paper-distilled", "paper-plain",
)}  # fmt: skip


def test_the_accuracies_after_training_in_the_documents_are_the_measured_ones():
    assert compare.table(RUNS) in TRAINING
    assert compare.table({name: run for name, run in RUNS.items() if name.endswith("plain")}) in README


@pytest.mark.parametrize("recipe", ["best-tower", "paper"])
def test_distilled_and_plain_adapters_were_trained_alike(recipe):
    distilled, plain = (RUNS[f"{recipe}-{how}"] for how in ("distilled", "plain"))
    assert distilled["steps"] == plain["steps"] == distilled["options"]["max_steps"]
    assert distilled["options"]["distill"] and not plain["options"]["distill"]
    other = {"distill", "output", "distill_weight"}
    assert {k: v for k, v in distilled["options"].items() if k not in other} == {
        k: v for k, v in plain["options"].items() if k not in other
    }


def documented_words(script: str) -> list[dict]:
    """The key=value words of a script's commands in docs/training.md."""
    start = rf"(?:-m train\.{script}|train/{script}\.py)"
    code = TRAINING.replace("\\\n", "")
    found = re.findall(rf"^\.venv/bin/python {start}( .*)?$|`\.venv/bin/python {start}( [^`]*)?`", code, re.M)
    return [dict(word.split("=", 1) for word in shlex.split("".join(groups))) for groups in found]


def test_the_documented_commands_are_those_of_the_plain_runs():
    commands = {Path(words.pop("output")).name: words for words in documented_words("run")}
    assert set(commands) == {name for name in RUNS if name.endswith("plain")}
    for name, words in commands.items():
        for key, text in words.items():
            assert options.OPTIONS[key].read(text) == as_option(RUNS[name]["options"][key]), (name, key)


def test_the_documented_commands_are_those_of_the_timed_steps():
    for words in documented_words("bench"):
        name = f"steps-{words.get('model', 'embedded')}"
        found = parse([f"{key}={text}" for key, text in words.items()], bench.OPTIONS)
        found.pop("output")
        found["max_length"] = found["max_length"] or options.MAX_LENGTH  # where images are one tile
        assert found == {key: as_option(STEPS[name]["options"][key]) for key in found}
    assert len(documented_words("bench")) == len(STEPS)


def as_option(value):
    """A JSON value in the type of an option."""
    return tuple(value) if isinstance(value, list) else value


def before_and_after(run: str, tokens: int) -> tuple[float, float]:
    (row,) = (row for row in RUNS[run]["accuracy"] if row["tokens"] == tokens)
    return row["before"]["mean"], row["after"]["mean"]


@pytest.mark.parametrize("run", ["best-tower-distilled", "best-tower-plain"])
def test_training_recovers_the_accuracy_that_merging_in_the_tower_costs(run):
    plain, trained = before_and_after(run, 196)
    assert trained >= plain
    assert before_and_after(run, 39)[1] >= 0.99 * plain
    merged, trained = before_and_after(run, 20)
    assert trained - merged >= 0.75 * (plain - merged)


STEPS = {path.stem: json.loads(path.read_text()) for path in (RESULTS / "adapters").glob("steps-*.json")}


@pytest.mark.parametrize("name", STEPS)
def test_documented_training_steps_are_the_measured_ones_and_merging_is_faster(name):
    assert bench.table(STEPS[name]["sides"]) in TRAINING
    plain, *merged = STEPS[name]["sides"].values()
    for side in merged:
        assert max(side["step_seconds"]) < min(plain["step_seconds"])
        assert max(side["bytes_most"]) < min(plain["bytes_most"])


def test_small_and_real_shapes_were_timed_in_training():
    assert set(STEPS) == {"steps-embedded", "steps-llava-7b-2layer"}


def test_the_documented_throughput_under_vllm_is_the_measured_one():
    found = json.loads((RESULTS / "throughput-vllm.json").read_text())
    page = (ROOT / "docs/serving_vllm.md").read_text()
    assert throughput.markdown(found["rows"]) in page
    assert found["machine"]["processor"] in page
    assert {row["concurrency"] for row in found["rows"]} == {1, 8, 32}
    assert {row["answer_tokens"] for row in found["rows"]} == {found["options"]["new_tokens"]}


def test_no_result_contains_an_absolute_path():
    for file in RESULTS.rglob("*.json"):
        assert not re.search(r'"/[a-z]+/', file.read_text()), file
