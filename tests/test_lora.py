"""Training a merged LLaVA as a user does: train/run.py on the embedded model and scenes."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from training_runs import ALONE, ROOT, RUN, command, losses, train

from llava_pitome import MergeConfig, apply, load, merge_tokens, remove
from llava_pitome.embedded.render import render
from llava_pitome.embedded.scenes import scene
from llava_pitome.models import adapters


def imported(name: str, file: Path):
    """A module of train/ whose name eval/ has, too."""
    found = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


run = imported("train_run", ROOT / "train" / "run.py")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """An adapter for mixed ratios, taught by the data and the unmerged model."""
    output = tmp_path_factory.mktemp("train") / "adapter"
    ran = train(output, "max_steps=6", "ratio=0.8,0.9", "distill=true", "tower=lora", "save_steps=4")
    assert ran.returncode == 0, ran.stderr
    return output


@pytest.fixture
def asked():
    picture = Image.fromarray(render(scene(5)))
    return {"images": picture, "text": "USER: <image>\nwhat color is it? ASSISTANT:", "return_tensors": "pt"}


def logits(model, processor, asked):
    with torch.no_grad():
        return model(**processor(**asked)).logits[0, -1]


def test_an_adapter_merges_when_it_is_loaded_and_without_it_the_model_is_plain(trained, asked):
    model, processor = load(str(trained), dtype=torch.float32)
    config = MergeConfig(ratio=0.8)
    assert MergeConfig.from_dict(model.config.token_merging) == config
    merged = logits(model, processor, asked)
    plain, plains = load("embedded", dtype=torch.float32)
    with model.disable_adapter():
        with merge_tokens(plain, config, plains):
            expected = logits(plain, plains, asked)
        torch.testing.assert_close(logits(model, processor, asked), expected)
        remove(model)
        assert torch.equal(logits(model, processor, asked), logits(plain, plains, asked))
    assert (merged - expected).abs().max() > 1e-2


def test_merged_weights_are_a_plain_checkpoint_that_merges(trained, asked, tmp_path):
    model, processor = load(str(trained), dtype=torch.float32)
    expected = logits(model, processor, asked)
    whole = model.merge_and_unload()
    apply(whole, MergeConfig(ratio=0.8), processor)  # the projections are others now
    torch.testing.assert_close(logits(whole, processor, asked), expected, rtol=1e-4, atol=1e-4)
    whole.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, processor = load(str(tmp_path), dtype=torch.float32)
    assert type(again).__name__ == "LlavaForConditionalGeneration"
    torch.testing.assert_close(logits(again, processor, asked), expected, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name in again.state_dict())


def test_everything_that_learns_has_learnt_and_nothing_else(trained):
    model, _ = load(str(trained), dtype=torch.float32)
    plain, _ = load("embedded", dtype=torch.float32)
    before = plain.state_dict()
    for name, weight in model.get_base_model().state_dict().items():
        if "lora_" in name or "modules_to_save" in name:
            continue
        name = name.replace("base_layer.", "").replace("original_module.", "")
        assert torch.equal(weight, before[name]), name
    after = model.state_dict()
    ups = [name for name in after if "lora_B" in name]
    assert any("vision_tower" in name for name in ups) and any("language_model" in name for name in ups)
    ran = [name for name in ups if ".layers.11." not in name or "vision" not in name]  # behind the features
    assert all(after[name].abs().max() > 0 for name in ran)
    key = next(name for name in after if "modules_to_save" in name and name.endswith("linear_1.weight"))
    assert not torch.equal(after[key], before["model.multi_modal_projector.linear_1.weight"])


def test_the_card_and_the_pictures_say_what_was_done(trained):
    card, facts = (trained / "README.md").read_text(), json.loads((trained / "training.json").read_text())
    assert "24 embedded scenes from seed 1,900,000,000 on, 24 rows" in card
    assert '{"ratio": 0.8}; {"ratio": 0.9}' in card and "adapters on the vision tower, the projector" in card
    assert "6 of 2 rows" in card and f"torch {torch.__version__}" in card and "Not measured" in card
    assert facts["steps"] == len(losses(trained)) == 6 and facts["seconds"] > 0
    with Image.open(trained / "loss.png") as picture:
        assert picture.size[0] > 300
    assert any((trained / "runs").rglob("events.out.tfevents*"))
    assert adapters.base_model(str(trained)) == "embedded"


def test_an_adapter_is_evaluated_as_it_was_trained(trained, tmp_path):
    run = [sys.executable, str(ROOT / "eval" / "run.py"), f"model={trained}", "limit=6", f"output={tmp_path}"]
    ran = subprocess.run(run, capture_output=True, text=True, check=False, env=ALONE)
    assert ran.returncode == 0, ran.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["image_tokens"] for row in rows] == [196, 19] and rows[1]["merging"]["ratio"] == 0.8


def refused(capsys, output: Path, *words: str) -> str:
    """What is said where nothing is trained."""
    assert run.main(command(output, *words)[len(RUN) :]) == 2
    return capsys.readouterr().err


def test_what_would_be_lost_or_mixed_up_is_an_error(trained, tmp_path, capsys):
    assert "holds checkpoints: resume=true goes on" in refused(capsys, trained, "max_steps=6")
    changed = "was made with other options: ratio=None (was [0.8, 0.9])"
    assert changed in refused(capsys, trained, "max_steps=9", "resume=true")
    assert "holds no checkpoint of 1 processes" in refused(capsys, tmp_path / "none", "resume=true")


def test_a_folder_with_nothing_but_a_cut_checkpoint_says_what_to_delete(tmp_path, capsys):
    (tmp_path / "checkpoint-500").mkdir()
    assert "can go on from: delete checkpoint-500" in refused(capsys, tmp_path, "max_steps=6")


def test_a_run_that_has_ended_is_not_gone_on_with(trained, tmp_path):
    """What it took, and its checkpoints, stay."""
    output = tmp_path / "again"
    shutil.copytree(trained, output)
    before = json.loads((output / "training.json").read_text())
    words = ("max_steps=6", "ratio=0.8,0.9", "distill=true", "tower=lora", "save_steps=4", "resume=true")
    assert run.main(command(output, *words)[len(RUN) :]) == 0
    assert json.loads((output / "training.json").read_text()) == before
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_a_run_that_goes_on_counts_the_seconds_before(trained, tmp_path):
    output = tmp_path / "again"
    shutil.copytree(trained, output)
    shutil.rmtree(output / "checkpoint-6")
    (output / "training.json").unlink()
    words = ("max_steps=6", "ratio=0.8,0.9", "distill=true", "tower=lora", "save_steps=4", "resume=true")
    ran = train(output, *words)
    assert ran.returncode == 0, ran.stderr
    facts, before = (json.loads((path / "training.json").read_text()) for path in (output, trained))
    taken = [row["seconds"] for row in facts["log"]]
    assert taken == sorted(taken) and taken[:4] == [row["seconds"] for row in before["log"]][:4]
    assert facts["seconds"] == taken[-1] and 0 < facts["step_seconds"] < facts["seconds"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["ratoi=0.8"], "did you mean 'ratio'?"),
        (["ratio=1.2"], "ratio='1.2' is not allowed"),
        (["ratio=0.8", "tokens=20"], "give ratio= or tokens=, not both"),
        (["zero=4"], "zero='4' is not allowed"),
        (["zero=3", "quantization=4bit"], "zero=3 divides weights that quantization=4bit has packed"),
        (["data=/nowhere.json"], "data=/nowhere.json is no file"),
        (["merging={\"metod\": 1}"], "metod"),
        (["merging={\"name\": 1}"], "name"),
        (["merging=[1]"], "merging='[1]' is not allowed"),
        (["merging={\"tokens\": 64}", "ratio=0.9"], "ratio=0.9, tokens=64"),
        (["merging={\"ratio\": 0.8}", "ratio=0.9"], "ratio stands in merging and beside it"),
        (["max_steps=3", "epochs=1"], "epochs=1.0 takes no max_steps= beside it"),
        (["images=/nowhere"], "images=/nowhere takes a data= of your own"),
        (["distill_weight=2"], "distill_weight=2.0 takes distill=true"),
        (["limit=4"], "limit=4 takes evaluate=true"),
        (["warmup=1"], "warmup='1' is not allowed"),
        (["targets=q_prj"], "targets=q_prj: the language model has no such projections"),
        (["merging={\"method\": \"fastv\"}", "ratio=0.9"], "fastv"),
        (["model=/nowhere"], "/nowhere"),
        (["tokens=400"], "400"),
        (["lora_dropout=1"], "lora_dropout='1' is not allowed"),
    ],
)  # fmt: skip
def test_bad_words_are_errors_before_anything_is_written(tmp_path, capsys, words, why):
    assert why in refused(capsys, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()
