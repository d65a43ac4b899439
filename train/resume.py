"""Checkpoints of a run that was stopped."""

import json
import logging
from pathlib import Path

log = logging.getLogger("train.resume")
STATE = "trainer_state.json"  # what the Trainer writes last
RANDOM = "rng_state*.pth"  # one a process


def last(output: Path, processes: int) -> Path:
    """The newest whole checkpoint; one whose writing was cut short is left aside.

    Args:
        output: of the run.
        processes: that it runs in.

    Raises:
        ValueError: there is none.
    """
    steps = {int(p.name[11:]): p for p in output.glob("checkpoint-*") if p.name[11:].isdecimal()}
    for step in sorted(steps, reverse=True):
        if _whole(steps[step], processes):
            return steps[step]
        log.warning("%s was not written to its end; going back to the one before", steps[step])
    raise ValueError(f"resume=true, but output={output} holds no checkpoint that is whole")


def _whole(checkpoint: Path, processes: int) -> bool:
    """Whether everything is there that a run of so many processes writes."""
    try:
        json.loads((checkpoint / STATE).read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return len(list(checkpoint.glob(RANDOM))) == processes
