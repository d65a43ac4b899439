"""Sweeps and recipes as a user runs them: real runs through lmms-eval, killed and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "eval"))

import batch  # noqa: E402
import recipe  # noqa: E402
import report  # noqa: E402
import sweep as sweep_  # noqa: E402
from combinations import amounts, every, rectangle  # noqa: E402

from llava_pitome import METHODS, MergeConfig  # noqa: E402
from llava_pitome.cli.options import parse  # noqa: E402
from llava_pitome.embedded import dataset  # noqa: E402

ASKED = 12
SWEEP = [sys.executable, str(ROOT / "eval" / "sweep.py")]
WORDS = ["methods=paper,fastv,resize", "places=tower,decoder:1", "tokens=39", "rounds=1",
         "dtype=float32"]  # fmt: skip
NAMES = ["unmerged", "pitome-tower-39", "pitome-decoder-1-39", "fastv-decoder-1-39", "resize-input-39"]


def run(output: Path, *words: str) -> subprocess.CompletedProcess:
    command = [*SWEEP, f"output={output}", f"data={output.parent / 'mine'}", *WORDS, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def finished(output: Path) -> dict[str, float]:
    """When each combination's results were written."""
    return {p.parent.name: p.stat().st_mtime for p in output.glob("*/results.json")}


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A sweep that was killed when some of it was finished, and gone on with."""
    output = tmp_path_factory.mktemp("sweep") / "output"
    dataset.write(output.parent / "mine", pictures=ASKED // dataset.EACH)
    command = [*SWEEP, f"output={output}", f"data={output.parent / 'mine'}", *WORDS]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None and not finished(output):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = finished(output)
    assert before and not (output / "timing.json").exists()
    ran = run(output)
    assert ran.returncode == 0, ran.stderr
    after = finished(output)
    assert before.items() <= after.items()  # not run again
    assert f"{len(NAMES)} were finished before" not in ran.stdout
    (output / "stdout.txt").write_text(ran.stdout)
    return output


def test_a_killed_sweep_goes_on_and_every_combination_runs_once(done):
    assert sorted(finished(done)) == sorted(NAMES)
    listed = json.loads((done / "sweep.json").read_text())["combinations"]
    assert [c["name"] for c in listed if not c["skipped"]] == NAMES
    for c in listed:
        if c["skipped"]:
            continue
        found = json.loads((done / c["folder"] / "results.json").read_text())
        (row,) = found["rows"]
        assert row["merging"] == c["config"] and row["samples"] == ASKED
        answered = [json.loads(line).get("samples", 0) for line in journal(done / c["folder"])]
        assert ASKED <= sum(answered) < 2 * ASKED + 1
    printed = (done / "stdout.txt").read_text()
    assert "skipped fastv in tower at 39 tokens: not defined there: fastv fits decoder" in printed
    assert "left" in printed


def journal(folder: Path) -> list[str]:
    return [line for f in folder.glob("cache/journals/*") for line in f.read_text().splitlines() if line]


def test_rows_say_what_reaches_the_language_model_and_its_layers(done):
    def row(name):
        return json.loads((done / name / "results.json").read_text())["rows"][0]

    assert (row("unmerged")["image_tokens"], row("unmerged")["llm_tokens"]) == (196, 196)
    assert (row("pitome-tower-39")["image_tokens"], row("pitome-tower-39")["llm_tokens"]) == (39, 39)
    assert (row("resize-input-39")["image_tokens"], row("resize-input-39")["llm_tokens"]) == (36, 36)
    assert (row("fastv-decoder-1-39")["image_tokens"], row("fastv-decoder-1-39")["llm_tokens"]) == (
        196,
        117.5,
    )
    assert row("fastv-decoder-1-39")["llm_gflops"] < row("unmerged")["llm_gflops"]
    assert row("pitome-decoder-1-39")["model"] == "pitome (paper), 39 at LLM layer 1, dtype float32"
    assert row("resize-input-39")["model"] == "unmerged, resized to 6 x 6, dtype float32"


def test_answers_know_their_picture_and_their_truth(done):
    (file,) = (done / "unmerged" / "answers").iterdir()
    for line in map(json.loads, file.read_text().splitlines()):
        assert line["image_id"] == line["question_id"] // 1000
        assert line["multiple_choice_answer"]


def test_a_finished_sweep_runs_nothing_again(done):
    before = finished(done) | {"timing": (done / "timing.json").stat().st_mtime}
    ran = run(done)
    assert ran.returncode == 0, ran.stderr
    assert f"0 to run ({len(NAMES)} were finished before)" in ran.stdout
    assert finished(done) | {"timing": (done / "timing.json").stat().st_mtime} == before


def test_all_are_timed_in_one_run(done):
    timed = json.loads((done / "timing.json").read_text())
    assert [row["side"] for row in timed["rows"]] == NAMES
    for row in timed["rows"]:
        assert all(
            row["median"][part][1] > 0 for part in ("tower", "projector", "llm", "prefill", "answer of 4")
        )
        assert row["peak_bytes"] > 0
    cached = {row["side"]: row["kv_cache_bytes"] for row in timed["rows"]}
    assert cached["pitome-tower-39"] < cached["pitome-decoder-1-39"] < cached["unmerged"]
    assert timed["options"]["text"] == _text(done)


def _text(done: Path) -> int:
    row = json.loads((done / "unmerged" / "results.json").read_text())["rows"][0]
    return row["prompt_tokens"] - row["image_tokens"]


def test_a_sweep_can_be_reported(done):
    assert report.main([f"input={done}", f"output={done.parent / 'report'}", "draws=200", "examples=1"]) == 0
    page = (done.parent / "report" / "report.html").read_text()
    for name in ("fastv", "resize", "PiToMe", "prefill, ms", "for the embedded benchmark only"):
        assert name in page


def test_a_combination_that_fails_is_told_with_its_errors_and_the_others_finish(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import sys\nsys.exit('Loading: 10%\\rthis is why it failed')\n")
    good = tmp_path / "good.py"
    good.write_text(f"open({str(tmp_path / 'good' / 'results.json')!r}, 'w').write({json.dumps(MARK)!r})\n")
    jobs = [
        batch.Job(name, (str(file),), tmp_path / name / "results.json", batch.mark(MARK["options"], "f"))
        for name, file in (("bad", bad), ("good", good), ("silent", good))
    ]
    failed = batch.run(jobs, [{}, {}])
    assert sorted(failed) == ["bad", "silent"]
    assert failed["bad"].startswith("exit status 1") and "this is why it failed" in failed["bad"]
    assert "Loading" not in failed["bad"]
    assert "not with what was asked for" in failed["silent"]
    assert jobs[1].finished


MARK = {"options": {"tokens": 39, "output": "elsewhere"}, "fingerprint": "f"}


def test_every_gpu_has_one_process_and_cores_are_shared_out(monkeypatch):
    monkeypatch.setattr(batch.os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert batch.slots(None) == [{"OMP_NUM_THREADS": "1"}] * 8
    assert batch.slots(2) == [{"OMP_NUM_THREADS": "4"}] * 2
    monkeypatch.setattr(batch.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(batch.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert batch.slots(None) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert batch.slots(1) == [{"CUDA_VISIBLE_DEVICES": "5"}]
    with pytest.raises(ValueError, match="jobs=3 is not allowed: there are 2 GPUs"):
        batch.slots(3)


def test_results_of_other_options_or_code_are_not_taken_for_finished(tmp_path):
    result = tmp_path / "results.json"
    result.write_text(json.dumps(MARK))
    found = [({"tokens": 39, "output": "here"}, "f"), ({"tokens": 40}, "f"), ({"tokens": 39}, "g")]
    assert [batch.Job("x", (), result, batch.mark(*m)).finished for m in found] == [True, False, False]
    result.write_text('{"options": {')
    assert not batch.Job("x", (), result, batch.mark(*found[0])).finished


def test_a_process_that_outlives_its_sweep_is_waited_for_and_not_run_twice(tmp_path):
    """The lock belongs to the process and not to the sweep that started it."""
    script = tmp_path / "slow.py"
    count, result = tmp_path / "count", tmp_path / "slow" / "results.json"
    script.write_text(
        f"import time\nopen({str(count)!r}, 'a').write('x')\ntime.sleep(2)\n"
        f"open({str(result)!r}, 'w').write({json.dumps(MARK)!r})\n"
    )
    start = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import batch\n"
        "mark = batch.mark({'tokens': 39}, 'f')\n"
        "print(batch.run([batch.Job('slow', (sys.argv[2],), pathlib.Path(sys.argv[3]), mark)], [{}]))\n"
    )
    command = [sys.executable, "-c", start, str(ROOT / "eval"), str(script), str(result)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not count.exists():
        time.sleep(0.05)
    first.kill()
    first.wait()
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    assert second.stdout.strip().endswith("{}")
    assert count.read_text() == "x"


def test_a_dry_run_says_tokens_and_flops_and_writes_nothing(tmp_path, capsys):
    output = tmp_path / "out"
    words = ["dry_run=true", f"output={output}", "tokens=98", "seeds=0,1", "text=24"]
    assert sweep_.main(words) == 0
    said = capsys.readouterr().out
    assert "24 further tokens" in said
    for name in (
        "unmerged",
        "pitome-tower-98",
        "tofu-tower-prefix-98",
        "random-decoder-1-98-seed1",
        "resize-input-98",
    ):
        assert said.count(f" {name} ") == 1
    assert "skipped grid in tower at 98 tokens: not defined there: grid fits prefix and decoder" in said
    assert not output.exists()


def test_the_embedded_questions_are_written_once_for_all(tmp_path):
    options = parse(["tokens=39", "methods=paper", "places=tower", f"output={tmp_path}"], sweep_.OPTIONS)
    plans = [run.plan for run in sweep_.planned_runs(options, tmp_path)]
    (folder,) = {plan.embedded_folder() for plan in plans}
    assert folder.parent == tmp_path / "cache"
    assert len({plan.output for plan in plans}) == len(plans) == 2


def every_name(**changes) -> list:
    given = {"methods": ["paper"], "places": ["tower"], "tokens": [39], "seeds": [0], "patches": 196}
    return every(**given | changes)


def test_configs_are_those_of_their_places():
    found = every_name(places=["tower", "prefix", "tower+prefix", "decoder:2"], methods=["tome"])
    assert [c.config for c in found] == [
        None,
        MergeConfig(tokens=39, method="tome"),
        MergeConfig(prefix=39, method="tome"),
        MergeConfig(tokens=39, prefix_share=0.5, method="tome"),
        MergeConfig(decoder={2: 39}, method="tome"),
    ]


def test_every_combination_is_there_once_and_draws_have_their_seeds():
    names = [c.name for c in every_name(methods=["paper", "pitome", "random"], seeds=[0, 4])]
    assert names == ["unmerged", "pitome-tower-39", "random-tower-39-seed0", "random-tower-39-seed4"]
    (drawn,) = (c for c in every_name(methods=["random"], seeds=[4]) if c.seed == 4)
    assert drawn.config.parameters == {"seed": 4}


def test_a_method_with_a_place_of_its_own_runs_there_alone():
    found = every_name(methods=["tome", "best@tower+prefix", "best:tome@decoder:2"], places=["prefix"])
    assert [(c.method, c.place) for c in found[1:]] == [
        ("tome", "prefix"), ("best", "tower+prefix"), ("best:tome", "decoder:2")
    ]  # fmt: skip


def test_recipes_keep_their_settings():
    (found,) = (c for c in every_name(methods=["released"]) if c.config)
    assert found.config == MergeConfig.recipe("released", tokens=39)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", ["tower", "prefix", "tower+prefix", "decoder:1"])
def test_a_method_runs_in_a_place_or_says_why_not(method, place):
    *_, found = every_name(methods=[method], places=[place])
    kinds = {part.partition(":")[0] for part in place.split("+")}
    assert bool(found.config) == (kinds <= set(METHODS[method].places)) == (found.skipped is None)


def test_the_control_of_smaller_pictures_is_nearly_square_and_never_larger():
    for tokens in range(1, 600):
        rows, columns = rectangle(tokens)
        assert rows * columns <= tokens and 0 <= columns - rows <= 1
    assert [rectangle(n) for n in (98, 59, 39, 20)] == [(9, 10), (7, 8), (6, 6), (4, 5)]


def test_amounts_leave_what_they_say():
    for place in ("tower", "prefix", "tower+prefix"):
        assert MergeConfig(**amounts(place, 39)).tokens_at(196, 11) == 39
    assert MergeConfig(**amounts("decoder:1", 39)).llm_lengths(196, 4) == (196, 196, 39, 39, 39)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["methods=pitomee"], "method 'pitomee' is unknown; the nearest is 'pitome'"),
        (["places=towr"], "place 'towr' is unknown; the nearest is 'tower'"),
        (["methods=best@towr"], "place 'towr' is unknown; the nearest is 'tower'"),
        (["places=decoder"], "place 'decoder' is unknown; the nearest is 'decoder:K'"),
        (["places=decoder:7"], "decoder names layer 7; the language model has 4 layers"),
        (["tokens=197"], "tokens=197 does not fit: there are 196 patches, allowed is 1 to 195"),
        (["tokens=39,39"], "tokens='39,39' is not allowed"),
        (["seeds=-1"], "seeds='-1' is not allowed"),
        (["token=39"], "did you mean 'tokens'?"),
        (["model=/nowhere"], "neither a folder with a model nor a model on the hub"),
        (["tasks=gqa"], "tasks=gqa needs data=hub"),
    ],
)
def test_bad_words_are_errors_before_anything_runs(words, said, capsys, tmp_path):
    assert sweep_.main([f"output={tmp_path / 'out'}", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("sweep: ") and said in captured.err
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_an_error(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert sweep_.main([f"output={tmp_path / 'file'}"]) == 2
    assert "is not allowed; allowed: a folder, not a file" in capsys.readouterr().err


@pytest.fixture(scope="module")
def dry(tmp_path_factory) -> dict[str, dict[str, tuple[float, float]]]:
    """Tokens at the LLM and over its layers, by recipe and run, from dry runs that see no network."""
    folder = tmp_path_factory.mktemp("dry")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import recipe\n"
        "sys.exit(max(recipe.main([file, 'dry_run=true']) for file in sys.argv[2:]))"
    )
    files = [str(ROOT / "eval" / "recipes" / f"{name}.txt") for name in ("table3", "field")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "COLUMNS": "160"}
    ran = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "eval"), *files],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert not list(folder.glob("output*"))
    told = ran.stdout.split("has the sizes written down in eval/sizes.py")
    names = ("table3-7b", "table3-13b", "field")
    assert len(told) == 1 + len(names)  # each table says so
    found = {}
    for name, part in zip(names, told[1:]):
        lines = [line.split("│") for line in part.splitlines() if line.startswith("│")]
        found[name] = {line[1].strip(): (float(line[2]), float(line[3])) for line in lines}
    return found


def test_the_papers_table_runs_dry_without_weights_or_network(dry):
    small, large = dry["table3-7b"], dry["table3-13b"]
    assert small.pop("unmerged") == large.pop("unmerged") == (576, 576)
    assert set(small) == {"pitome", "pitome-released", "tome", "tofu", "dct", "diffrate", "random"}
    assert set(large) == {"pitome", "pitome-released", "tome"}
    assert set(small.values()) == {(54, 54)} and set(large.values()) == {(101, 101)}


def test_the_fields_table_runs_dry_without_weights_or_network(dry):
    counts = dry["field"]
    assert counts["unmerged"] == (576, 576)
    for tokens in (192, 128, 64):
        for method in ("pitome", "tome", "random", "grid", "visionzip", "prumerge", "divprune"):
            assert counts[f"{method}-{tokens}"] == (tokens, tokens)
        assert counts[f"fastv-{tokens}"] == (576, (2 * 576 + 30 * tokens) / 32)
        assert counts[f"sparsevlm-{tokens}"][0] == 576
        assert counts[f"sparsevlm-{tokens}"][1] == pytest.approx(tokens, rel=0.04)


@pytest.mark.parametrize("name", ["table3", "field"])
def test_a_script_hands_its_words_to_its_recipe(name):
    script = (ROOT / "scripts" / f"{name}.sh").read_text()
    assert f'eval/recipe.py eval/recipes/{name}.txt "$@"' in script
    assert os.access(ROOT / "scripts" / f"{name}.sh", os.X_OK)


def write_recipe(folder: Path, text: str) -> str:
    (folder / "mine.txt").write_text(text)
    return str(folder / "mine.txt")


def test_a_recipe_lists_its_runs_as_a_sweep_does(tmp_path):
    text = (
        "# a comment\nevery model=embedded limit=3\nname=a/plain ratio=1\nname=a/one tokens=39\n"
        'name=b/two decoder=1:0.5 method=fastv merging=\'{"site": "block"}\' budget=77\n'
    )
    file = write_recipe(tmp_path, text)
    folders = recipe.planned_runs(Path(file), ["limit=6"], False, tmp_path / "out")
    assert [folder.name for folder in folders] == ["a", "b"]
    plain, one = (run.combination for run in folders[tmp_path / "out" / "a"])
    assert (plain.method, plain.config) == ("unmerged", None)
    assert (one.method, one.place, one.tokens, one.config) == ("pitome", "tower", 39, MergeConfig(tokens=39))
    (two,) = folders[tmp_path / "out" / "b"]
    assert two.combination[:4] == ("two", "fastv", "decoder:1", 77)
    assert two.plan.options["limit"] == 6 and two.combination.config.site == "block"


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("model=embedded tokens=39\n", [], "line 1: name=FOLDER is missing"),
        ("\nname=a model=embedded token=39\n", [], "line 2: unknown key 'token' (did you mean 'tokens'?)"),
        ("name=a model=embedded tokens=1\nname=a model=embedded tokens=2\n", [], "line 2: "),
        ("name=a model=embedded decoder=1:x\n", [], "decoder='1:x' is not allowed"),
        ("# nothing\n", [], "holds no runs"),
        ("name=a model=embedded tokens=39\n", ["limt=3"], "did you mean 'limit'?"),
    ],
)
def test_a_recipe_that_does_not_fit_is_an_error_that_names_the_line(text, words, said, tmp_path, capsys):
    assert recipe.main([write_recipe(tmp_path, text), *words, f"output={tmp_path / 'out'}"]) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("recipe: ") and said in captured
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_is_not_there_is_an_error_that_names_those_that_are(capsys, tmp_path):
    assert recipe.main([str(tmp_path / "nothing.txt")]) == 2
    assert "table3.txt" in capsys.readouterr().err
