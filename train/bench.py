"""Times training with and without merging: python -m train.bench [tokens=20,39] [rounds=3] [key=value ...].

Each variant is trained in processes of its own, in alternation; options of train.run apply to all of them.
The table is printed and written to output/bench.md, every number to output/bench.json.
model=llava-7b-2layer and model=next-7b-2layer are LLaVA-1.5-7B and LLaVA-NeXT-7B with random weights and two
of their 32 language layers.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from llava_pitome.cli.bench import targets
from llava_pitome.cli.options import Option, folder, helped, parse, whole
from train import options as run_options
from train.checkpoint import read_result
from train.launch import unlaunched_environment

RANDOM_MODELS = ("llava-7b-2layer", "next-7b-2layer")
TOKENS = (20, 39)
MEASURED = ("step_seconds", "bytes_before", "bytes_most")
VARIED = ("ratio", "tokens", "max_steps", "epochs", "evaluate", "resume", "output")  # set by the bench itself
SHARED = {key: option for key, option in run_options.OPTIONS.items() if key not in VARIED}
OPTIONS = {
    "rounds": Option(3, whole(1), "a whole number from 1", "runs of each variant"),
    "steps": Option(12, whole(2), "a whole number from 2", "steps of a run; the first is not timed"),
    "output": Option("output/training_bench", folder, "a folder, not a file", "of the results"),
    "tokens": run_options.OPTIONS["tokens"]._replace(default=TOKENS, help="image tokens of the variants"),
} | SHARED


def main(words: Sequence[str]) -> int:
    """Times; returns the command's exit status."""
    if helped(words, __doc__, OPTIONS):
        return 0
    try:
        options = parse(words, OPTIONS)
        defaults = {key: option.default for key, option in run_options.OPTIONS.items()}
        run_options.check(defaults | {key: options[key] for key in (*SHARED, "tokens")})
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    output = Path(options["output"])
    output.mkdir(parents=True, exist_ok=True)
    shared = [word for word in words if word.partition("=")[0] in SHARED]
    if options["model"] in RANDOM_MODELS:
        shared = [word for word in shared if not word.startswith("model=")]
        shared.append(f"model={_random_model(output / options['model'])}")
    variants = {"unmerged": "ratio=1.0"} | {str(n): f"tokens={n}" for n in options["tokens"]}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for i in range(options["rounds"]):
        for name, word in variants.items():
            print(f"round {i + 1} of {options['rounds']}: {name}", file=sys.stderr, flush=True)
            runs[name].append(_train(output / "run", [*shared, word, f"max_steps={options['steps']}"]))
    first = runs["unmerged"][0]
    measured = {name: {key: [run[key] for run in found] for key in MEASURED} for name, found in runs.items()}
    facts = {
        "options": options,
        "machine": first["machine"],
        "packages": first["packages"],
        "sides": measured,
    }
    (output / "bench.json").write_text(json.dumps(facts, indent=1) + "\n")
    (output / "bench.md").write_text(f"{table(measured)}\n")
    print(table(measured))
    return 0


def _random_model(path: Path) -> Path:
    """The folder of the checkpoint with random weights, written if it does not exist."""
    if not (path / "config.json").exists():
        partial = path.with_name(f"{path.name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        targets.save_checkpoint(path.name, partial)
        partial.replace(path)
    return path


def _train(output: Path, words: list[str]) -> dict[str, Any]:
    """The training.json of one run, in a process of its own, as its peak memory counts.

    Raises:
        RuntimeError: the run failed.
    """
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "train.run", *words, f"output={output}"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=unlaunched_environment())
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{ran.stderr}")
    return read_result(output)


def table(variants: dict[str, dict[str, list[float]]]) -> str:
    """The variants as Markdown: medians over the rounds, speed-ups round by round.

    Args:
        variants: "unmerged" first; for each of them a list of every key in MEASURED, one number per round.
    """
    lines = ["| image tokens | seconds a step | times as fast | GB at most | of these held by training |"]
    lines.append(f"|{' --- |' * 5}")
    unmerged = variants["unmerged"]["step_seconds"]
    for name, (seconds, before, peak) in ((n, [v[key] for key in MEASURED]) for n, v in variants.items()):
        speedup = median(a / b for a, b in zip(unmerged, seconds))
        own = median(a - b for a, b in zip(peak, before))
        lines.append(
            f"| {name} | {median(seconds):.2f} | {speedup:.2f} | {median(peak) / 1e9:.2f} | {own / 1e9:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
