"""More than one process, or DeepSpeed: the same command again under torchrun."""

import os
import sys
from typing import Any

LAUNCHED = "LOCAL_RANK"  # set by torchrun, deepspeed and accelerate launch
OURS = (  # so begins what they set
    "RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "CROSS_"
)  # fmt: skip


def launched() -> bool:
    """Whether a launcher has started this process."""
    return LAUNCHED in os.environ


def without_rank(words: list[str]) -> list[str]:
    """The command's words without --local_rank=, which deepspeed adds; it is in the environment too."""
    return [word for word in words if not (launched() and word.startswith("--local_rank="))]


def world(options: dict[str, Any]) -> int:
    """Processes of the run, on all machines."""
    return int(os.environ.get("WORLD_SIZE", options["processes"]))


def check(options: dict[str, Any]) -> None:
    """Settles the number of processes.

    Raises:
        ValueError: a launcher has started another number than was asked for, or with another division of
            weights; or there are fewer GPUs than processes, or more than one for a single process.
    """
    import torch

    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            "accelerate launch was told to use FSDP; weights are divided by DeepSpeed: zero=2 or 3"
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true" and not options["zero"]:
        raise ValueError("accelerate launch was told to use DeepSpeed; say zero=2 or zero=3 as well")
    if launched():
        if options["processes"] not in (1, world(options)):
            raise ValueError(
                f"processes={options['processes']}, but {world(options)} were launched; leave processes= out"
            )
        options["processes"] = world(options)
        return
    count = torch.cuda.device_count()
    if 0 < count < options["processes"]:
        raise ValueError(
            f"processes={options['processes']} is not allowed: there are {count} GPUs, one for each"
        )
    if options["processes"] == 1 and count > 1:
        raise ValueError(
            f"one process and {count} GPUs: say processes={count}, or choose one with CUDA_VISIBLE_DEVICES"
        )


def alone() -> dict[str, str]:
    """The environment without what a launcher has put into it."""
    return {k: v for k, v in os.environ.items() if not k.startswith(OURS)}


def again(file: str, words: list[str], processes: int) -> None:
    """Becomes torchrun with this command in `processes` processes; does not return."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    os.execv(sys.executable, [*start, f"--nproc_per_node={processes}", file, *words])
