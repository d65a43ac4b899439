"""What training won: eval/run.py before and after, unmerged and merged in every way that was trained."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import launch

from llava_pitome import MergeConfig

EVALUATE = Path(__file__).parents[1] / "eval" / "run.py"


class NotMeasured(RuntimeError):
    """An evaluation failed."""


def accuracy(options: dict[str, Any], merging: Sequence[MergeConfig]) -> list[dict[str, Any]]:
    """Image tokens and accuracy, in per cent with its standard error, of the model and of the adapter on it.

    Unmerged comes first, then each way to merge.

    Args:
        options: of the run; results go below its output.
        merging: how to merge; one that stands there twice is measured once.

    Raises:
        NotMeasured: an evaluation failed; the adapter is written by then.
    """
    sides = {"before": options["model"], "after": options["output"]}
    found = {side: _side(side, path, options, merging) for side, path in sides.items()}
    return [
        {"tokens": rows[0]["image_tokens"], "merging": rows[0]["merging"]}
        | {side: {k: row["accuracy"][k] for k in ("mean", "stderr")} for side, row in zip(sides, rows)}
        for rows in zip(*found.values())
    ]


def _side(
    side: str, path: str, options: dict[str, Any], merging: Sequence[MergeConfig]
) -> list[dict[str, Any]]:
    """The unmerged row and one for each way that merges."""
    rows: list[dict[str, Any]] = []
    passed = [f"{key}={options[key]}" for key in ("quantization", "limit") if options[key] is not None]
    ways = [MergeConfig(ratio=1.0)]
    ways += [config for i, config in enumerate(merging) if config not in merging[:i]]
    for i, config in enumerate(ways):
        output = Path(options["output"]) / "evaluation" / f"{side}-{i}"
        words = [f"model={path}", f"merging={json.dumps(config.changes())}", f"output={output}"]
        words += [f"batch_size={options['batch_size']}", "baseline=false", *passed]
        ran = subprocess.run(
            [sys.executable, str(EVALUATE), *words],
            env=launch.alone(),
            capture_output=True,
            text=True,
            check=False,
        )
        if ran.returncode:
            raise NotMeasured(f"eval/run.py {' '.join(words)} failed:\n{ran.stderr}")
        (row,) = json.loads((output / "results.json").read_text())["rows"]
        if i == 0 or row["merging"] is not None:
            rows.append(row)
    return rows
