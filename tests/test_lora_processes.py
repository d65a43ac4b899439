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
from training_runs import ALONE, ROOT, command, losses, train

from llava_pitome import load

sys.path.insert(0, str(ROOT / "train"))

import export


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


def assert_alike(one: Path, two: Path) -> None:
    """Two runs have learnt the same: losses, gradients' norms, and everything that is saved."""
    for what in ("loss", "grad_norm"):
        assert losses(two, what) == pytest.approx(losses(one, what), rel=1e-3)
    first, second = (load_file(path / "adapter_model.safetensors") for path in (one, two))
    assert first.keys() == second.keys() and any("multi_modal_projector" in name for name in first)
    plain = load("embedded")[0].state_dict()
    for name, weight in first.items():
        start = plain[name.removeprefix("base_model.model.")] if "multi_modal" in name else 0.0
        moved = (weight - start).norm()
        assert (second[name] - weight).norm() <= 1e-3 * moved, name


@pytest.mark.parametrize("zero", ["none", "2", "3"])
def test_two_processes_learn_as_one_does(tmp_path, zero):
    """The same rows a step: two processes of one row each, and one of two."""
    words = ["max_steps=6", "ratio=0.8", "lora_dropout=0", "dtype=float32", "tower=lora"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(one, *words).returncode == 0
    ran = train(two, *words, "batch_size=1", f"zero={zero}", "processes=2")
    assert ran.returncode == 0, ran.stderr
    assert_alike(one, two)


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
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-3)


def test_the_card_holds_what_was_measured_before_and_after(tmp_path):
    """Also where it is measured by a command of its own."""
    words = ("max_steps=2", "ratio=0.8,1.0", "processes=2")
    assert train(tmp_path / "out", *words).returncode == 0
    ran = train(tmp_path / "out", *words, "resume=true", "evaluate=true", "limit=6")
    assert ran.returncode == 0, ran.stderr
    measured = json.loads((tmp_path / "out" / "training.json").read_text())["accuracy"]
    assert [row["tokens"] for row in measured] == [196, 19]  # ratio 1 is the unmerged model
    card = (tmp_path / "out" / "README.md").read_text()
    for row in measured:
        before, after = (
            f"{row[side]['mean']:.1f} ± {row[side]['stderr']:.1f}" for side in ("before", "after")
        )
        assert f"| {row['tokens']} | {before} | {after} |" in card


BIN = Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2"],
    "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", "29517"],
    "accelerate": [str(BIN / "accelerate"), "launch", "--use_deepspeed", "--num_processes", "2",
                   "--num_machines", "1", "--mixed_precision", "no", "--main_process_port", "29518"],
}  # fmt: skip


@pytest.mark.parametrize(("launcher", "zero"), [("torchrun", "2"), ("deepspeed", "2"), ("accelerate", "3")])
def test_every_launcher_starts_it(tmp_path, launcher, zero):
    words = ["max_steps=4", "ratio=0.8", "lora_dropout=0", "dtype=float32"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(one, *words).returncode == 0
    started = [*LAUNCHERS[launcher], *command(two, *words, "batch_size=1", f"zero={zero}")[1:]]
    ran = subprocess.run(started, capture_output=True, text=True, check=False, env=ALONE)
    assert ran.returncode == 0, ran.stderr
    assert json.loads((two / "training.json").read_text())["options"]["processes"] == 2
    assert_alike(one, two)


def test_passes_of_a_step_learn_as_one_batch_does(tmp_path):
    """Rows of unlike lengths and answers: a token counts as much as any other of its step."""
    words = ["max_steps=3", "ratio=0.8", "lora_dropout=0", "dtype=float32", "distill=true"]
    one, four = tmp_path / "one", tmp_path / "four"
    assert train(one, *words, "batch_size=4").returncode == 0
    assert train(four, *words, "batch_size=1", "accumulate=4").returncode == 0
    assert losses(four) == pytest.approx(losses(one), rel=1e-4)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantized_weights_learn_in_two_processes(tmp_path, quantization):
    ran = train(tmp_path / "out", "max_steps=2", f"quantization={quantization}", "zero=2", "processes=2")
    assert ran.returncode == 0, ran.stderr
    assert len(losses(tmp_path / "out")) == 2


def test_rows_of_like_length_go_on_in_a_later_epoch(tmp_path):
    words = ["scenes=6", "epochs=3", "save_steps=1", "group_by_length=true", "lora_dropout=0"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(whole, *words).returncode == 0
    assert train(cut, *words).returncode == 0
    shutil.rmtree(cut / "checkpoint-9")  # as if it had been killed behind step 8, in the third epoch
    (cut / "training.json").unlink()
    ran = train(cut, *words, "resume=true")
    assert ran.returncode == 0, ran.stderr
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.parametrize("more", [(), ("workers=2",), ("processes=2",)])
def test_a_picture_that_cannot_be_read_ends_a_run_with_its_name_and_is_left_out_when_it_goes_on(
    tmp_path, more
):
    export.write(tmp_path / "data", 12)
    bad = tmp_path / "data" / "images" / f"{export.SEEDS + 5}.png"
    bad.write_bytes(b"no picture")
    words = [f"data={tmp_path / 'data' / 'conversations.json'}", "epochs=1", "save_steps=1", *more]
    ran = train(tmp_path / "out", *words)
    assert ran.returncode
    assert (
        f"train: 1 rows are broken, skip_broken=0 are allowed: row 5: image {bad} cannot be read"
        in ran.stderr
    )
    if not more:
        assert "Traceback" not in ran.stderr
    if any((tmp_path / "out").glob("checkpoint-*")):
        assert "skip_broken=, resume=true goes on" in ran.stderr
        words.append("resume=true")
    ran = train(tmp_path / "out", *words, "skip_broken=1")
    assert ran.returncode == 0, ran.stderr
    assert json.loads((tmp_path / "out" / "training.json").read_text())["broken"] == 1
