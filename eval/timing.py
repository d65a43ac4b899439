"""Times every combination of a sweep in one interleaved run: python eval/timing.py input=FOLDER key=value ...

All sides take turns in every round, so that whatever else the machine does falls on all of them. Batch 1.
Writes timing.json.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eval import batch
from eval.helping import helped
from llava_pitome import MergeConfig, embedded
from llava_pitome.cli.bench.environment import machine, packages
from llava_pitome.cli.bench.report import summarise
from llava_pitome.cli.bench.targets import Target
from llava_pitome.cli.bench.timing import Workload, measure
from llava_pitome.cli.bench.variants import make_variant
from llava_pitome.cli.options import Option, parse, whole
from llava_pitome.models import checkpoints
from llava_pitome.models import hf_llava as llava

ROUNDS, WARMUP, ANSWER = 9, 2, 4
OPTIONS = {
    "input": Option("output/sweep", str, "the folder of a sweep", "what to time"),
    "rounds": Option(ROUNDS, whole(1), "a whole number from 1", "times that each is timed"),
    "new_tokens": Option(ANSWER, whole(2), "a whole number from 2", "tokens of an answer"),
}


class Timed(NamedTuple):
    """How often everything is timed, and the length of an answer."""

    rounds: int = ROUNDS
    new_tokens: int = ANSWER


def main(words: list[str]) -> int:
    """Times a sweep; returns the command's exit status."""
    if helped(words, __doc__, OPTIONS):
        return 0
    try:
        options = parse(words, OPTIONS)
        folder = Path(options["input"])
        asked, told = _asked(folder, Timed(options["rounds"], options["new_tokens"]))
    except (ValueError, OSError) as error:
        print(f"timing: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    workload = Workload(1, asked["text"], (asked["new_tokens"],), asked["rounds"], WARMUP)
    with torch.inference_mode():
        rows = summarise(measure(_sides(asked), workload))
    facts = {
        "options": asked,
        "fingerprint": told,
        "machine": machine(),
        "packages": packages(),
        "rows": rows,
    }
    partial = folder / "timing.json.part"
    partial.write_text(json.dumps(facts, indent=1) + "\n")
    partial.replace(folder / "timing.json")
    return 0


def job(folder: Path, timed: Timed) -> batch.Job:
    """The process that times a sweep whose combinations are finished."""
    words = (f"input={folder}", f"rounds={timed.rounds}", f"new_tokens={timed.new_tokens}")
    return batch.Job("timing", (__file__, *words), folder / "timing.json", batch.mark(*_asked(folder, timed)))


def _asked(folder: Path, timed: Timed) -> tuple[dict[str, Any], str]:
    """Everything that the times depend on but the code and the machine, and the fingerprint of these.

    Of a method that draws, the first seed alone is timed. Prompts are as long as the first question's.

    Raises:
        ValueError: nothing of the sweep is finished.
        OSError: there is no sweep in the folder.
    """
    sweep = json.loads((folder / "sweep.json").read_text())
    configs: dict[str, Any] = {}
    seen, text = set(), None
    for c in sweep["combinations"]:
        file = folder / (c["folder"] or "") / "results.json"
        kind = (c["method"], c["place"], c["tokens"])
        if c["folder"] and file.exists() and (c["seed"] is None or kind not in seen):
            seen.add(kind)
            configs[c["name"]] = c["config"]
            row = json.loads(file.read_text())["rows"][-1]
            text = row["prompt_tokens"] - row["image_tokens"] if text is None else text
    if not configs:
        raise ValueError(f"no combination of {folder} is finished, so there is nothing to time")
    asked = {k: sweep[k] for k in ("model", "dtype", "attention")} | timed._asdict()
    return asked | {"text": text, "configs": configs}, sweep["fingerprint"]


def _sides(asked: dict[str, Any]) -> list:
    """A side for every config, which share their weights; the unmerged model first."""
    path = str(embedded.PATH) if asked["model"] == "embedded" else asked["model"]
    model, _ = checkpoints.load(path, None, dtype=asked["dtype"], attn_implementation=asked["attention"])
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    target = Target(asked["model"], model, True, llava.find(model).patches)
    plain_first = sorted(asked["configs"].items(), key=lambda named: named[1] is not None)
    return [
        make_variant(target, None if config is None else MergeConfig.from_dict(config), name)
        for name, config in plain_first
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
