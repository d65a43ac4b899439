"""Accuracy before and after, run by run: python train/compare.py FOLDER FOLDER ... prints a table."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(folders: Sequence[str]) -> int:
    """Prints the table; returns the command's exit status."""
    try:
        if not folders:
            raise ValueError("name the folders of adapters that were trained with evaluate=true")
        print(table({Path(folder).name: read(Path(folder)) for folder in folders}))
    except ValueError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    return 0


def read(folder: Path) -> dict[str, Any]:
    """What a run left in training.json.

    Raises:
        ValueError: there is none, or nothing was measured.
    """
    file = folder / "training.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no training.json: it must be the output of train/run.py")
    facts = json.loads(file.read_text())
    if not facts["accuracy"]:
        raise ValueError(f"{folder} was trained without evaluate=true: its accuracy is not known")
    return facts


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Runs as Markdown, one a line: per cent before and after at each number of image tokens.

    Args:
        runs: by name, as `read` gives them.
    """
    counts = sorted({row["tokens"] for facts in runs.values() for row in facts["accuracy"]}, reverse=True)
    lines = [f"| run | steps | minutes | {' | '.join(f'{n} tokens' for n in counts)} |"]
    lines.append(f"|{' --- |' * (3 + len(counts))}")
    for name, facts in runs.items():
        found = {row["tokens"]: row for row in facts["accuracy"]}
        cells = [_cell(found[n]) if n in found else "" for n in counts]
        lines.append(f"| {name} | {facts['steps']} | {facts['seconds'] / 60:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    return f"{row['before']['mean']:.1f} → {row['after']['mean']:.1f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
