"""Runs that were stopped: what their folder holds, and what may go on from it."""

import json
import logging
from pathlib import Path
from typing import Any

log = logging.getLogger("train.resume")
OPTIONS, DONE = "options.json", "training.json"  # written when a run starts, and when it has ended
STATE = "trainer_state.json"  # what the Trainer writes last
RANDOM = "rng_state*.pth"  # one a process
# what may differ where a run goes on
FREE = ("output", "resume", "evaluate", "limit", "workers", "skip_broken", "save_steps", "log_steps")


def start(output: Path, options: dict[str, Any], processes: int) -> Path | None:
    """The checkpoint that a run begins with, if any.

    Args:
        output: of the run.
        options: of it.
        processes: that it runs in.

    Raises:
        ValueError: there is none to go on from, it was made with other options, or one would be written over.
    """
    newest = _newest(output, processes)
    if not options["resume"]:
        if newest is not None:
            raise ValueError(
                f"output={output} holds checkpoints: resume=true goes on, or name another folder"
            )
        if cut := sorted(path.name for path in output.glob("checkpoint-*")):
            raise ValueError(f"output={output} holds what no run can go on from: delete {', '.join(cut)}")
        return None
    if newest is None:
        raise ValueError(
            f"resume=true, but output={output} holds no checkpoint of {processes} processes that is whole"
        )
    before, asked = json.loads((output / OPTIONS).read_text()), _asked(options)
    changed = [f"{k}={asked[k]} (was {before.get(k)})" for k in asked if asked[k] != before.get(k)]
    if changed:
        raise ValueError(f"{output} was made with other options: {', '.join(changed)}")
    return newest


def note(output: Path, options: dict[str, Any]) -> None:
    """Writes with which options a run was started."""
    output.mkdir(parents=True, exist_ok=True)
    (output / OPTIONS).write_text(json.dumps(_asked(options), indent=1) + "\n")


def done(output: Path) -> dict[str, Any] | None:
    """What a run that has ended left in training.json."""
    file = output / DONE
    return json.loads(file.read_text()) if file.is_file() else None


def _asked(options: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({k: v for k, v in options.items() if k not in FREE}))


def _newest(output: Path, processes: int) -> Path | None:
    """The newest whole checkpoint; one whose writing was cut short is left aside."""
    steps = {int(p.name[11:]): p for p in output.glob("checkpoint-*") if p.name[11:].isdecimal()}
    for step in sorted(steps, reverse=True):
        if _whole(steps[step], processes):
            return steps[step]
        log.warning("%s was not written to its end; going back to the one before", steps[step])
    return None


def _whole(checkpoint: Path, processes: int) -> bool:
    """Whether everything is there that a run of so many processes writes."""
    try:
        json.loads((checkpoint / STATE).read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return len(list(checkpoint.glob(RANDOM))) == processes
