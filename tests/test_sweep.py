"""Sweeps and recipes as a user runs them: real runs through lmms-eval, killed and resumed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval import recipe
from eval.command import ROOT, child_environment
from eval.sweep import __main__ as sweep
from eval.sweep import processes
from eval.sweep.combinations import combinations, place_fields, rectangle
from llava_pitome import METHODS, MergeConfig
from llava_pitome.cli.options import parse
from llava_pitome.embedded import dataset

QUESTIONS = 12
NAMES = ["unmerged", "pitome-tower-39", "pitome-decoder-1-39", "fastv-decoder-1-39", "resize-input-39"]
RESULT = {"options": {"tokens": 39, "output": "elsewhere"}, "fingerprint": "f"}


def words(output: Path) -> list[str]:
    return ["methods=paper,fastv,resize", "places=tower,decoder:1", "tokens=39", "rounds=1", "dtype=float32",
            f"output={output}", f"data={output.parent / 'mine'}"]  # fmt: skip


def finished_times(output: Path) -> dict[str, float]:
    """When each combination's results, and the timing, were written."""
    files = [*output.glob("*/results.json"), *output.glob("timing.json")]
    return {p.parent.name: p.stat().st_mtime for p in files}


def first_row(output: Path, name: str) -> dict:
    return json.loads((output / name / "results.json").read_text())["rows"][0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A sweep that was killed when part of it was finished, and resumed."""
    output = tmp_path_factory.mktemp("sweep") / "output"
    dataset.write(output.parent / "mine", pictures=QUESTIONS // dataset.EACH)
    command = [sys.executable, "-m", "eval.sweep", *words(output)]
    process = subprocess.Popen(
        command, env=child_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and process.poll() is None and not finished_times(output):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = finished_times(output)
    assert before and not (output / "timing.json").exists()
    ran = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert before.items() <= finished_times(output).items()  # not run again
    assert f"{len(NAMES)} were finished before" not in ran.stdout
    (output / "stdout.txt").write_text(ran.stdout)
    return output


def test_a_killed_sweep_resumes_and_every_combination_runs_once(finished):
    listed = json.loads((finished / "sweep.json").read_text())["combinations"]
    assert [c["name"] for c in listed if not c["skipped"]] == NAMES
    for c in (c for c in listed if not c["skipped"]):
        row = first_row(finished, c["folder"])
        assert row["merging"] == c["config"] and row["samples"] == QUESTIONS
        journals = (finished / c["folder"]).glob("cache/journals/*")
        entries = [json.loads(line) for f in journals for line in f.read_text().splitlines() if line]
        assert QUESTIONS <= sum(e.get("samples", 0) for e in entries) <= 2 * QUESTIONS
    printed = (finished / "stdout.txt").read_text()
    assert "skipped fastv in tower at 39 tokens: not defined there: fastv fits decoder" in printed
    assert "left" in printed


def test_rows_hold_the_tokens_of_the_language_model_and_its_layers(finished):
    rows = {name: first_row(finished, name) for name in NAMES}
    assert {name: (row["image_tokens"], row["llm_tokens"]) for name, row in rows.items()} == {
        "unmerged": (196, 196), "pitome-tower-39": (39, 39), "pitome-decoder-1-39": (196, 117.5),
        "fastv-decoder-1-39": (196, 117.5), "resize-input-39": (36, 36),
    }  # fmt: skip
    assert rows["fastv-decoder-1-39"]["llm_gflops"] < rows["unmerged"]["llm_gflops"]
    assert rows["pitome-decoder-1-39"]["model"] == "pitome (paper), 39 at LLM layer 1, dtype float32"
    assert rows["resize-input-39"]["model"] == "unmerged, resized to 6 x 6, dtype float32"


def test_answers_hold_their_image_and_the_true_answer(finished):
    (file,) = (finished / "unmerged" / "answers").iterdir()
    for line in map(json.loads, file.read_text().splitlines()):
        assert line["image_id"] == line["question_id"] // 1000
        assert line["multiple_choice_answer"]


def test_a_finished_sweep_runs_nothing_again(finished, capsys):
    before = finished_times(finished)
    assert sweep.main(words(finished)) == 0
    assert f"0 to run ({len(NAMES)} were finished before)" in capsys.readouterr().out
    assert finished_times(finished) == before


def test_all_combinations_are_timed_in_one_run(finished):
    timed = json.loads((finished / "timing.json").read_text())
    assert [row["side"] for row in timed["rows"]] == NAMES
    for row in timed["rows"]:
        parts = ("tower", "projector", "llm", "prefill", "answer of 4")
        assert all(row["median"][part][1] > 0 for part in parts) and row["peak_bytes"] > 0
    cache = {row["side"]: row["kv_cache_bytes"] for row in timed["rows"]}
    assert cache["pitome-tower-39"] < cache["pitome-decoder-1-39"] < cache["unmerged"]
    row = first_row(finished, "unmerged")
    assert timed["options"]["text"] == row["prompt_tokens"] - row["image_tokens"]


def test_a_sweep_can_be_reported(finished, tmp_path):
    from eval.report.__main__ import main

    assert main([f"input={finished}", f"output={tmp_path}", "draws=200", "examples=1"]) == 0
    page = (tmp_path / "report.html").read_text()
    for text in ("fastv", "resize", "PiToMe", "prefill, ms", "for the embedded benchmark only"):
        assert text in page


def job(folder: Path, name: str, code: str, options: dict | None = None) -> processes.Job:
    known = processes.identity(options or RESULT["options"], "f")
    return processes.Job(name, ("-c", code), folder / name / "results.json", known)


def test_a_failed_process_is_reported_with_its_log_and_the_others_finish(tmp_path):
    write = f"open({str(tmp_path / 'good' / 'results.json')!r}, 'w').write({json.dumps(RESULT)!r})"
    bad = "import sys; sys.exit('Loading: 10%\\rthis is why it failed')"
    jobs = [job(tmp_path, "bad", bad), job(tmp_path, "good", write), job(tmp_path, "silent", write)]
    failed = processes.run_jobs(jobs, [{}, {}])
    assert sorted(failed) == ["bad", "silent"]
    assert failed["bad"].startswith("exit status 1") and "this is why it failed" in failed["bad"]
    assert "Loading" not in failed["bad"]
    assert "of other code, data or options" in failed["silent"]
    assert jobs[1].is_finished


def test_each_process_has_one_gpu_or_its_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(processes.os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert processes.environments(None) == [{"OMP_NUM_THREADS": "1"}] * 8
    assert processes.environments(2) == [{"OMP_NUM_THREADS": "4"}] * 2
    monkeypatch.setattr(processes.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(processes.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert processes.environments(None) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert processes.environments(1) == [{"CUDA_VISIBLE_DEVICES": "5"}]
    with pytest.raises(ValueError, match="jobs=3 is not allowed: there are 2 GPUs"):
        processes.environments(3)


def test_results_of_other_options_or_code_do_not_count_as_finished(tmp_path):
    (tmp_path / "x").mkdir()
    jobs = [job(tmp_path, "x", "", options) for options in ({"tokens": 39, "output": "here"}, {"tokens": 40})]
    jobs.append(jobs[0]._replace(identity=processes.identity(RESULT["options"], "g")))
    jobs[0].result.write_text(json.dumps(RESULT))
    assert [j.is_finished for j in jobs] == [True, False, False]
    jobs[0].result.write_text('{"options": {')
    assert not jobs[0].is_finished


def test_a_process_that_outlives_its_sweep_is_awaited_and_not_run_twice(tmp_path):
    """The process holds the lock, not the sweep that started it."""
    count, result = tmp_path / "count", tmp_path / "slow" / "results.json"
    slow = (
        f"import time\nopen({str(count)!r}, 'a').write('x')\ntime.sleep(2)\n"
        f"open({str(result)!r}, 'w').write({json.dumps(RESULT)!r})\n"
    )
    start = (
        "import pathlib, sys; from eval.sweep.processes import Job, identity, run_jobs\n"
        "job = Job('slow', ('-c', sys.argv[1]), pathlib.Path(sys.argv[2]), identity({'tokens': 39}, 'f'))\n"
        "print(run_jobs([job], [{}]))\n"
    )
    command = [sys.executable, "-c", start, slow, str(result)]
    first = subprocess.Popen(command, env=child_environment(), stdout=subprocess.DEVNULL)
    while not count.exists():
        time.sleep(0.05)
    first.kill()
    first.wait()
    second = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=True)
    assert second.stdout.strip().endswith("{}")
    assert count.read_text() == "x"


def test_a_dry_run_prints_tokens_and_flops_and_writes_nothing(tmp_path, capsys):
    output = tmp_path / "out"
    assert sweep.main(["dry_run=true", f"output={output}", "tokens=98", "seeds=0,1", "text=24"]) == 0
    printed = capsys.readouterr().out
    assert "24 text tokens" in printed
    for name in ("unmerged", "pitome-tower-98", "tofu-tower-prefix-98", "random-decoder-1-98-seed1",
                 "resize-input-98"):  # fmt: skip
        assert printed.count(f" {name} ") == 1
    assert "skipped grid in tower at 98 tokens: not defined there: grid fits prefix and decoder" in printed
    assert not output.exists()


def test_the_embedded_questions_are_written_once_for_all(tmp_path):
    options = parse(["tokens=39", "methods=paper", "places=tower", f"output={tmp_path}"], sweep.OPTIONS)
    plans = [run.plan for run in sweep.make_runs(options, tmp_path)]
    (folder,) = {plan.embedded_folder for plan in plans}
    assert folder.parent == tmp_path / "cache"
    assert len({plan.output for plan in plans}) == len(plans) == 2


def combine(**changes) -> list:
    defaults = {"methods": ["paper"], "places": ["tower"], "tokens": [39], "seeds": [0], "patches": 196}
    return combinations(**defaults | changes)


def test_configs_merge_in_their_places():
    found = combine(places=["tower", "prefix", "tower+prefix", "decoder:2"], methods=["tome"])
    assert [c.config for c in found] == [
        None,
        MergeConfig(tokens=39, method="tome"),
        MergeConfig(prefix=39, method="tome"),
        MergeConfig(tokens=39, prefix_share=0.5, method="tome"),
        MergeConfig(decoder={2: 39}, method="tome"),
    ]


def test_every_combination_exists_once_and_random_ones_once_per_seed():
    found = {c.name: c for c in combine(methods=["paper", "pitome", "random"], seeds=[0, 4])}
    assert list(found) == [
        "unmerged", "pitome-tower-39", "random-tower-39-seed0", "random-tower-39-seed4"
    ]  # fmt: skip
    assert found["random-tower-39-seed4"].config.parameters == {"seed": 4}


def test_a_method_with_a_place_of_its_own_runs_there_alone():
    found = combine(methods=["tome", "best@tower+prefix", "best:tome@decoder:2"], places=["prefix"])
    assert [(c.method, c.place) for c in found[1:]] == [
        ("tome", "prefix"), ("best", "tower+prefix"), ("best:tome", "decoder:2")
    ]  # fmt: skip


def test_recipes_keep_their_settings():
    assert combine(methods=["released"])[1].config == MergeConfig.recipe("released", tokens=39)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", ["tower", "prefix", "tower+prefix", "decoder:1"])
def test_a_method_runs_in_a_place_or_is_skipped_with_a_reason(method, place):
    *_, found = combine(methods=[method], places=[place])
    kinds = {part.partition(":")[0] for part in place.split("+")}
    assert bool(found.config) == (kinds <= set(METHODS[method].places)) == (found.skipped is None)


def test_the_rectangle_of_smaller_images_is_nearly_square_and_never_larger():
    for tokens in range(1, 600):
        rows, columns = rectangle(tokens)
        assert rows * columns <= tokens and 0 <= columns - rows <= 1
    assert [rectangle(n) for n in (98, 59, 39, 20)] == [(9, 10), (7, 8), (6, 6), (4, 5)]


def test_fields_of_a_place_keep_as_many_tokens():
    for place in ("tower", "prefix", "tower+prefix"):
        assert MergeConfig(**place_fields(place, 39)).tokens_at(196, 11) == 39
    assert MergeConfig(**place_fields("decoder:1", 39)).llm_lengths(196, 4) == (196, 196, 39, 39, 39)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("methods=pitomee", "method 'pitomee' is unknown; the nearest is 'pitome'"),
        ("places=towr", "place 'towr' is unknown; the nearest is 'tower'"),
        ("methods=best@towr", "place 'towr' is unknown; the nearest is 'tower'"),
        ("places=decoder", "place 'decoder' is unknown; the nearest is 'decoder:K'"),
        ("places=decoder:7", "decoder names layer 7; the language model has 4 layers"),
        ("tokens=197", "tokens=197 does not fit: there are 196 patches, allowed is 1 to 195"),
        ("tokens=39,39", "tokens='39,39' is not allowed"),
        ("seeds=-1", "seeds='-1' is not allowed"),
        ("token=39", "did you mean 'tokens'?"),
        ("model=/nowhere", "neither a folder with a model nor a model on the hub"),
        ("tasks=gqa", "tasks=gqa needs data=hub"),
    ],
)
def test_bad_words_are_errors_before_anything_runs(bad, message, capsys, tmp_path):
    assert sweep.main([f"output={tmp_path / 'out'}", bad]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sweep: ") and message in error
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_an_error(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert sweep.main([f"output={tmp_path / 'file'}"]) == 2
    assert "is not allowed; allowed: a folder, not a file" in capsys.readouterr().err


@pytest.fixture(scope="module")
def dry_runs(tmp_path_factory) -> dict[str, dict[str, tuple[float, float]]]:
    """Tokens at the LLM and over its layers by recipe and run, from dry runs without network or hub cache."""
    folder = tmp_path_factory.mktemp("dry")
    code = "import sys; from eval.recipe import main; [main([f, 'dry_run=true']) for f in sys.argv[1:]]"
    files = [str(ROOT / "eval" / "recipes" / f"{name}.txt") for name in ("table3", "field")]
    environment = child_environment({"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "COLUMNS": "160"})
    ran = subprocess.run(
        [sys.executable, "-c", code, *files],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert not list(folder.glob("output*"))
    names, (_, *parts) = ("table3-7b", "table3-13b", "field"), ran.stdout.split("are those built in")
    assert len(parts) == len(names)  # each table names the source of its shapes
    found = {}
    for name, part in zip(names, parts):
        lines = [line.split("│") for line in part.splitlines() if line.startswith("│")]
        found[name] = {line[1].strip(): (float(line[2]), float(line[3])) for line in lines}
    return found


def test_the_papers_table_runs_dry_without_weights_or_network(dry_runs):
    small, large = dry_runs["table3-7b"], dry_runs["table3-13b"]
    assert small.pop("unmerged") == large.pop("unmerged") == (576, 576)
    assert set(small) == {"pitome", "pitome-released", "tome", "tofu", "dct", "diffrate", "random"}
    assert set(large) == {"pitome", "pitome-released", "tome"}
    assert set(small.values()) == {(54, 54)} and set(large.values()) == {(101, 101)}


def test_the_table_of_peers_runs_dry_without_weights_or_network(dry_runs):
    counts = dry_runs["field"]
    assert counts["unmerged"] == (576, 576)
    for tokens in (192, 128, 64):
        for method in ("pitome", "tome", "random", "grid", "visionzip", "prumerge", "divprune"):
            assert counts[f"{method}-{tokens}"] == (tokens, tokens)
        assert counts[f"fastv-{tokens}"] == (576, (2 * 576 + 30 * tokens) / 32)
        assert counts[f"sparsevlm-{tokens}"][0] == 576
        assert counts[f"sparsevlm-{tokens}"][1] == pytest.approx(tokens, rel=0.04)


def write_recipe(folder: Path, text: str) -> Path:
    (folder / "mine.txt").write_text(text)
    return folder / "mine.txt"


def test_a_recipe_lists_its_runs_as_a_sweep_does(tmp_path):
    text = (
        "# a comment\nevery model=embedded limit=3\nname=a/plain ratio=1\nname=a/one tokens=39\n"
        'name=b/two decoder=1:0.5 method=fastv merging=\'{"site": "block"}\' budget=77\n'
    )
    folders = recipe.make_runs(write_recipe(tmp_path, text), ["limit=6"], False, tmp_path / "out")
    assert [folder.name for folder in folders] == ["a", "b"]
    plain, one = (run.combination for run in folders[tmp_path / "out" / "a"])
    assert (plain.method, plain.config) == ("unmerged", None)
    assert (one.method, one.place, one.tokens, one.config) == ("pitome", "tower", 39, MergeConfig(tokens=39))
    (two,) = folders[tmp_path / "out" / "b"]
    assert two.combination[:4] == ("two", "fastv", "decoder:1", 77)
    assert two.plan.options["limit"] == 6 and two.combination.config.site == "block"


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("model=embedded tokens=39\n", [], "line 1: name=FOLDER is missing"),
        ("\nname=a model=embedded token=39\n", [], "line 2: unknown key 'token' (did you mean 'tokens'?)"),
        ("name=a model=embedded tokens=1\nname=a model=embedded tokens=2\n", [], "line 2: "),
        ("name=a model=embedded decoder=1:x\n", [], "decoder='1:x' is not allowed"),
        ("# nothing\n", [], "holds no runs"),
        ("name=a model=embedded tokens=39\n", ["limt=3"], "did you mean 'limit'?"),
    ],
)
def test_a_bad_recipe_is_an_error_that_names_the_line(text, more, message, tmp_path, capsys):
    assert recipe.main([str(write_recipe(tmp_path, text)), *more, f"output={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("recipe: ") and message in error
    assert not (tmp_path / "out").exists()


def test_a_missing_recipe_is_an_error_that_lists_those_that_exist(capsys, tmp_path):
    assert recipe.main([str(tmp_path / "nothing.txt")]) == 2
    assert "table3.txt" in capsys.readouterr().err
