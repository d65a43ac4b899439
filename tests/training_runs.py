"""How the tests of training start it, and what it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUN = [sys.executable, str(ROOT / "train" / "run.py")]
WORDS = ["scenes=24", "batch_size=2", "max_length=1024", "lora_rank=8", "lora_alpha=16", "lr=2e-3"]
ALONE = os.environ | {"OMP_NUM_THREADS": "1"}


def command(output: Path, *words: str) -> list[str]:
    given = {word.partition("=")[0] for word in words}
    given |= {"scenes"} if "data" in given else set()
    usual = [word for word in WORDS if word.partition("=")[0] not in given]
    return [*RUN, *usual, f"output={output}", *words]


def train(output: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(output, *words), capture_output=True, text=True, check=False, env=ALONE)


def losses(output: Path, what: str = "loss") -> dict[int, float]:
    log = json.loads((output / "training.json").read_text())["log"]
    return {row["step"]: row[what] for row in log if what in row}
