"""Accuracy before and after training: eval.run, unmerged and with every merge config of the run."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_pitome import MergeConfig, image_schedule
from llava_pitome.models import checkpoints
from train.launch import unlaunched_environment

MAX_STDERR = 2000  # characters of a failed evaluation's output in the error


class EvaluationError(RuntimeError):
    """An evaluation failed."""


def measure_accuracy(options: dict[str, Any], configs: Sequence[MergeConfig]) -> list[dict[str, Any]]:
    """Image tokens and accuracy, in per cent with its standard error, of the base model and of the adapter.

    The first row is unmerged, then one for each merge config.

    Args:
        options: of the run; results are written below its output.
        configs: of the run; repeated ones, and those that do not merge, are skipped.

    Raises:
        EvaluationError: an evaluation failed; the adapter is saved by then.
    """
    measured = [MergeConfig(ratio=1.0)]
    measured += [config for config in dict.fromkeys(configs) if _merges(config, options["model"])]
    sides = {"before": options["model"], "after": options["output"]}
    rows = []
    for i, config in enumerate(measured):
        found = {side: _evaluate(f"{side}-{i}", path, options, config) for side, path in sides.items()}
        accuracy = {side: {k: row["accuracy"][k] for k in ("mean", "stderr")} for side, row in found.items()}
        rows.append(
            {"tokens": found["before"]["image_tokens"], "merging": found["before"]["merging"]} | accuracy
        )
    return rows


def _merges(config: MergeConfig, model: str) -> bool:
    """Whether a config changes the tokens of a model's images."""
    if config.decoder or config.resize:
        return True
    if checkpoints.cuts_into_tiles(checkpoints.read_config(model)):
        return image_schedule.merges(config)
    patches, layers = checkpoints.patches_and_layers(model)
    return config.tokens_at(patches, layers) < patches


def _evaluate(name: str, model: str, options: dict[str, Any], config: MergeConfig) -> dict[str, Any]:
    """The row of results of one evaluation, in a process of its own: this one may belong to a launcher."""
    output = Path(options["output"]) / "evaluation" / name
    words = [f"model={model}", f"merging={json.dumps(config.changes())}", f"output={output}"]
    words += [f"batch_size={options['batch_size']}", "baseline=false"]
    words += [f"{key}={options[key]}" for key in ("quantization", "limit") if options[key] is not None]
    command = [sys.executable, "-m", "eval.run", *words]
    ran = subprocess.run(command, env=unlaunched_environment(), capture_output=True, text=True, check=False)
    if ran.returncode:
        raise EvaluationError(f"eval.run {' '.join(words)} failed:\n{ran.stderr[-MAX_STDERR:]}")
    (row,) = json.loads((output / "results.json").read_text())["rows"]
    return row
