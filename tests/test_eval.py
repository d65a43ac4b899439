"""The main job, end to end, as a user runs it: eval/run.py on the embedded model and data."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from llava_pitome import embedded
from llava_pitome.embedded import dataset
from llava_pitome.embedded.render import render
from llava_pitome.embedded.scenes import scene

ROOT = Path(__file__).parents[1]
RUN = [sys.executable, str(ROOT / "eval" / "run.py")]
ASKED = 48
sys.path.insert(0, str(ROOT / "eval"))


def evaluate(output: Path, *words: str) -> subprocess.CompletedProcess:
    command = [*RUN, "model=embedded", f"limit={ASKED}", "dtype=float32", f"output={output}", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=output.parent)


def results(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


def answers(output: Path) -> dict[str, list]:
    return {p.name: [json.loads(line) for line in p.open()] for p in (output / "answers").iterdir()}


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """One undisturbed evaluation that the tests below look at."""
    output = tmp_path_factory.mktemp("eval") / "output"
    ran = evaluate(output, "ratio=0.9", "batch_size=8")
    assert ran.returncode == 0, ran.stderr
    (output / "stdout.txt").write_text(ran.stdout)
    return output


def test_the_main_job_prints_a_table_with_both_models(done):
    printed = (done / "stdout.txt").read_text()
    assert "the embedded model" in printed and "choose with model=" in printed
    for column in ("accuracy", "yes/no", "number", "other", "tokens", "GFLOPs", "s/sample"):
        assert column in printed
    assert "unmerged" in printed and "pitome (paper), ratio 0.9" in printed


def test_results_hold_every_number_and_what_is_needed_to_get_them_again(done):
    found = results(done)
    plain, merged = found["rows"]
    assert (plain["image_tokens"], merged["image_tokens"]) == (196, 65)
    for row in (plain, merged):
        assert row["samples"] == ASKED == row["timed_samples"]
        assert row["accuracy"]["stderr"] > 0 or row["accuracy"]["mean"] == 100
        assert sum(t["samples"] for t in row["by_answer_type"].values()) == ASKED
        assert row["accuracy"]["mean"] == pytest.approx(100 * row["metrics"]["exact_match,none"])
    assert merged["tower_gflops"] < 0.6 * plain["tower_gflops"]
    assert merged["llm_gflops"] < 0.5 * plain["llm_gflops"]
    assert plain["accuracy"]["mean"] > 75  # the full validation has the bar of 90; these are 48 questions
    assert found["merging"]["ratio"] == 0.9 and found["packages"]["torch"]


def test_every_question_has_its_answer_on_file(done):
    files = answers(done)
    assert len(files) == 2
    for lines in files.values():
        assert [line["doc_id"] for line in lines] == list(range(ASKED))
        assert all({"question", "answer", "target", "exact_match"} <= line.keys() for line in lines)


def test_a_killed_run_goes_on_where_it_stopped_and_ends_the_same(done, tmp_path):
    output = tmp_path / "output"
    words = [
        "model=embedded",
        f"limit={ASKED}",
        "dtype=float32",
        f"output={output}",
        "ratio=0.9",
        "batch_size=8",
    ]
    process = subprocess.Popen([*RUN, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None and _generated(output) < 24:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = _generated(output)
    assert before >= 24
    assert not (output / "results.json").exists()
    ran = evaluate(output, "ratio=0.9", "batch_size=8")
    assert ran.returncode == 0, ran.stderr
    assert _generated(output) <= 2 * ASKED + 8  # at most the batch under way was asked again
    assert answers(output) == answers(done)
    scores = [[(r["accuracy"], r["by_answer_type"]) for r in results(o)["rows"]] for o in (output, done)]
    assert scores[0] == scores[1]


def _generated(output: Path) -> int:
    """Questions answered by the model itself, over all runs."""
    lines = [line for f in output.glob("cache/journals/*") for line in f.read_text().splitlines()]
    return sum(json.loads(line).get("samples", 0) for line in lines if line.endswith("}"))


def test_two_processes_give_the_score_of_one(done, tmp_path):
    ran = evaluate(tmp_path / "output", "ratio=0.9", "processes=2", "baseline=false", "batch_size=8")
    assert ran.returncode == 0, ran.stderr
    two, one = results(tmp_path / "output")["rows"][0], results(done)["rows"][1]
    assert two["accuracy"] == one["accuracy"] and two["by_answer_type"] == one["by_answer_type"]
    assert two["samples"] == ASKED


def test_another_batch_size_gives_the_same_answers(done, tmp_path):
    ran = evaluate(tmp_path / "output", "ratio=0.9", "baseline=false", "batch_size=1")
    assert ran.returncode == 0, ran.stderr
    (lines,) = answers(tmp_path / "output").values()
    assert lines == next(v for k, v in answers(done).items() if "pitome" in k)


def test_lmms_evals_own_vqav2_val_task_runs_unmodified_through_the_entry_point(done, tmp_path):
    """Its data set path is a folder of that name where one is, which is how it reads the embedded data."""
    folder = tmp_path / "lmms-lab-encoder" / "VQAv2"
    dataset.write(folder, pictures=ASKED // dataset.EACH)
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "llava_pitome", "--tasks", "vqav2_val",
        "--batch_size", "8", "--model_args", "pretrained=embedded,ratio=0.9,dtype=float32",
        "--output_path", "out",
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    (path,) = (tmp_path / "out").glob("**/*results.json")
    score = json.loads(path.read_text())["results"]["vqav2_val"]["exact_match,none"]
    assert score == pytest.approx(results(done)["rows"][1]["metrics"]["exact_match,none"])


def rewrite(source: Path, target: Path, picture: bytes) -> None:
    """The questions of one parquet file with another picture in its second row."""
    import datasets

    read = datasets.load_dataset(
        "parquet", data_files=str(source), split="train", cache_dir=str(target / "cache")
    )
    raw = read.cast_column("image", datasets.Image(decode=False)).to_list()
    raw[1]["image"] = {"bytes": picture, "path": "broken.png"}
    (target / "data").mkdir(parents=True)
    datasets.Dataset.from_list(raw, features=read.features).to_parquet(target / dataset.FILE)


def png(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


TRUNCATED = png(Image.fromarray(render(scene(0))))[:20_000]
BOMB = png(Image.new("1", (14_000, 14_000)))  # 196 million pixels in some 24 kB


@pytest.mark.parametrize(
    ("picture", "cause"),
    [(TRUNCATED, "truncated"), (BOMB, "exceeds limit"), (b"no picture", "cannot identify")],
    ids=["truncated", "decompression bomb", "no picture"],
)
def test_a_broken_picture_stops_the_run_and_is_named(tmp_path, picture, cause):
    good = dataset.write(tmp_path / "good", pictures=2, each=2)
    rewrite(good, tmp_path / "bad", picture)
    ran = evaluate(tmp_path / "output", f"data={tmp_path / 'bad'}", "baseline=false", "batch_size=1")
    assert ran.returncode != 0
    assert cause in ran.stderr
    assert "vqav2_val_folder validation 1" in ran.stderr  # task, split, sample id
    assert _generated(tmp_path / "output") == 1  # what came before it is kept


def test_a_folder_in_vqav2s_form_is_evaluated(tmp_path):
    dataset.write(tmp_path / "mine", pictures=2, each=2)
    ran = evaluate(tmp_path / "output", f"data={tmp_path / 'mine'}", "tokens=50")
    assert ran.returncode == 0, ran.stderr
    assert [(r["samples"], r["image_tokens"]) for r in results(tmp_path / "output")["rows"]] == [
        (4, 196),
        (4, 50),
    ]


def main(*words: str) -> int:
    import run

    return run.main(list(words))


@pytest.mark.parametrize(
    ("words", "said"),
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
        (["prefix=2.0"], "prefix='2.0' is not allowed; allowed: a share (0.5) or a number of tokens (64)"),
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
        (['merging={"tokens": 9}', "tokens=39"], "tokens stands in merging and beside it; give it once"),
        (["prefix=64", "method=fastv"], "method 'fastv' cannot merge in the prefix"),
        (["data=hub", "tasks=vqav2_vall"], "lmms-eval has no such task; the nearest is vqav2_val"),
    ],
)
def test_bad_words_are_errors_before_anything_is_loaded(words, said, capsys, tmp_path):
    assert main("model=embedded", f"output={tmp_path / 'out'}", *words) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_no_llava_is_an_error_that_lists_what_is_supported(tmp_path, capsys):
    config = json.loads((embedded.PATH / "config.json").read_text())["text_config"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    assert main(f"model={tmp_path}", "data=embedded") == 2
    assert "type 'llama'. Supported: LlavaForConditionalGeneration" in capsys.readouterr().err


def test_a_folder_without_a_model_is_an_error(tmp_path, capsys):
    assert main(f"model={tmp_path}") == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert main(f"model={tmp_path / 'nowhere'}") == 2
    assert "neither a folder with a model nor a model on the hub" in capsys.readouterr().err


def test_a_half_written_data_file_is_an_error_that_names_it(tmp_path, capsys):
    path = dataset.write(tmp_path, pictures=2, each=2)
    path.write_bytes(path.read_bytes()[:-200])
    assert main("model=embedded", f"data={tmp_path}") == 2
    said = capsys.readouterr().err
    assert str(path) in said and "damaged or only half written" in said


def test_a_full_disk_is_an_error_that_keeps_the_answers(done, tmp_path):
    """A limit on the size of files stands in for the disk: the same refusal, from the same system calls."""
    output = tmp_path / "output"
    dataset.write(tmp_path / "mine", pictures=ASKED // dataset.EACH)
    words = [f"data={tmp_path / 'mine'}", "ratio=0.9", "batch_size=8"]
    command = [*RUN, "model=embedded", f"limit={ASKED}", "dtype=float32", f"output={output}", *words]

    def limit():
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (600_000, 600_000)
        )  # bytes: the copy of the pictures is larger

    ran = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert ran.returncode == 1
    assert "eval: cannot write" in ran.stderr and "Answers so far are kept in" in ran.stderr
    assert "Traceback" not in ran.stderr
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    for row, undisturbed in zip(results(output)["rows"], results(done)["rows"], strict=True):
        assert row["accuracy"] == undisturbed["accuracy"]


def test_a_dry_run_says_what_would_run_and_writes_nothing(tmp_path, capsys):
    assert main("model=embedded", "tokens=64", "dry_run=true", f"output={tmp_path / 'out'}") == 0
    said = capsys.readouterr().out
    assert "unmerged: 196 image tokens" in said and "tokens 64 in the tower: 64 image tokens" in said
    assert "GFLOPs: tower " in said and "for one picture and 60 further tokens" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "label", "tokens", "llm_tokens"),
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
        (["resize=7x8"], "unmerged, resized to 7 x 8", 56, 56),
    ],
)
def test_a_label_says_what_merges_where_and_counts_are_told(words, label, tokens, llm_tokens, tmp_path):
    import run

    from llava_pitome.cli.options import parse

    plan = run.planned(parse(["model=embedded", "baseline=false", f"output={tmp_path}", *words], run.OPTIONS))
    ((said, config),) = plan.runs().items()
    assert said == label
    assert plan.cost(config)[:2] == (tokens, llm_tokens)
    assert f"{label}: {tokens} image tokens, {llm_tokens:.4g} in front of an LLM layer" in plan.describe()


def test_what_would_merge_nothing_is_the_unmerged_model():
    import run

    from llava_pitome.cli.options import parse

    for words in (["ratio=1"], ["tokens=196"], ["prefix=1.0"], ["decoder=1:196"]):
        plan = run.planned(parse(["model=embedded", "baseline=false", *words], run.OPTIONS))
        assert plan.runs() == {"unmerged": None}


@pytest.mark.parametrize("text", [0, 60])
def test_flops_without_weights_are_those_of_the_model(text):
    import sizes

    from llava_pitome import MergeConfig, load
    from llava_pitome.flops import closed_form
    from llava_pitome.models import hf_llava as llava

    model, _ = load("embedded")
    found = sizes.sizes(str(embedded.PATH), "sdpa", built_in=False)
    assert found.shapes == llava.shapes(model)
    config = MergeConfig(ratio=0.9, decoder={1: 0.5})
    tower, llm = config.lengths(196, 11), config.llm_lengths(65, 4)
    assert found.cost(config, text).flops == closed_form(model, tower, text, llm)
    assert found.cost(None, text).flops == closed_form(model, (196,) * 12, text)


def test_the_sizes_written_down_are_those_of_llava_1_5(monkeypatch):
    import sizes

    monkeypatch.setattr(
        sizes.checkpoints, "patches_and_layers", lambda path: (_ for _ in ()).throw(ValueError("no hub"))
    )
    sizes.sizes.cache_clear()
    parameters = {"7b": 7.06e9, "13b": 13.35e9}  # CLIP-L, projector and Vicuna together
    for name, count in parameters.items():
        found = sizes.sizes(f"llava-hf/llava-1.5-{name}-hf", "sdpa", built_in=True)
        assert found.built_in and (found.parts.patches, found.parts.feature) == (576, 23)
        assert sum(p.numel() for p in found.parts.model.parameters()) == pytest.approx(count, rel=0.002)
        with pytest.raises(ValueError, match="no hub"):
            sizes.sizes(f"llava-hf/llava-1.5-{name}-hf", "sdpa", built_in=False)
    sizes.sizes.cache_clear()


def test_textvqa_with_ocr_has_the_tokens_in_its_prompt(tmp_path):
    import plan
    from lmms_eval.utils import load_yaml_config

    options = {"data": "hub", "output": str(tmp_path), "questions": None}
    fields = dict.fromkeys(plan.MergePlan.__dataclass_fields__) | {"options": options, "output": tmp_path}
    task = load_yaml_config(str(plan.MergePlan(**fields).task_folder() / "textvqa_val_ocr.yaml"))
    doc = {"question": "what does it say?", "ocr_tokens": ["STOP", "5th"]}
    prompt = task["doc_to_text"](doc, task["lmms_eval_specific_kwargs"]["default"])
    assert "Reference OCR token: STOP, 5th" in prompt and task["dataset_path"] == "lmms-lab-encoder/textvqa"
