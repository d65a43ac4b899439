"""The measured results in the repository: the bars they are held to, and the pages that quote them."""

import argparse
import csv
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "eval"))
import ablate  # noqa: E402
import tables  # noqa: E402
import throughput  # noqa: E402
from rows import Row  # noqa: E402

from llava_pitome.cli.bench import command  # noqa: E402
from llava_pitome.cli.bench.summary import brief, summarise  # noqa: E402
from llava_pitome.cli.options import parse  # noqa: E402
from llava_pitome.methods import METHODS as REGISTERED  # noqa: E402
from train import bench, compare, options  # noqa: E402

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


def swept() -> list[Row]:
    """The rows of the sweep in the repository, as far as its short table needs them."""
    with (RESULTS / "sweep/report.csv").open() as file:
        return [
            Row(
                row["name"], row["method"], row["place"], int(row["tokens"]) if row["tokens"] else None,
                int(row["seeds"]), None, int(row["image_tokens"]), float(row["llm_tokens"]),
                float(row["score"]), {},
            )
            for row in csv.DictReader(file)
        ]  # fmt: skip


SWEPT = swept()


def score(method: str, place: str, tokens: int | None) -> float:
    (row,) = (r for r in SWEPT if (r.method, r.place, r.tokens) == (method, place, tokens))
    return row.score


def test_the_table_of_accuracies_is_the_measured_one():
    assert tables.markdown(*tables.brief(SWEPT)) in ACCURACY


SHOWN = ("best:tome", "best", "sparsevlm", "tome", "pitome", "random", "resize")  # in the README


def test_the_readmes_accuracies_are_those_of_some_rows():
    assert tables.markdown(*tables.brief([row for row in SWEPT if row.method in SHOWN])) in README
    assert f"seven of {len(tables.brief(SWEPT)[1])} methods" in README
    unmerged = f"{score('unmerged', '', None):.1f}"
    assert f"which reaches {unmerged} unmerged" in README and f"the model reaches {unmerged};" in ACCURACY


def test_pitome_is_behind_tome_and_ahead_of_random_and_smaller_pictures_as_the_pages_say():
    paper, tome, lot = ([score(name, "tower", n) for n in TOKENS] for name in ("pitome", "tome", "random"))
    small = [score("resize", "input", n) for n in TOKENS]
    behind = [f"{b - a:.1f}" for a, b in zip(paper, tome)]
    assert f"behind ToMe, by {', '.join(behind[:-1])} and {behind[-1]} points" in ACCURACY
    assert all(a < b and a > max(c, d) for a, b, c, d in zip(paper, tome, lot, small))


def test_the_report_in_the_repository_is_whole():
    report = (RESULTS / "sweep/report.md").read_text()
    assert "questions: all" in report and "WITHOUT RESULTS" not in report and "OTHER CODE" not in report
    assert "Timed in turns" in report
    assert tables.markdown(*tables.brief(SWEPT)) in report


def test_every_method_was_measured_in_its_own_place_at_every_number_of_tokens():
    for method in (*PEERS, "pitome", "best", "released", "resize"):
        found = {row.tokens for row in SWEPT if row.method == method and row.at_home}
        assert found == set(TOKENS), method


def test_the_questions_alone_give_little_away():
    blank = json.loads((RESULTS / "blank.json").read_text())["rows"]
    assert len(blank) == 1 and blank[0]["samples"] == 3072
    assert blank[0]["accuracy"]["mean"] <= 50
    assert f"{blank[0]['accuracy']['mean']:.1f} ± {blank[0]['accuracy']['stderr']:.1f}" in ACCURACY


def test_the_unmerged_model_meets_its_bar():
    assert score("unmerged", "", None) >= 90


@pytest.mark.parametrize("method", ["pitome", "tome", "random"])
def test_merging_has_something_to_lose(method):
    """Were the curve flat, the benchmark could not tell methods apart."""
    assert score(method, "tower", 98) - score(method, "tower", 20) > 3


def test_the_ablations_in_the_documents_are_the_measured_ones():
    assert ablate.tabulate(ABLATIONS["rows"]) in METHODS
    assert {row["change"]: row["config"] for row in ABLATIONS["rows"]} == {
        name: json.loads(json.dumps(change))
        for changes in ablate.ROWS.values()
        for name, change in changes.items()
    }


SPEED = {file.stem: json.loads(file.read_text()) for file in (RESULTS / "speed").glob("*.json")}


@pytest.mark.parametrize("name", SPEED)
def test_the_speeds_in_the_documents_are_the_measured_ones(name):
    assert brief(summarise(SPEED[name]["rows"])) in PERFORMANCE


def test_the_readmes_speeds_are_those_of_some_rows():
    told = ("dense", *(f"{ratio}, own attention" for ratio in (0.975, 0.95, 0.9)))
    assert brief(summarise([row for row in SPEED["llava-7b"]["rows"] if row["side"] in told])) in README


def timings() -> list[dict]:
    """The options of every bench command on the page on performance, the machine's own left out."""
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
        command._complete(options)
        found.append({key: value for key, value in vars(options).items() if key not in own})
    return found


@pytest.mark.parametrize("name", SPEED)
def test_a_command_that_times_what_was_timed_stands_on_the_page(name):
    taken = SPEED[name]["options"]
    assert any(all(taken[key] == value for key, value in told.items()) for told in timings())


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


RUNS = {name: compare.read(RESULTS / "adapters" / name) for name in (
    "best-tower-distilled", "best-tower-plain", "paper-distilled", "paper-plain",
)}  # fmt: skip


def test_what_training_won_stands_in_the_documents():
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


def told(script: str) -> list[dict]:
    """What the commands on the page on training say to a script of train."""
    code = TRAINING.replace("\\\n", "")
    found = re.findall(
        rf"^\.venv/bin/python {script}( .*)?$|`\.venv/bin/python {script}( [^`]*)?`", code, re.M
    )
    return [dict(word.split("=", 1) for word in shlex.split("".join(groups))) for groups in found]


def test_the_commands_on_the_page_are_those_of_the_plain_runs():
    commands = {Path(words.pop("output")).name: words for words in told("-m train.run")}
    assert set(commands) == {name for name in RUNS if name.endswith("plain")}
    for name, words in commands.items():
        for key, text in words.items():
            assert options.OPTIONS[key].read(text) == made(RUNS[name]["options"][key]), (name, key)


def test_the_commands_on_the_page_are_those_of_the_timed_steps():
    for words in told("-m train.bench"):
        name = f"steps-{words.get('model', 'embedded')}"
        found = parse([f"{key}={text}" for key, text in words.items()], bench.OPTIONS)
        found.pop("output")
        assert found == {key: made(STEPS[name]["options"][key]) for key in found}
    assert len(told("-m train.bench")) == len(STEPS)


def made(value):
    """A value as options hold it, from JSON."""
    return tuple(value) if isinstance(value, list) else value


def before_and_after(run: str, tokens: int) -> tuple[float, float]:
    (row,) = (row for row in RUNS[run]["accuracy"] if row["tokens"] == tokens)
    return row["before"]["mean"], row["after"]["mean"]


@pytest.mark.parametrize("run", ["best-tower-distilled", "best-tower-plain"])
def test_training_wins_back_what_merging_in_the_tower_loses(run):
    plain, trained = before_and_after(run, 196)
    assert trained >= plain
    assert before_and_after(run, 39)[1] >= 0.99 * plain
    merged, won = before_and_after(run, 20)
    assert won - merged >= 0.75 * (plain - merged)


STEPS = {path.stem: json.loads(path.read_text()) for path in (RESULTS / "adapters").glob("steps-*.json")}


@pytest.mark.parametrize("name", STEPS)
def test_times_of_training_steps_in_the_documents_are_the_measured_ones_and_merging_is_faster(name):
    assert bench.table(STEPS[name]["sides"]) in TRAINING
    plain, *merged = STEPS[name]["sides"].values()
    for side in merged:
        assert max(side["step_seconds"]) < min(plain["step_seconds"])
        assert max(side["bytes_most"]) < min(plain["bytes_most"])


def test_small_and_real_shapes_were_timed_in_training():
    assert set(STEPS) == {"steps-embedded", "steps-llava-7b-2layer"}


def test_the_throughput_under_vllm_is_the_measured_one():
    found = json.loads((RESULTS / "throughput-vllm.json").read_text())
    page = (ROOT / "docs/serving_vllm.md").read_text()
    assert throughput.table(found["rows"]) in page
    assert found["machine"]["processor"] in page
    assert {row["concurrency"] for row in found["rows"]} == {1, 8, 32}
    assert {row["answer_tokens"] for row in found["rows"]} == {found["options"]["new_tokens"]}


def test_no_result_names_a_path_of_the_machine_that_it_was_made_on():
    for file in RESULTS.rglob("*.json"):
        assert not re.search(r'"/[a-z]+/', file.read_text()), file
