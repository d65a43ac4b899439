"""Training in several processes, with DeepSpeed, quantized, and killed: scripts/test_training.sh runs it."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from training_runs import ENVIRONMENT, PYTHON, arguments, facts, losses, spawn, train

from llava_pitome import load
from train import export

EXACT = ("ratio=0.8", "lora_dropout=0", "dtype=float32")  # comparable over numbers of processes
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": ("torchrun", "--standalone", "--nproc_per_node=2", "-m"),
    "deepspeed": ("deepspeed", "--num_accelerators", "2", "--master_port", "29517", "--module"),
    "accelerate": ("accelerate", "launch", "--use_deepspeed", "--num_processes", "2", "--num_machines", "1",
                   "--mixed_precision", "no", "--main_process_port", "29518", "-m"),
}  # fmt: skip


def ran(output: Path, *words: str, **options) -> str:
    """Trains in processes of its own; the standard error of a run that succeeds."""
    process = spawn(output, *words, **options)
    assert process.returncode == 0, process.stderr
    return process.stderr


def assert_same_training(one: Path, two: Path) -> None:
    """Losses, gradient norms and everything that is saved agree."""
    for key in ("loss", "grad_norm"):
        assert losses(two, key) == pytest.approx(losses(one, key), rel=1e-3)
    first, second = (load_file(path / "adapter_model.safetensors") for path in (one, two))
    assert first.keys() == second.keys() and any("multi_modal_projector" in name for name in first)
    plain = load("embedded")[0].state_dict()
    for name, weight in first.items():
        start = plain[name.removeprefix("base_model.model.")] if "multi_modal" in name else 0.0
        assert (second[name] - weight).norm() <= 1e-3 * (weight - start).norm(), name


def assert_resumes(whole: Path, words: list[str], last: int, rel: float, train=train) -> None:
    """A run that lost its last checkpoint continues with the losses of the whole run."""
    cut = whole.with_name("cut")
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / f"checkpoint-{last}")
    (cut / "training.json").unlink()
    train(cut, *words, "resume=true")
    assert losses(cut) == pytest.approx(losses(whole), rel=rel)


def is_written(file):
    """Whether a file of JSON is there, and whole."""
    try:
        return bool(json.loads(file.read_text()))
    except (OSError, ValueError):
        return False


def test_killed_run_resumes_with_the_same_losses(tmp_path):
    words = ("max_steps=6", "ratio=0.8,0.9", "distill=true", "tower=lora", "save_steps=2", "lora_dropout=0.1",
             "group_by_length=true")  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(whole, *words) == 0
    command = [*PYTHON, "train.run", *arguments(cut, *words)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not is_written(cut / "checkpoint-2" / "trainer_state.json") and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cut / "training.json").exists()
    (cut / "checkpoint-9").mkdir()  # truncated
    assert "checkpoint-9 is incomplete" in ran(cut, *words, "resume=true")
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
@pytest.mark.parametrize("words", [("checkpointing=true",), ("zero=2", "processes=2")])
def test_quantized_weights_are_trained_with_adapters(tmp_path, quantization, words):
    ran(tmp_path / "out", "max_steps=2", f"quantization={quantization}", *words)
    assert len(losses(tmp_path / "out")) == 2


@pytest.mark.parametrize("zero", ["none", "2", "3"])
def test_two_processes_train_as_one_does(tmp_path, zero):
    """With the same rows in a step: two processes of one row each, and one of two."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(one, *EXACT, "max_steps=6", "tower=lora") == 0
    ran(two, *EXACT, "max_steps=6", "tower=lora", "batch_size=1", f"zero={zero}", "processes=2")
    assert_same_training(one, two)


@pytest.mark.parametrize("zero", ["2", "3"])
def test_zero_resumes_with_distillation_accumulation_and_checkpointing(tmp_path, zero):
    words = ["ratio=0.8,0.9", "distill=true", "tower=lora", f"zero={zero}", "processes=2", "save_steps=2",
             "accumulate=2", "checkpointing=true", "batch_size=1", "max_steps=4"]  # fmt: skip
    ran(tmp_path / "whole", *words)
    assert_resumes(tmp_path / "whole", words, last=4, rel=1e-3, train=ran)


def test_length_groups_resume_in_a_later_epoch(tmp_path):
    words = ["scenes=6", "epochs=3", "save_steps=1", "group_by_length=true", "lora_dropout=0"]
    assert train(tmp_path / "whole", *words) == 0
    assert_resumes(tmp_path / "whole", words, last=9, rel=1e-5)


def test_accuracy_before_and_after_is_in_the_model_card(tmp_path):
    """Also when it is measured by a later command."""
    output, words = tmp_path / "out", ("max_steps=2", "ratio=0.8,1.0", "processes=2")
    ran(output, *words)
    ran(output, *words, "resume=true", "evaluate=true", "limit=6")
    measured, card = facts(output)["accuracy"], (output / "README.md").read_text()
    assert [row["tokens"] for row in measured] == [196, 19]  # ratio 1 is the unmerged model
    for row in measured:
        before, after = (f"{row[s]['mean']:.1f} ± {row[s]['stderr']:.1f}" for s in ("before", "after"))
        assert f"| {row['tokens']} | {before} | {after} |" in card


@pytest.mark.parametrize(("launcher", "zero"), [("torchrun", "2"), ("deepspeed", "2"), ("accelerate", "3")])
def test_launchers_start_a_run(tmp_path, launcher, zero):
    one, two = tmp_path / "one", tmp_path / "two"
    name, *flags = LAUNCHERS[launcher]
    assert train(one, *EXACT, "max_steps=4") == 0
    ran(two, *EXACT, "max_steps=4", "batch_size=1", f"zero={zero}", launcher=(str(BIN / name), *flags))
    assert facts(two)["options"]["processes"] == 2
    assert_same_training(one, two)


def test_accumulated_batches_train_as_one_batch_does(tmp_path):
    """Rows differ in length and in answer tokens; each token of a step has the same weight."""
    one, four = tmp_path / "one", tmp_path / "four"
    assert train(one, *EXACT, "max_steps=3", "distill=true", "batch_size=4") == 0
    assert train(four, *EXACT, "max_steps=3", "distill=true", "batch_size=1", "accumulate=4") == 0
    assert losses(four) == pytest.approx(losses(one), rel=1e-4)


@pytest.mark.parametrize("more", [(), ("workers=2",), ("processes=2",)])
def test_unreadable_image_ends_a_run_and_is_skipped_on_resume(tmp_path, more):
    data, output = export.write(tmp_path / "data", 12), tmp_path / "out"
    image = tmp_path / "data" / "images" / f"{export.FIRST_SEED + 5}.png"
    image.write_bytes(b"not an image")
    words = [f"data={data}", "epochs=1", "save_steps=1", *more]
    failed = spawn(output, *words)
    assert failed.returncode
    message = f"1 rows are broken, skip_broken=0 are allowed: row 5: image {image} cannot be read"
    assert f"train: {message}" in failed.stderr
    if not more:
        assert "Traceback" not in failed.stderr
    if any(output.glob("checkpoint-*")):
        assert "skip_broken=, resume=true goes on" in failed.stderr
        words.append("resume=true")
    ran(output, *words, "skip_broken=1")
    assert facts(output)["broken"] == 1
