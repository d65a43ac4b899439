"""Resuming a run: the checkpoints in its folder, and whether a run may continue from them."""

import json
import logging
from pathlib import Path
from typing import Any

log = logging.getLogger("train.checkpoint")
OPTIONS, RESULT = "options.json", "training.json"  # written when a run starts, and when it ends
TRAINER_STATE = "trainer_state.json"  # the last file of a checkpoint that the Trainer writes
RNG_STATES = "rng_state*.pth"  # one per process
# options that may differ when a run is resumed
MUTABLE = ("output", "resume", "evaluate", "limit", "workers", "skip_broken", "save_steps", "log_steps")


def find_start(output: Path, options: dict[str, Any], processes: int) -> Path | None:
    """The checkpoint from which a run in `processes` processes starts; None for a new run.

    Raises:
        ValueError: there is no checkpoint to resume from, it was made with other options, or a new run would
            overwrite one.
    """
    last = _last_complete(output, processes)
    if not options["resume"]:
        if last is not None:
            raise ValueError(f"output={output} holds checkpoints: use resume=true, or another output=")
        if incomplete := sorted(path.name for path in output.glob("checkpoint-*")):
            raise ValueError(
                f"output={output} holds checkpoints that no run can resume from: delete "
                f"{', '.join(incomplete)}"
            )
        return None
    if last is None:
        raise ValueError(
            f"resume=true, but output={output} holds no complete checkpoint of {processes} processes"
        )
    before, now = json.loads((output / OPTIONS).read_text()), _fixed(options)
    changed = [f"{k}={now[k]} (was {before.get(k)})" for k in now if now[k] != before.get(k)]
    if changed:
        raise ValueError(f"{output} was made with other options: {', '.join(changed)}")
    return last


def write_options(output: Path, options: dict[str, Any]) -> None:
    """Writes the options with which a run starts."""
    output.mkdir(parents=True, exist_ok=True)
    (output / OPTIONS).write_text(json.dumps(_fixed(options), indent=1) + "\n")


def read_result(output: Path) -> dict[str, Any] | None:
    """The training.json of a run; None if the run has not ended."""
    file = output / RESULT
    return json.loads(file.read_text()) if file.is_file() else None


def _fixed(options: dict[str, Any]) -> dict[str, Any]:
    """The options that must not change, as JSON returns them."""
    return json.loads(json.dumps({k: v for k, v in options.items() if k not in MUTABLE}))


def _last_complete(output: Path, processes: int) -> Path | None:
    """The last complete checkpoint; transformers' `get_last_checkpoint` also returns a truncated one."""
    steps = {int(p.name[11:]): p for p in output.glob("checkpoint-*") if p.name[11:].isdecimal()}
    for step in sorted(steps, reverse=True):
        if _is_complete(steps[step], processes):
            return steps[step]
        log.warning("%s is incomplete; going back to the one before", steps[step])
    return None


def _is_complete(checkpoint: Path, processes: int) -> bool:
    """Whether the checkpoint has every file that a run in `processes` processes writes."""
    try:
        json.loads((checkpoint / TRAINER_STATE).read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return len(list(checkpoint.glob(RNG_STATES))) == processes
