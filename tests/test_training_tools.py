"""Around a training run: what launchers hand over, tables of runs, the bench."""

import json
import subprocess
import sys

import pytest
from training_runs import ALONE, ROOT

sys.path.insert(0, str(ROOT / "train"))

import bench
import compare
import launch


@pytest.mark.parametrize(
    ("environment", "options", "why"),
    [
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "0"}, {"processes": 2}, "processes=2, but 4 were launched"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "say zero=2 or zero=3 as well"),
        ({"ACCELERATE_USE_FSDP": "true"}, {"zero": "2"}, "told to use FSDP"),
    ],
)
def test_a_launcher_that_wants_something_else_is_an_error(monkeypatch, environment, options, why):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match=why):
        launch.check({"processes": 1, "zero": None} | options)


def test_a_launcher_settles_the_number_of_processes(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    options = {"processes": 1, "zero": None}
    launch.check(options)
    assert options["processes"] == 4
    assert launch.without_rank(["--local_rank=0", "ratio=0.8"]) == ["ratio=0.8"]
    monkeypatch.delenv("LOCAL_RANK")
    assert launch.without_rank(["--local_rank=0"]) == ["--local_rank=0"]  # to be refused


def measured(tokens, before, after):
    return {"tokens": tokens, "before": {"mean": before}, "after": {"mean": after}}


def test_runs_stand_side_by_side_with_what_each_measured(tmp_path):
    runs = {"one": [measured(196, 93, 93.2), measured(20, 63.84, 90.04)], "two": [measured(39, 71.2, 92)]}
    for name, accuracy in runs.items():
        (tmp_path / name).mkdir()
        facts = {"steps": 1000, "seconds": 725.0, "accuracy": accuracy}
        (tmp_path / name / "training.json").write_text(json.dumps(facts))
    assert compare.table({name: compare.read(tmp_path / name) for name in runs}).splitlines() == [
        "| run | steps | minutes | 196 tokens | 39 tokens | 20 tokens |",
        "| --- | --- | --- | --- | --- | --- |",
        "| one | 1000 | 12 | 93.0 → 93.2 |  | 63.8 → 90.0 |",
        "| two | 1000 | 12 |  | 71.2 → 92.0 |  |",
    ]


def test_runs_without_accuracy_are_errors(tmp_path, capsys):
    (tmp_path / "training.json").write_text('{"accuracy": []}')
    for folders, why in (
        ([], "name the folders"),
        ([str(tmp_path)], "trained without evaluate=true"),
        ([str(tmp_path / "none")], "holds no training.json"),
    ):
        assert compare.main(folders) == 2
        assert why in capsys.readouterr().err


def test_speed_ups_are_medians_of_turns():
    sides = {
        "unmerged": {"step_seconds": [2.0, 3.0, 2.0], "bytes_before": [1e9] * 3, "bytes_most": [4e9] * 3},
        "20": {"step_seconds": [1.0, 1.0, 0.5], "bytes_before": [1e9] * 3, "bytes_most": [1.5e9, 2e9, 1.6e9]},
    }
    assert bench.table(sides).splitlines()[2:] == [
        "| unmerged | 2.00 | 1.00 | 4.00 | 3.00 |",
        "| 20 | 1.00 | 3.00 | 1.60 | 0.60 |",
    ]


def test_the_bench_trains_every_side_in_turns(tmp_path):
    words = ["tokens=20", "rounds=2", "steps=3", "scenes=8", "batch_size=2", f"output={tmp_path}"]
    command = [sys.executable, str(ROOT / "train" / "bench.py"), *words]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=ALONE)
    assert ran.returncode == 0, ran.stderr
    told = [line for line in ran.stderr.splitlines() if line.startswith("turn")]
    assert [line.split(": ")[1] for line in told] == ["unmerged", "20"] * 2
    found = json.loads((tmp_path / "bench.json").read_text())
    for side in found["sides"].values():
        assert all(len(numbers) == 2 and min(numbers) > 0 for numbers in side.values())
        assert all(a > b for a, b in zip(side["bytes_most"], side["bytes_before"]))
    assert bench.table(found["sides"]) == ran.stdout.strip() == (tmp_path / "bench.md").read_text().strip()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["rounds=0"], "rounds='0' is not allowed"),
        (["max_steps=5"], "unknown key 'max_steps'"),
        (["zero=3", "quantization=4bit"], "zero=3 divides weights"),
    ],
)
def test_bad_words_of_the_bench_are_errors(capsys, words, why):
    assert bench.main(words) == 2
    assert why in capsys.readouterr().err
