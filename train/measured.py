"""What training won: eval/run.py before and after, unmerged and merged in every way that was trained."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_pitome import MergeConfig
from llava_pitome.models import checkpoints
from train import launch

TOLD = 2000  # letters of what a failed evaluation wrote
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
    ways = [MergeConfig(ratio=1.0), *_merging(options["model"], merging)]
    sides = {"before": options["model"], "after": options["output"]}
    found = {
        side: [_row(f"{side}-{i}", path, options, config) for i, config in enumerate(ways)]
        for side, path in sides.items()
    }
    return [
        {"tokens": rows[0]["image_tokens"], "merging": rows[0]["merging"]}
        | {side: {k: row["accuracy"][k] for k in ("mean", "stderr")} for side, row in zip(sides, rows)}
        for rows in zip(*found.values())
    ]


def _merging(model: str, merging: Sequence[MergeConfig]) -> Iterator[MergeConfig]:
    """Each way once, but for those in which nothing merges."""
    patches, layers = checkpoints.patches_and_layers(model)
    for i, config in enumerate(merging):
        changes = config.decoder or config.resize or config.tokens_at(patches, layers) < patches
        if changes and config not in merging[:i]:
            yield config


def _row(name: str, path: str, options: dict[str, Any], config: MergeConfig) -> dict[str, Any]:
    """What eval/run.py finds."""
    output = Path(options["output"]) / "evaluation" / name
    words = [f"model={path}", f"merging={json.dumps(config.changes())}", f"output={output}"]
    words += [f"batch_size={options['batch_size']}", "baseline=false"]
    words += [f"{key}={options[key]}" for key in ("quantization", "limit") if options[key] is not None]
    ran = subprocess.run(
        [sys.executable, str(EVALUATE), *words],
        env=launch.alone(),
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise NotMeasured(f"eval/run.py {' '.join(words)} failed:\n{ran.stderr[-TOLD:]}")
    (row,) = json.loads((output / "results.json").read_text())["rows"]
    return row
