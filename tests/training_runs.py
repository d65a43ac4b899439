"""Training on the embedded model and scenes, as tests start it, and the losses that it logs."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON = (sys.executable, "-m")  # how a module is run
WORDS = ["scenes=24", "batch_size=2", "max_length=1024", "lora_rank=8", "lora_alpha=16", "lr=2e-3"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def arguments(output: Path, *words: str) -> list[str]:
    """The words of a short run, and some of the test's own."""
    given = {word.partition("=")[0] for word in words}
    given |= {"scenes"} if "data" in given else set()
    return [word for word in WORDS if word.partition("=")[0] not in given] + [f"output={output}", *words]


def train(output: Path, *words: str) -> int:
    """Trains in this process; returns the exit status."""
    from train.run import main

    return main(arguments(output, *words))


def spawn(output: Path, *words: str, launcher: tuple[str, ...] = PYTHON):
    """Trains in processes of its own, from a working directory other than the checkout."""
    command = [*launcher, "train.run", *arguments(output, *words)]
    output.parent.mkdir(exist_ok=True, parents=True)
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=ENVIRONMENT, cwd=output.parent
    )


def facts(output: Path) -> dict:
    return json.loads((output / "training.json").read_text())


def losses(output: Path, key: str = "loss") -> dict[int, float]:
    return {row["step"]: row[key] for row in facts(output)["log"] if key in row}
