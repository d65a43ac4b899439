"""Several processes: checking what torchrun, deepspeed or accelerate launched, launching torchrun."""

import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LAUNCHER_PREFIXES = (  # of the environment variables that launchers set
    "RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "CROSS_"
)  # fmt: skip


def is_launched() -> bool:
    """Whether torchrun, deepspeed or accelerate launch started this process."""
    return "LOCAL_RANK" in os.environ


def without_local_rank(words: list[str]) -> list[str]:
    """The command's words without --local_rank=, which deepspeed adds to its environment variable."""
    return [word for word in words if not (is_launched() and word.startswith("--local_rank="))]


def world_size(options: dict[str, Any]) -> int:
    """Processes of the run, on all machines."""
    return int(os.environ.get("WORLD_SIZE", options["processes"]))


def check(options: dict[str, Any]) -> None:
    """Sets processes= to the number that was launched.

    Raises:
        ValueError: a launcher disagrees with the options; there are fewer GPUs than processes, or several
            GPUs for one process.
    """
    import torch

    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError("accelerate launch uses FSDP, which is not supported: use DeepSpeed, zero=2 or 3")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true" and not options["zero"]:
        raise ValueError("accelerate launch uses DeepSpeed: add zero=2 or zero=3")
    if is_launched():
        launched = world_size(options)
        if options["processes"] not in (1, launched):
            raise ValueError(
                f"processes={options['processes']}, but {launched} were launched; omit processes="
            )
        options["processes"] = launched
        return
    count = torch.cuda.device_count()
    if 0 < count < options["processes"]:
        raise ValueError(f"processes={options['processes']} is not allowed: it takes a GPU each, of {count}")
    if options["processes"] == 1 and count > 1:
        raise ValueError(
            f"one process and {count} GPUs: set processes={count}, or choose one with CUDA_VISIBLE_DEVICES"
        )


def module_environment() -> dict[str, str]:
    """Environment variables with which `python -m` finds train and eval from any working directory.

    A train.py of the user's in that directory does not shadow them.
    """
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}


def unlaunched_environment() -> dict[str, str]:
    """The environment of another command of this checkout, without the variables of a launcher."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_PREFIXES)}
    return inherited | module_environment()


def relaunch(words: list[str], processes: int) -> None:
    """Replaces this process by torchrun, which runs the command in `processes` processes; does not return."""
    threads = str(max((os.cpu_count() or 1) // processes, 1))
    environment = {"OMP_NUM_THREADS": threads} | os.environ | module_environment()
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
    ]
    os.execve(sys.executable, [*torchrun, "-m", "train.run", *words], environment)
