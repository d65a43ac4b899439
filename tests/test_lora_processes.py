"""Training in several processes, with DeepSpeed, quantized, and killed: scripts/test_training.sh runs it."""

import json
import shutil
import signal
import subprocess
import time

import pytest
from training_runs import ALONE, command, losses, train

from llava_pitome import load


def test_a_run_that_is_killed_goes_on_with_the_same_losses(tmp_path):
    words = ("max_steps=6", "ratio=0.8,0.9", "distill=true", "tower=lora", "save_steps=2", "lora_dropout=0.1",
             "group_by_length=true")  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(whole, *words).returncode == 0
    process = subprocess.Popen(
        command(cut, *words),
        env=ALONE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (cut / "checkpoint-2" / "trainer_state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cut / "training.json").exists()
    (cut / "checkpoint-9").mkdir()  # cut short while it was written
    ran = train(cut, *words, "resume=true")
    assert ran.returncode == 0, ran.stderr
    assert "checkpoint-9 was not written to its end" in ran.stderr
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantized_weights_take_adapters(tmp_path, quantization):
    ran = train(tmp_path / "out", "max_steps=2", f"quantization={quantization}", "checkpointing=true")
    assert ran.returncode == 0, ran.stderr
    assert len(losses(tmp_path / "out")) == 2


@pytest.mark.parametrize("zero", ["none", "2", "3"])
def test_two_processes_learn_as_one_does(tmp_path, zero):
    """The same rows a step: two processes of one row each, and one of two."""
    words = ["max_steps=3", "ratio=0.8", "lora_dropout=0", "dtype=float32"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(one, *words).returncode == 0
    ran = train(two, *words, "batch_size=1", f"zero={zero}", "processes=2")
    assert ran.returncode == 0, ran.stderr
    assert losses(two) == pytest.approx(losses(one), rel=2e-3)
    model, _ = load(str(two))
    assert max(w.abs().max() for n, w in model.state_dict().items() if "lora_B" in n) > 0


@pytest.mark.parametrize("zero", ["2", "3"])
def test_half_precision_distillation_and_a_tower_that_learns_go_on_after_a_stop(tmp_path, zero):
    words = ["ratio=0.8,0.9", "distill=true", "tower=lora", f"zero={zero}", "processes=2", "save_steps=2",
             "accumulate=2", "checkpointing=true", "batch_size=1", "max_steps=4"]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    ran = train(whole, *words)
    assert ran.returncode == 0, ran.stderr
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-4")  # as if it had been killed behind step 2
    (cut / "training.json").unlink()
    ran = train(cut, *words, "resume=true")
    assert ran.returncode == 0, ran.stderr
    assert "loss" in ran.stdout + ran.stderr
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-3)


def test_the_card_holds_what_was_measured_before_and_after(tmp_path):
    ran = train(tmp_path / "out", "max_steps=2", "ratio=0.8,1.0", "evaluate=true", "limit=6", "processes=2")
    assert ran.returncode == 0, ran.stderr
    measured = json.loads((tmp_path / "out" / "training.json").read_text())["accuracy"]
    assert [row["tokens"] for row in measured] == [196, 19]  # ratio 1 is the unmerged model
    card = (tmp_path / "out" / "README.md").read_text()
    for row in measured:
        before, after = (
            f"{row[side]['mean']:.1f} ± {row[side]['stderr']:.1f}" for side in ("before", "after")
        )
        assert f"| {row['tokens']} | {before} | {after} |" in card
