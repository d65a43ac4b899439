"""Training a merging LLaVA with train.run, on the embedded model and scenes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from training_runs import facts, losses, spawn, train

from llava_pitome import MergeConfig, apply, load, merge_tokens, remove
from llava_pitome.api import applied
from llava_pitome.embedded.render import render
from llava_pitome.embedded.scenes import scene
from llava_pitome.models import adapters

WORDS = ("max_steps=6", "ratio=0.8,0.9", "distill=true", "tower=lora", "save_steps=4")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """An adapter for two ratios, with distillation."""
    output = tmp_path_factory.mktemp("train") / "adapter"
    assert train(output, *WORDS) == 0
    return output


@pytest.fixture
def prompt():
    image = Image.fromarray(render(scene(5)))
    return {"images": image, "text": "USER: <image>\nwhat color is it? ASSISTANT:", "return_tensors": "pt"}


def logits(model, processor, prompt):
    with torch.no_grad():
        return model(**processor(**prompt)).logits[0, -1]


def test_loaded_adapter_merges_and_without_it_the_model_is_plain(trained, prompt):
    model, processor = load(str(trained), dtype=torch.float32)
    config = MergeConfig(ratio=0.8)
    assert MergeConfig.from_dict(model.config.token_merging) == config
    adapted = logits(model, processor, prompt)
    plain, plain_processor = load("embedded", dtype=torch.float32)
    with model.disable_adapter():
        with merge_tokens(plain, config, plain_processor):
            expected = logits(plain, plain_processor, prompt)
        torch.testing.assert_close(logits(model, processor, prompt), expected)
        remove(model)
        assert torch.equal(logits(model, processor, prompt), logits(plain, plain_processor, prompt))
    assert (adapted - expected).abs().max() > 1e-2


def test_unloaded_adapter_is_a_plain_checkpoint_that_merges(trained, prompt, tmp_path):
    model, processor = load(str(trained), dtype=torch.float32)
    expected = logits(model, processor, prompt)
    model = model.merge_and_unload()
    apply(model, MergeConfig(ratio=0.8), processor)  # the projections are new modules
    torch.testing.assert_close(logits(model, processor, prompt), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, processor = load(str(tmp_path), dtype=torch.float32)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    torch.testing.assert_close(logits(model, processor, prompt), expected, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name in model.state_dict())


def test_adapters_and_projector_are_trained_and_nothing_else(trained):
    model, _ = load(str(trained), dtype=torch.float32)
    before = load("embedded", dtype=torch.float32)[0].state_dict()
    for name, weight in model.get_base_model().state_dict().items():
        if "lora_" not in name and "modules_to_save" not in name:
            name = name.replace("base_layer.", "").replace("original_module.", "")
            assert torch.equal(weight, before[name]), name
    after = model.state_dict()
    updated = [name for name in after if "lora_B" in name]
    assert any("vision_tower" in name for name in updated) and any("language_model" in n for n in updated)
    # the tower's last layer is after the feature layer
    used = [name for name in updated if ".layers.11." not in name or "vision" not in name]
    assert all(after[name].abs().max() > 0 for name in used)
    key = next(name for name in after if "modules_to_save" in name and name.endswith("linear_1.weight"))
    assert not torch.equal(after[key], before["model.multi_modal_projector.linear_1.weight"])


def test_model_card_describes_the_run(trained):
    card, found = (trained / "README.md").read_text(), facts(trained)
    assert "24 embedded scenes from seed 1,900,000,000 on, 24 rows" in card
    assert '{"ratio": 0.8}; {"ratio": 0.9}' in card and "adapters on the vision tower, the projector" in card
    assert "6 of 2 rows" in card and f"torch {torch.__version__}" in card and "Not measured" in card
    assert found["steps"] == len(losses(trained)) == 6 and found["seconds"] > 0
    with Image.open(trained / "loss.png") as plot:
        assert plot.size[0] > 300
    assert any((trained / "runs").rglob("events.out.tfevents*"))
    assert adapters.base_model(str(trained)) == "embedded"


def test_checkpoints_and_adapter_say_the_first_ratio(trained):
    """Also where the model merged by another when they were written."""
    for folder in (trained, trained / "checkpoint-4", trained / "checkpoint-6"):
        assert MergeConfig.from_pretrained(folder) == MergeConfig(ratio=0.8)
        assert adapters.base_model(str(folder)) == "embedded"


def test_adapter_trained_without_merging_says_so(tmp_path):
    assert train(tmp_path, "max_steps=1", "ratio=1.0") == 0
    assert applied(load(str(tmp_path))[0]) == MergeConfig(ratio=1.0)


def test_adapter_is_evaluated_with_its_own_config(trained, tmp_path):
    from eval.run import main

    assert main([f"model={trained}", "limit=6", f"output={tmp_path}"]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["image_tokens"] for row in rows] == [196, 19] and rows[1]["merging"]["ratio"] == 0.8


def error(capsys, output: Path, *words: str) -> str:
    """The message of a run that is refused."""
    assert train(output, *words) == 2
    return capsys.readouterr().err


def test_runs_that_would_overwrite_or_mix_checkpoints_are_refused(trained, tmp_path, capsys):
    assert "holds checkpoints: use resume=true" in error(capsys, trained, "max_steps=6")
    changed = "was made with other options: ratio=None (was [0.8, 0.9])"
    assert changed in error(capsys, trained, "max_steps=9", "resume=true")
    assert "holds no complete checkpoint of 1 processes" in error(capsys, tmp_path / "none", "resume=true")
    (tmp_path / "checkpoint-500").mkdir()
    assert "resume from: delete checkpoint-500" in error(capsys, tmp_path, "max_steps=6")


def test_resuming_a_run_that_has_ended_changes_nothing(trained, tmp_path):
    output = tmp_path / "again"
    shutil.copytree(trained, output)
    assert train(output, *WORDS, "resume=true") == 0
    assert facts(output) == facts(trained)
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_resumed_run_counts_the_seconds_before(trained, tmp_path):
    """In a process of its own, started in another working directory."""
    output = tmp_path / "again"
    shutil.copytree(trained, output)
    shutil.rmtree(output / "checkpoint-6")
    (output / "training.json").unlink()
    ran = spawn(output, *WORDS, "resume=true")
    assert ran.returncode == 0, ran.stderr
    seconds = [row["seconds"] for row in facts(output)["log"]]
    assert seconds == sorted(seconds)
    assert seconds[:4] == [row["seconds"] for row in facts(trained)["log"]][:4]
    assert facts(output)["seconds"] == seconds[-1] and 0 < facts(output)["step_seconds"] < seconds[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ratoi=0.8"], "did you mean 'ratio'?"),
        (["ratio=1.2"], "ratio='1.2' is not allowed"),
        (["ratio=0.8", "tokens=20"], "ratio= and tokens= exclude each other"),
        (["zero=4"], "zero='4' is not allowed"),
        (
            ["zero=3", "quantization=4bit"],
            "zero=3 cannot partition weights that quantization=4bit has packed",
        ),
        (["data=/nowhere.json"], "data=/nowhere.json is not a file"),
        (['merging={"metod": 1}'], "metod"),
        (['merging={"name": 1}'], "name"),
        (["merging=[1]"], "merging='[1]' is not allowed"),
        (['merging={"tokens": 64}', "ratio=0.9"], "ratio=0.9, tokens=64"),
        (['merging={"ratio": 0.8}', "ratio=0.9"], "ratio is given in merging and beside it"),
        (["max_steps=3", "epochs=1"], "epochs=1.0 requires no max_steps="),
        (["images=/nowhere"], "images=/nowhere requires a data= of your own"),
        (["distill_weight=2"], "distill_weight=2.0 requires distill=true"),
        (["limit=4"], "limit=4 requires evaluate=true"),
        (["warmup=1"], "warmup='1' is not allowed"),
        (["targets=q_prj"], "targets=q_prj: the language model has no such projections"),
        (['merging={"method": "fastv"}', "ratio=0.9"], "fastv"),
        (["model=/nowhere"], "/nowhere"),
        (["tokens=400"], "400"),
        (["lora_dropout=1"], "lora_dropout='1' is not allowed"),
    ],
)
def test_bad_words_are_refused_before_anything_is_written(tmp_path, capsys, words, message):
    assert message in error(capsys, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()
