"""One evaluation end to end, as a user runs it: eval.run on the embedded model and data."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from eval import run
from eval.command import child_environment
from eval.evaluation import lmms_eval_runner
from eval.evaluation.tasks import TEMPLATES, write_tasks
from llava_pitome import embedded
from llava_pitome.cli.options import parse
from llava_pitome.embedded import dataset

QUESTIONS = 48
RUN = [sys.executable, "-m", "eval.run"]


def words(output: Path, *more: str) -> list[str]:
    return ["model=embedded", f"limit={QUESTIONS}", "dtype=float32", f"output={output}", *more]


def evaluate(output: Path, *more: str) -> None:
    assert run.main(words(output, *more)) == 0


def results(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


def answers(output: Path) -> dict[str, list]:
    return {p.name: [json.loads(line) for line in p.open()] for p in (output / "answers").iterdir()}


def accuracies(output: Path) -> list:
    return [(row["accuracy"], row["by_answer_type"]) for row in results(output)["rows"]]


def generated(output: Path) -> int:
    """Questions that the model itself answered, over all runs."""
    lines = [line for f in output.glob("cache/journals/*") for line in f.read_text().splitlines()]
    return sum(json.loads(line).get("samples", 0) for line in lines if line.endswith("}"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """One uninterrupted evaluation with ratio 0.9 and batches of 8."""
    output = tmp_path_factory.mktemp("eval") / "output"
    with redirect_stdout(io.StringIO()) as printed:
        evaluate(output, "ratio=0.9", "batch_size=8")
    (output / "stdout.txt").write_text(printed.getvalue())
    return output


def test_the_table_has_both_models(finished):
    printed = (finished / "stdout.txt").read_text()
    assert "the embedded model" in printed and "choose with model=" in printed
    for column in ("accuracy", "yes/no", "number", "other", "tokens", "GFLOPs", "s/sample"):
        assert column in printed
    assert "unmerged" in printed and "pitome (paper), ratio 0.9" in printed


def test_results_hold_every_number_and_how_to_reproduce_it(finished):
    found = results(finished)
    plain, merged = found["rows"]
    assert (plain["image_tokens"], merged["image_tokens"]) == (196, 65)
    for row in (plain, merged):
        assert row["samples"] == QUESTIONS == row["timed_samples"]
        assert row["accuracy"]["stderr"] > 0 or row["accuracy"]["mean"] == 100
        assert sum(t["samples"] for t in row["by_answer_type"].values()) == QUESTIONS
        assert row["accuracy"]["mean"] == pytest.approx(100 * row["metrics"]["exact_match,none"])
    assert merged["tower_gflops"] < 0.6 * plain["tower_gflops"]
    assert merged["llm_gflops"] < 0.5 * plain["llm_gflops"]
    assert plain["accuracy"]["mean"] > 75  # 90 on the full validation split; these are 48 questions
    assert found["merging"]["ratio"] == 0.9 and found["packages"]["torch"]


def test_every_answer_is_written(finished):
    files = answers(finished)
    assert len(files) == 2
    for lines in files.values():
        assert [line["doc_id"] for line in lines] == list(range(QUESTIONS))
        assert all({"question", "answer", "target", "exact_match"} <= line.keys() for line in lines)


def test_a_killed_run_resumes_and_ends_the_same(finished, tmp_path):
    output = tmp_path / "output"
    command = [*RUN, *words(output, "ratio=0.9", "batch_size=8")]
    process = subprocess.Popen(
        command, env=child_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None and generated(output) < 24:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert generated(output) >= 24
    assert not (output / "results.json").exists()
    evaluate(output, "ratio=0.9", "batch_size=8")
    assert generated(output) <= 2 * QUESTIONS + 8  # only the interrupted batch was repeated
    assert answers(output) == answers(finished)
    assert accuracies(output) == accuracies(finished)


class Waiting(Exception):
    """In place of waiting for other processes."""


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_writes_tasks_and_questions_before_others_read_them(rank, tmp_path, monkeypatch):
    def wait():
        raise Waiting

    monkeypatch.setattr(lmms_eval_runner, "_wait_for_all_processes", wait)
    monkeypatch.setenv("RANK", str(rank))
    questions = tmp_path / "questions"
    plan = run.make_plan(parse(words(tmp_path, "ratio=0.9", f"questions={questions}"), run.OPTIONS))
    with pytest.raises(Waiting):
        lmms_eval_runner.evaluate(plan)
    written = {file.name for file in (tmp_path / "tasks").glob("*")}
    assert written == ({file.name for file in TEMPLATES.glob("*.yaml")} if rank == 0 else set())
    assert questions.exists() == (rank == 0)


def test_two_processes_give_the_accuracy_of_one_and_relative_paths_are_the_users(finished, tmp_path):
    command = [*RUN, *words("output", "ratio=0.9", "processes=2", "baseline=false", "batch_size=8")]
    ran = subprocess.run(
        command, cwd=tmp_path, env=child_environment(), capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert accuracies(tmp_path / "output") == accuracies(finished)[1:]


def test_answers_do_not_depend_on_the_batch_size(finished, tmp_path):
    evaluate(tmp_path / "output", "ratio=0.9", "baseline=false", "batch_size=1")
    (lines,) = answers(tmp_path / "output").values()
    assert lines == next(v for k, v in answers(finished).items() if "pitome" in k)


def test_lmms_evals_own_task_runs_through_the_entry_point(finished, tmp_path):
    """Its data set path names a folder if there is one: so vqav2_val reads the embedded data unmodified."""
    dataset.write(tmp_path / "lmms-lab-encoder" / "VQAv2", pictures=QUESTIONS // dataset.EACH)
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "llava_pitome", "--tasks", "vqav2_val",
        "--batch_size", "8", "--model_args", "pretrained=embedded,ratio=0.9,dtype=float32",
        "--output_path", "out",
    ]  # fmt: skip
    environment = child_environment({"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")})
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    (path,) = (tmp_path / "out").glob("**/*results.json")
    score = json.loads(path.read_text())["results"]["vqav2_val"]["exact_match,none"]
    assert score == pytest.approx(results(finished)["rows"][1]["metrics"]["exact_match,none"])


def truncated_png() -> bytes:
    from eval.embedded_images import embedded_image

    return png(embedded_image(0))[:20_000]


def decompression_bomb() -> bytes:
    from PIL import Image

    return png(Image.new("1", (14_000, 14_000)))  # 196 million pixels in some 24 kB


def png(image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("broken", "cause"),
    [
        (truncated_png, "truncated"),
        (decompression_bomb, "exceeds limit"),
        (lambda: b"no image", "cannot identify"),
    ],
)
def test_a_broken_image_stops_the_run_and_is_named(tmp_path, broken, cause):
    import datasets

    good = dataset.write(tmp_path / "good", pictures=2, each=2)
    rows = datasets.load_dataset(
        "parquet", data_files=str(good), split="train", cache_dir=str(tmp_path / "cache")
    )
    values = rows.cast_column("image", datasets.Image(decode=False)).to_list()
    values[1]["image"] = {"bytes": broken(), "path": "broken.png"}
    (tmp_path / "bad" / "data").mkdir(parents=True)
    datasets.Dataset.from_list(values, features=rows.features).to_parquet(tmp_path / "bad" / dataset.FILE)
    more = [f"data={tmp_path / 'bad'}", "baseline=false", "batch_size=1"]
    with pytest.raises(Exception, match=cause) as error:  # whatever class PIL raises
        run.main(words(tmp_path / "output", *more))
    assert "vqav2_val_folder validation 1" in "".join(error.value.__notes__)  # task, split, sample id
    assert generated(tmp_path / "output") == 1  # the answer before it is kept


def test_a_folder_in_vqav2s_form_is_evaluated(tmp_path):
    dataset.write(tmp_path / "mine", pictures=2, each=2)
    evaluate(tmp_path / "output", f"data={tmp_path / 'mine'}", "tokens=50")
    rows = results(tmp_path / "output")["rows"]
    assert [(r["samples"], r["image_tokens"]) for r in rows] == [(4, 196), (4, 50)]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["ratio=1.5"], "ratio='1.5' is not allowed"),
        (["ratio=0"], "ratio='0' is not allowed"),
        (["tokens=0"], "tokens='0' is not allowed"),
        (["tokens=197"], "tokens=197 does not fit: this image has 196 patches"),
        (["ratio=0.9", "tokens=64"], "give ratio or tokens, and not both"),
        (["ration=0.9"], "unknown key 'ration' (did you mean 'ratio'?)"),
        (["method=best"], "method='best' is not allowed"),
        (["recipe=papers"], "recipe='papers' is not allowed"),
        (["batch_size=0"], "batch_size='0' is not allowed"),
        (["dtype=int4"], "dtype='int4' is not allowed"),
        (["quantization=2bit"], "quantization='2bit' is not allowed"),
        (["ratio=0.9,0.8"], "ratio holds 2 shares; the tower has 11 layers"),
        (["tasks=gqa"], "tasks=gqa needs data=hub"),
        (["data=nowhere"], "holds no validation*.parquet"),
        (["dtype=float16"], "dtype='float16' is not allowed without CUDA"),
        (["prefix=0"], "prefix='0' is not allowed"),
        (
            ["prefix=2.0"],
            "prefix='2.0' is not allowed; allowed: a share (0.5) or a number of tokens from 2 (64)",
        ),
        (["prefix=197"], "prefix=197 does not fit"),
        (["prefix=64", "tokens=64"], "give ratio with prefix, or tokens with prefix_share"),
        (["decoder=1"], "decoder='1' is not allowed"),
        (["decoder=1:0.5,1:9"], "decoder='1:0.5,1:9' is not allowed"),
        (["decoder=3:0.5"], "allowed are 0 to 2"),
        (["resize=9"], "resize='9' is not allowed; allowed: rows x columns (9x10)"),
        (["resize=15x15"], "resize=(15, 15) does not fit: this image has 196 patches"),
        (["merging=39"], "merging='39' is not allowed; allowed: a JSON object"),
        (['merging={"prefixx": 3}'], "MergeConfig has no field 'prefixx'; the nearest is 'prefix'"),
        (['merging={"site": "block"}'], "nothing says how far to merge"),
        (['merging={"tokens": 9}', "tokens=39"], "tokens is given in merging and beside it; give it once"),
        (["site=mlp"], "site='mlp' is not allowed; allowed: attention | block"),
        (["prefix=64", "method=fastv"], "method 'fastv' cannot merge in the prefix"),
        (["data=hub", "tasks=vqav2_vall"], "lmms-eval has no such task; the nearest is vqav2_val"),
    ],
)
def test_bad_words_are_errors_before_anything_is_loaded(bad, message, capsys, tmp_path):
    assert run.main(["model=embedded", f"output={tmp_path / 'out'}", *bad]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_supported_is_an_error_that_lists_what_is(tmp_path, capsys):
    config = json.loads((embedded.PATH / "config.json").read_text())["text_config"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    assert run.main([f"model={tmp_path}", "data=embedded"]) == 2
    assert "type 'llama'. Supported: LlavaForConditionalGeneration" in capsys.readouterr().err


@pytest.mark.parametrize("name", [".", "nowhere"])
def test_a_path_without_a_model_is_an_error(name, tmp_path, capsys):
    assert run.main([f"model={tmp_path / name}"]) == 2
    assert str(tmp_path / name) in capsys.readouterr().err


def test_an_incomplete_data_file_is_an_error_that_names_it(tmp_path, capsys):
    path = dataset.write(tmp_path, pictures=2, each=2)
    path.write_bytes(path.read_bytes()[:-200])
    assert run.main(["model=embedded", f"data={tmp_path}"]) == 2
    assert f"{path} is damaged or incomplete" in capsys.readouterr().err


def test_a_full_disk_is_an_error_that_keeps_the_answers(finished, tmp_path):
    """A limit on the size of files stands in for the disk: the same error from the same system calls."""
    output = tmp_path / "output"
    dataset.write(tmp_path / "mine", pictures=QUESTIONS // dataset.EACH)
    more = [f"data={tmp_path / 'mine'}", "ratio=0.9", "batch_size=8"]
    limited = subprocess.run(
        [*RUN, *words(output, *more)], env=child_environment(), capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (600_000,) * 2),  # < the images' size
    )  # fmt: skip
    assert limited.returncode == 1
    assert "eval: cannot write" in limited.stderr and "Answers so far are kept in" in limited.stderr
    assert "Traceback" not in limited.stderr
    evaluate(output, *more)
    assert accuracies(output) == accuracies(finished)


def test_a_dry_run_prints_the_cost_and_writes_nothing(tmp_path, capsys):
    assert run.main(["model=embedded", "tokens=64", "dry_run=true", f"output={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    assert "unmerged: 196 image tokens" in printed and "tokens 64 in the tower: 64 image tokens" in printed
    assert "GFLOPs: tower " in printed and "for one image and 60 text tokens" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("merging", "label", "tokens", "llm_tokens"),
    [
        (["tokens=39"], "pitome (paper), tokens 39 in the tower", 39, 39),
        (["ratio=0.9", "recipe=released"], "pitome (released), ratio 0.9 in the tower", 65, 65),
        (["prefix=64", "method=grid"], "grid (paper), 64 at the prefix", 64, 64),
        (["prefix=0.5"], "pitome (paper), 0.5 at the prefix", 98, 98),
        (["ratio=0.9", "prefix=20"], "pitome (paper), ratio 0.9 in the tower, 20 at the prefix", 20, 20),
        (["decoder=0:0.5,1:20"], "pitome (paper), 0.5 at LLM layer 0, 20 at LLM layer 1", 196, 83.5),
        (
            ['merging={"tokens": 39, "prefix_share": 0.5, "site": "block"}'],
            "pitome (paper), tokens 39 in the tower and at the prefix, site block",
            39,
            39,
        ),
        (["tokens=39", "site=block"], "pitome (paper), tokens 39 in the tower, site block", 39, 39),
        (["resize=7x8"], "unmerged, resized to 7 x 8", 56, 56),
    ],
)
def test_a_label_says_where_and_how_far_to_merge(merging, label, tokens, llm_tokens, tmp_path):
    plan = make_plan("baseline=false", f"output={tmp_path}", *merging)
    ((found, config),) = plan.runs().items()
    assert found == label
    assert plan.cost(config)[:2] == (tokens, llm_tokens)
    assert f"{label}: {tokens} image tokens, {llm_tokens:.4g} per LLM layer" in plan.describe()


def make_plan(*more: str):
    return run.make_plan(parse(["model=embedded", *more], run.OPTIONS))


@pytest.mark.parametrize("merging", ["ratio=1", "tokens=196", "prefix=1.0", "decoder=1:196"])
def test_a_config_that_merges_nothing_is_the_unmerged_model(merging):
    assert make_plan("baseline=false", merging).runs() == {"unmerged": None}


@pytest.mark.parametrize("text", [0, 60])
def test_flops_without_weights_are_those_of_the_model(text):
    from eval.evaluation.model_costs import model_shapes
    from llava_pitome import MergeConfig, load
    from llava_pitome.flops import closed_form
    from llava_pitome.models import hf_llava as llava

    model, _ = load("embedded")
    found = model_shapes(str(embedded.PATH), "sdpa", built_in=False)
    assert found.shapes == llava.shapes(model)
    config = MergeConfig(ratio=0.9, decoder={1: 0.5})
    tower, llm = config.lengths(196, 11), config.llm_lengths(65, 4)
    assert found.cost(config, text).flops == closed_form(model, tower, text, llm)
    assert found.cost(None, text).flops == closed_form(model, (196,) * 12, text)


def test_the_built_in_shapes_are_llava_1_5s(monkeypatch):
    from eval.evaluation import model_costs

    def unreachable(path):
        raise ValueError("no hub")

    monkeypatch.setattr(model_costs.checkpoints, "patches_and_layers", unreachable)
    model_costs.model_shapes.cache_clear()
    parameters = {"7b": 7.06e9, "13b": 13.35e9}  # CLIP-L, projector and Vicuna together
    for name, count in parameters.items():
        found = model_costs.model_shapes(f"llava-hf/llava-1.5-{name}-hf", "sdpa", built_in=True)
        assert found.built_in and (found.parts.patches, found.parts.num_feature_layers) == (576, 23)
        assert sum(p.numel() for p in found.parts.model.parameters()) == pytest.approx(count, rel=0.002)
        with pytest.raises(ValueError, match="no hub"):
            model_costs.model_shapes(f"llava-hf/llava-1.5-{name}-hf", "sdpa", built_in=False)
    model_costs.model_shapes.cache_clear()


def test_textvqa_with_ocr_has_the_tokens_in_its_prompt(tmp_path):
    from lmms_eval.utils import load_yaml_config

    write_tasks(tmp_path / "tasks", Path("hub"), tmp_path)
    task = load_yaml_config(str(tmp_path / "tasks/textvqa_val_ocr.yaml"))
    doc = {"question": "what does it say?", "ocr_tokens": ["STOP", "5th"]}
    prompt = task["doc_to_text"](doc, task["lmms_eval_specific_kwargs"]["default"])
    assert "Reference OCR token: STOP, 5th" in prompt and task["dataset_path"] == "lmms-lab-encoder/textvqa"


def test_the_environment_of_processes_leads_to_this_checkout(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "mine")
    environment = child_environment({"OMP_NUM_THREADS": "3"})
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(Path(run.__file__).parents[1]), "mine"]
    assert environment["OMP_NUM_THREADS"] == "3"
