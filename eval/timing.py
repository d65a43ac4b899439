"""Times every combination of a sweep in one interleaved run: python -m eval.timing input=FOLDER key=value ...

Every round runs all combinations, so that other load on the machine affects all of them alike. Batch 1.
Writes timing.json.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eval.command import count, run_command, write_whole
from eval.sweep.processes import Job, identity
from llava_pitome import MergeConfig, embedded
from llava_pitome.cli.bench.environment import machine, packages
from llava_pitome.cli.bench.report import summarise
from llava_pitome.cli.bench.targets import target_of
from llava_pitome.cli.bench.timing import Workload, measure
from llava_pitome.cli.bench.variants import make_variant
from llava_pitome.cli.options import Option
from llava_pitome.models import checkpoints

WARMUP = 2  # rounds
OPTIONS = {
    "input": Option("output/sweep", str, "the folder of a sweep", "what to time"),
    "rounds": count(9, "times that each combination is timed"),
    "new_tokens": count(4, "generated tokens of an answer", low=2),
}


class TimingSettings(NamedTuple):
    """How often everything is timed, and the generated tokens of an answer."""

    rounds: int
    new_tokens: int


def main(words: list[str]) -> int:
    """Times a sweep; returns the command's exit status."""
    return run_command("timing", __doc__, OPTIONS, words, _prepare, _execute)


def settings(options: dict[str, Any]) -> TimingSettings | None:
    """The settings of a command that can time its runs; None where it is not to."""
    return TimingSettings(options["rounds"], options["new_tokens"]) if options["timing"] else None


def job(folder: Path, time_settings: TimingSettings) -> Job:
    """The process that times a sweep whose combinations are finished."""
    words = (f"input={folder}", *(f"{key}={value}" for key, value in time_settings._asdict().items()))
    known = identity(*_inputs(folder, time_settings))
    return Job("timing", ("-m", "eval.timing", *words), folder / "timing.json", known)


def _prepare(options: dict[str, Any]) -> tuple[Path, dict[str, Any], str]:
    """The folder, and what `_inputs` returns for it."""
    folder = Path(options["input"])
    if not (folder / "sweep.json").exists():
        raise ValueError(f"input={folder} holds no sweep.json: give a folder that eval.sweep has written")
    return folder, *_inputs(folder, TimingSettings(options["rounds"], options["new_tokens"]))


def _execute(prepared: tuple[Path, dict[str, Any], str]) -> None:
    """Times, and writes timing.json."""
    folder, inputs, fingerprint = prepared
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    workload = Workload(1, inputs["text"], (inputs["new_tokens"],), inputs["rounds"], WARMUP)
    with torch.inference_mode():
        rows = summarise(measure(_sides(inputs), workload))
    facts = {"options": inputs, "fingerprint": fingerprint, "machine": machine(), "packages": packages()}
    write_whole(folder / "timing.json", json.dumps(facts | {"rows": rows}, indent=1) + "\n")


def _inputs(folder: Path, time_settings: TimingSettings) -> tuple[dict[str, Any], str]:
    """Everything that the times depend on besides the code and the machine, and the sweep's fingerprint.

    Of a random method, only the first seed is timed. Prompts are as long as the first question's.

    Raises:
        ValueError: no combination of the sweep is finished.
    """
    sweep = json.loads((folder / "sweep.json").read_text())
    configs: dict[str, Any] = {}
    known, text = set(), None
    for c in sweep["combinations"]:
        file = folder / (c["folder"] or "") / "results.json"
        kind = (c["method"], c["place"], c["tokens"])
        if c["folder"] and file.exists() and (c["seed"] is None or kind not in known):
            known.add(kind)
            configs[c["name"]] = c["config"]
            row = json.loads(file.read_text())["rows"][-1]
            text = round(row["prompt_tokens"] - row["image_tokens"]) if text is None else text
    if not configs:
        raise ValueError(f"no combination of {folder} is finished, so there is nothing to time")
    shared = {k: sweep[k] for k in ("model", "dtype", "attention")} | time_settings._asdict()
    return shared | {"text": text, "configs": configs}, sweep["fingerprint"]


def _sides(inputs: dict[str, Any]) -> list:
    """A benchmark side for every config, all sharing one model; the unmerged model first."""
    path = str(embedded.PATHS.get(inputs["model"], inputs["model"]))
    model, _ = checkpoints.load(path, None, dtype=inputs["dtype"], attn_implementation=inputs["attention"])
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    target = target_of(inputs["model"], model)
    unmerged_first = sorted(inputs["configs"].items(), key=lambda item: item[1] is not None)
    return [
        make_variant(target, None if config is None else MergeConfig.from_dict(config), name, True, "off")
        for name, config in unmerged_first
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
