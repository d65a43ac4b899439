"""Times training with and without merging: python train/bench.py [tokens=20,39] [rounds=3] [key=value ...].

Every side trains in processes of its own, in turns; keys of train/run.py go to all of them. A table is
printed, and written with every number to output/bench.md and output/bench.json. model=llava-7b-2layer is
LLaVA-1.5-7B with random weights and two of its 32 language layers.
"""

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from llava_pitome.cli.bench import targets
from llava_pitome.cli.options import Option, folder, parse, usage, whole
from train import launch, settings

RUN = Path(__file__).parent / "run.py"
SHAPES = "llava-7b-2layer"
COUNTS = (20, 39)
OURS = {
    "rounds": Option(3, whole(1), "a whole number from 1", "turns of every side"),
    "steps": Option(12, whole(2), "a whole number from 2", "steps of a turn; the first is not timed"),
    "output": Option("output/training_bench", folder, "a folder, not a file", "where results go"),
}
OWN = ("ratio", "tokens", "max_steps", "epochs", "evaluate", "resume", "output")  # said by the sides
PASSED = {key: option for key, option in settings.OPTIONS.items() if key not in OWN}
OPTIONS = OURS | {"tokens": settings.OPTIONS["tokens"]._replace(default=COUNTS)} | PASSED


def main(words: list[str]) -> int:
    """Times; returns the command's exit status."""
    if {"help", "-h", "--help"} & set(words):
        print(f"{__doc__}\n{usage(OPTIONS)}")
        return 0
    try:
        options = parse(words, OPTIONS)
        settings.check(
            {key: option.default for key, option in settings.OPTIONS.items()}
            | {key: options[key] for key in (*PASSED, "tokens")}
        )
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    output = Path(options["output"])
    output.mkdir(parents=True, exist_ok=True)
    passed = [word for word in words if word.partition("=")[0] in PASSED]
    if options["model"] == SHAPES:
        passed = [word for word in passed if not word.startswith("model=")]
        passed.append(f"model={_random(output / SHAPES)}")
    sides: dict[str, list[dict[str, Any]]] = {"unmerged": []} | {str(n): [] for n in options["tokens"]}
    for turn in range(options["rounds"]):
        for side, taken in sides.items():
            print(f"turn {turn + 1} of {options['rounds']}: {side}", file=sys.stderr, flush=True)
            taken.append(_turn(output, side, options["steps"], passed))
    _write(output, options, sides)
    return 0


def _random(path: Path) -> Path:
    """The folder of the checkpoint with random weights, which is written where it is not there."""
    if (path / "config.json").exists():
        return path
    partial = path.with_name(f"{path.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    targets.save_checkpoint(SHAPES, partial)
    partial.replace(path)
    return path


def _turn(output: Path, side: str, steps: int, passed: list[str]) -> dict[str, Any]:
    """What one run of a side took: step_seconds, bytes_before, bytes_most, and on what.

    Raises:
        RuntimeError: it failed.
    """
    run = output / "run"
    shutil.rmtree(run, ignore_errors=True)
    how = "ratio=1.0" if side == "unmerged" else f"tokens={side}"
    command = [sys.executable, str(RUN), *passed, how, f"max_steps={steps}", f"output={run}"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=launch.alone())
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{ran.stderr}")
    return json.loads((run / "training.json").read_text())


def _write(output: Path, options: dict[str, Any], sides: dict[str, list[dict[str, Any]]]) -> None:
    kept = ("step_seconds", "bytes_before", "bytes_most")
    first = sides["unmerged"][0]
    found = {
        "options": options,
        "machine": first["machine"],
        "packages": first["packages"],
        "sides": {side: {key: [run[key] for run in taken] for key in kept} for side, taken in sides.items()},
    }
    (output / "bench.json").write_text(json.dumps(found, indent=1) + "\n")
    told = table(found["sides"])
    (output / "bench.md").write_text(f"{told}\n")
    print(told)


def table(sides: dict[str, dict[str, list[float]]]) -> str:
    """The sides as Markdown: medians over turns, speed-ups turn by turn.

    Args:
        sides: of each, "unmerged" first, lists step_seconds, bytes_before and bytes_most, one number a turn.
    """
    head = "| image tokens | seconds a step | times as fast | GB at most | of these held by training |\n"
    rows = [f"{head}|{' --- |' * 5}"]
    plain = sides["unmerged"]["step_seconds"]
    for side, taken in sides.items():
        faster = statistics.median(a / b for a, b in zip(plain, taken["step_seconds"]))
        most = statistics.median(taken["bytes_most"])
        own = statistics.median(a - b for a, b in zip(taken["bytes_most"], taken["bytes_before"]))
        rows.append(
            f"| {side} | {statistics.median(taken['step_seconds']):.2f} | {faster:.2f} "
            f"| {most / 1e9:.2f} | {own / 1e9:.2f} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
