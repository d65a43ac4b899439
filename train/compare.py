"""Prints a table of accuracy before and after training: python -m train.compare FOLDER FOLDER ..."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_pitome.cli.options import helped
from train.checkpoint import RESULT, read_result


def main(folders: Sequence[str]) -> int:
    """Prints the table; returns the command's exit status."""
    if helped(folders, __doc__, {}):
        return 0
    try:
        if not folders:
            raise ValueError("name the folders of adapters that were trained with evaluate=true")
        print(table({Path(folder).name: read(Path(folder)) for folder in folders}))
    except ValueError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    return 0


def read(folder: Path) -> dict[str, Any]:
    """The training.json of a run.

    Raises:
        ValueError: there is none, or it has no accuracy.
    """
    facts = read_result(folder)
    if facts is None:
        raise ValueError(f"{folder} holds no {RESULT}: it must be the output of train.run")
    if not facts["accuracy"]:
        raise ValueError(f"{folder} was trained without evaluate=true: its accuracy is unknown")
    return facts


def table(runs: dict[str, dict[str, Any]]) -> str:
    """The runs as Markdown, one per line: per cent before → after at each number of image tokens.

    Args:
        runs: contents of training.json by the name of the run.
    """
    counts = sorted({row["tokens"] for facts in runs.values() for row in facts["accuracy"]}, reverse=True)
    lines = [f"| run | steps | minutes | {' | '.join(f'{n:.6g} tokens' for n in counts)} |"]
    lines.append(f"|{' --- |' * (3 + len(counts))}")
    for name, facts in runs.items():
        cells = {
            row["tokens"]: f"{row['before']['mean']:.1f} → {row['after']['mean']:.1f}"
            for row in facts["accuracy"]
        }
        accuracy = " | ".join(cells.get(n, "") for n in counts)
        lines.append(f"| {name} | {facts['steps']} | {facts['seconds'] / 60:.0f} | {accuracy} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
