"""Launchers, the comparison of runs, and the bench of training."""

import json

import pytest
from PIL import Image
from tiled import make_tiled, noise

from llava_pitome import MergeConfig, load
from llava_pitome.cli.bench import targets
from train import bench, checkpoint, compare, evaluation, export, launch


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "0"}, {"processes": 2}, "processes=2, but 4 were launched"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "add zero=2 or zero=3"),
        ({"ACCELERATE_USE_FSDP": "true"}, {"zero": "2"}, "uses FSDP, which is not supported"),
    ],
)
def test_launcher_that_contradicts_the_options_raises(monkeypatch, environment, options, message):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match=message):
        launch.check({"processes": 1, "zero": None} | options)


def test_launcher_sets_the_number_of_processes(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    options = {"processes": 1, "zero": None}
    launch.check(options)
    assert options["processes"] == 4
    assert launch.without_local_rank(["--local_rank=0", "ratio=0.8"]) == ["ratio=0.8"]
    monkeypatch.delenv("LOCAL_RANK")
    assert launch.without_local_rank(["--local_rank=0"]) == ["--local_rank=0"]  # an unknown option


def accuracy(tokens, before, after):
    return {"tokens": tokens, "before": {"mean": before}, "after": {"mean": after}}


def test_comparison_has_a_line_per_run_and_a_column_per_token_count(tmp_path, capsys):
    runs = {"one": [accuracy(196, 93, 93.2), accuracy(20, 63.84, 90.04)], "two": [accuracy(39, 71.2, 92)]}
    for name, rows in runs.items():
        (tmp_path / name).mkdir()
        found = {"steps": 1000, "seconds": 725.0, "accuracy": rows}
        (tmp_path / name / "training.json").write_text(json.dumps(found))
    assert compare.main([str(tmp_path / name) for name in runs]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| run | steps | minutes | 196 tokens | 39 tokens | 20 tokens |",
        "| --- | --- | --- | --- | --- | --- |",
        "| one | 1000 | 12 | 93.0 → 93.2 |  | 63.8 → 90.0 |",
        "| two | 1000 | 12 |  | 71.2 → 92.0 |  |",
    ]


def test_comparison_without_accuracy_is_refused(tmp_path, capsys):
    (tmp_path / "training.json").write_text('{"accuracy": []}')
    for folders, message in (
        ([], "name the folders"),
        ([str(tmp_path)], "trained without evaluate=true"),
        ([str(tmp_path / "none")], "holds no training.json"),
    ):
        assert compare.main(folders) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("word", ["help", "--help", "-h"])
def test_comparison_has_help(word, capsys):
    assert compare.main([word]) == 0
    assert "python -m train.compare FOLDER" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "model", "measured"),
    [
        (MergeConfig(ratio=1.0), "next-vicuna", False),
        (MergeConfig(ratio=0.9), "next-vicuna", True),
        (MergeConfig(tokens=640), "next-vicuna", True),
        (MergeConfig(tokens_per_tile=8), "onevision", True),
        (MergeConfig(ratio=1.0, newlines="none"), "onevision", True),
        (MergeConfig(decoder={1: 0.5}), "next-vicuna", True),
        (MergeConfig(ratio=1.0), "embedded", False),
        (MergeConfig(tokens=20), "embedded", True),
    ],
)
def test_configs_that_merge_are_evaluated(config, model, measured, tmp_path):
    if model != "embedded":
        make_tiled(model).config.save_pretrained(tmp_path)
        model = str(tmp_path)
    assert evaluation._merges(config, model) == measured


def test_a_random_llava_next_is_saved_with_a_processor_that_fits(tmp_path, monkeypatch):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    monkeypatch.setattr(targets, "LLAMA_7B", sizes | {"vocab_size": 32064})
    monkeypatch.setattr(targets, "CLIP_L", sizes | {"num_hidden_layers": 3})
    trained = []
    result = dict.fromkeys(bench.MEASURED, 1.0) | {"machine": {}, "packages": {}}
    monkeypatch.setattr(bench, "_train", lambda _, words: trained.append(words) or result)
    words = ["model=next-7b-2layer", "tokens=640", "rounds=1", f"output={tmp_path}"]
    assert bench.main(words) == 0
    (path,) = {word for words in trained for word in words if word.startswith("model=")}
    assert path == f"model={tmp_path / 'next-7b-2layer'}"
    model, processor = load(path.removeprefix("model="), MergeConfig(tokens=640))
    inputs = processor(images=noise(200, 300), text="<image> what", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 640
    assert model(**inputs).logits.isfinite().all()


def test_scenes_of_the_embedded_llava_next_are_exported(tmp_path):
    file = export.write(tmp_path, 2, turns=40, model="embedded-next")
    rows = json.loads(file.read_text())
    texts = [turn["value"] for found in rows for turn in found["conversations"]]
    assert any("word" in text for text in texts)
    assert len({Image.open(tmp_path / found["image"]).size for found in rows}) == 2
    assert export.main(["model=embedded-nex", f"output={tmp_path}"]) == 2


def test_speed_ups_are_medians_over_rounds():
    variants = {
        "unmerged": {"step_seconds": [2.0, 3.0, 2.0], "bytes_before": [1e9] * 3, "bytes_most": [4e9] * 3},
        "20": {"step_seconds": [1.0, 1.0, 0.5], "bytes_before": [1e9] * 3, "bytes_most": [1.5e9, 2e9, 1.6e9]},
    }
    assert bench.table(variants).splitlines()[2:] == [
        "| unmerged | 2.00 | 1.00 | 4.00 | 3.00 |",
        "| 20 | 1.00 | 3.00 | 1.60 | 0.60 |",
    ]


def test_bench_trains_every_variant_in_alternation(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["tokens=20", "steps=3", "scenes=8", "batch_size=2", f"output={tmp_path}"]
    assert bench.main([*words, "rounds=1"]) == 0
    measured = json.loads((tmp_path / "bench.json").read_text())["sides"]
    for numbers in measured.values():
        assert numbers["step_seconds"][0] > 0
        assert numbers["bytes_most"][0] > numbers["bytes_before"][0] > 0
    assert bench.table(measured) == capsys.readouterr().out.strip()
    assert bench.table(measured) == (tmp_path / "bench.md").read_text().strip()
    trained = []
    result = checkpoint.read_result(tmp_path / "run")
    monkeypatch.setattr(bench, "_train", lambda _, found: trained.append(found[-2]) or result)
    assert bench.main([*words, "rounds=2"]) == 0
    assert trained == ["ratio=1.0", "tokens=20"] * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rounds=0"], "rounds='0' is not allowed"),
        (["max_steps=5"], "unknown key 'max_steps'"),
        (["zero=3", "quantization=4bit"], "zero=3 cannot partition weights"),
    ],
)
def test_bad_words_of_the_bench_are_refused(capsys, words, message):
    assert bench.main(words) == 2
    assert message in capsys.readouterr().err
