"""Searches for better settings: python -m eval.search [start=...] [pictures=N] [output=FILE] [jobs=N].

A greedy search on training images: of all changes of one setting, the one that helps most over all token
budgets is kept, until none helps. Every trial is written; a stopped search resumes from them.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eval.command import count, run_command, write_whole
from eval.embedded_accuracy import BUDGETS, TRAINING, evaluate_all
from llava_pitome import MergeConfig
from llava_pitome.cli.options import Option, fields

OPTIONS = {
    "start": Option({}, fields, "fields of MergeConfig as JSON", "where to begin; {}: the paper's recipe"),
    "pictures": count(1024, "training images, three questions each"),
    "gain": Option(0.1, float, "a number", "points on average by which a change must help"),
    "rounds": count(6, "changes to make at most"),
    "jobs": count(os.cpu_count() or 1, "processes"),
    "output": Option("output/search.json", str, "a file", "where the trials are written"),
}
CANDIDATES = {  # of MergeConfig, with the values to try
    "prefix_share": (0.0, 0.25, 0.5, 0.75, 1.0),
    "metric": ("keys", "hidden"),
    "prefix_metric": (None, "keys"),
    "site": ("attention", "block"),
    "size_weighted": (True, False),
    "proportional": (True, False),
    "llm_proportional": (False, True),
    "positions": ("packed", "original"),
    "order": ("raster", "method"),
    "depths": ((0.0, 1.0), (0.0, 0.5), (0.25, 1.0), (0.5, 1.0), (0.75, 1.0)),
}
PARAMETERS = {  # of PiToMe
    "candidates": (2.0, 3.0, 4.0, 6.0, None),
    "split": ("energy", "raster"),
    "start": (0.9, 0.7, 0.5),
    "end": (0.0, -0.5, 0.3, 0.5, 0.7, 0.8, 0.9),
    "alpha": (1.0, 0.3, 3.0),
    "energy": ("eq4", "elu"),
}
DEFAULTS = {"candidates": 2.0, "split": "energy", "start": 0.9, "end": 0.0, "alpha": 1.0, "energy": "eq4"}


def main(words: list[str]) -> int:
    """Searches; returns the command's exit status."""
    return run_command("search", __doc__, OPTIONS, words, _prepare, _execute)


def _prepare(options: dict[str, Any]) -> tuple[dict[str, Any], MergeConfig]:
    return options, MergeConfig.from_dict(options["start"] | {"tokens": BUDGETS[0]})


def _execute(prepared: tuple[dict[str, Any], MergeConfig]) -> None:
    """Searches, and prints every config that is kept."""
    options, best = prepared
    trials = Trials(options)
    (score,) = trials.scores([best])
    trials.keep(best)
    print(f"{score:.2f}  start: {changes(best)}", flush=True)
    for _ in range(options["rounds"]):
        changed = neighbours(best)
        found = trials.scores(changed)
        top = int(np.argmax(found))
        if found[top] < score + options["gain"]:
            break
        best, score = changed[top], found[top]
        trials.keep(best)
        print(f"{score:.2f}  {changes(best)}", flush=True)
    print(f"no further change gains {options['gain']} points; trials in {options['output']}")


class Trials:
    """Accuracies by config and budget, stored in a file."""

    def __init__(self, options: dict[str, Any]):
        """Reads what the file holds for the same images."""
        self.options = options
        self.file = Path(options["output"])
        self.accuracies: dict[str, list[float]] = {}
        self.kept: list[str] = []
        if self.file.exists():
            saved = json.loads(self.file.read_text())
            if saved["pictures"] == options["pictures"]:
                self.accuracies = saved["trials"]

    def scores(self, configs: list[MergeConfig]) -> list[float]:
        """The mean accuracy of each config over the budgets, in per cent."""
        new = [c for c in configs if changes(c) not in self.accuracies]
        trials = [replace(c, tokens=tokens) for c in new for tokens in BUDGETS]
        if trials:
            found = evaluate_all(trials, TRAINING, self.options["pictures"], self.options["jobs"])
            for config in new:
                self.accuracies[changes(config)] = [100 * float(next(found).mean()) for _ in BUDGETS]
                self._write()
        return [float(np.mean(self.accuracies[changes(c)])) for c in configs]

    def keep(self, config: MergeConfig) -> None:
        """Records a config as the best so far."""
        self.kept.append(changes(config))
        self._write()

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        facts = {key: self.options[key] for key in ("start", "gain")} | {"first_seed": TRAINING}
        facts |= {"pictures": self.options["pictures"], "budgets": BUDGETS}
        facts |= {"trials": self.accuracies, "path": self.kept}
        write_whole(self.file, json.dumps(facts, indent=1) + "\n")


def neighbours(config: MergeConfig) -> list[MergeConfig]:
    """The configs that differ in one setting."""
    found = [
        replace(config, **{name: value})
        for name, values in CANDIDATES.items()
        for value in values
        if value != getattr(config, name)
    ]
    own = DEFAULTS | config.parameters
    for name, values in PARAMETERS.items():
        for value in values:
            if value != own[name]:
                changed = {k: v for k, v in (own | {name: value}).items() if v != DEFAULTS[k]}
                found.append(replace(config, parameters=changed))
    return [c for c in found if has_effect(c)]


def has_effect(config: MergeConfig) -> bool:
    """Whether every field that a config changes has an effect."""
    default = MergeConfig(tokens=1)
    if not config.merges_in_tower:
        tower_only = ("metric", "site", "proportional", "depths")
        if any(getattr(config, name) != getattr(default, name) for name in tower_only) or (
            config.parameters.get("start", DEFAULTS["start"]) != DEFAULTS["start"]
        ):
            return False
    return config.merges_in_prefix or config.prefix_metric is None


def changes(config: MergeConfig) -> str:
    """What a config changes besides its tokens, as JSON."""
    return json.dumps({k: v for k, v in config.changes().items() if k != "tokens"}, sort_keys=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
