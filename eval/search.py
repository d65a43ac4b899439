"""Looks for a better way to merge: python eval/search.py [start=...] [pictures=N] [output=FILE] [jobs=N].

One setting after the other is changed, on training pictures alone; whichever change helps most over all token
budgets is kept, until none helps. Every trial is written down; a stopped search goes on from them.
"""

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from eval.helping import helped
from eval.quiz import BUDGETS, TRAINING, everyone
from llava_pitome import MergeConfig
from llava_pitome.cli.options import Option, parse, whole

OPTIONS = {
    "start": Option(
        {}, json.loads, "fields of MergeConfig as JSON", "where to begin; {}: the paper's recipe"
    ),
    "pictures": Option(1024, whole(1), "a whole number from 1", "training pictures, three questions each"),
    "gain": Option(0.1, float, "a number", "points on average by which a change must help"),
    "rounds": Option(6, whole(1), "a whole number from 1", "changes to make at most"),
    "jobs": Option(os.cpu_count() or 1, whole(1), "a whole number from 1", "processes"),
    "output": Option("output/search.json", str, "a file", "where the trials are written"),
}
FIELDS = {  # of MergeConfig, and what to try for each
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
    """Searches, and prints the way there."""
    if helped(words, __doc__, OPTIONS):
        return 0
    try:
        options = parse(words, OPTIONS)
        best = MergeConfig.from_dict(options["start"] | {"tokens": BUDGETS[0]})
    except ValueError as error:
        print(f"search: {error}", file=sys.stderr)
        return 2
    trials = Trials(Path(options["output"]), options["pictures"], options["jobs"])
    trials.asked = {"start": options["start"], "gain": options["gain"], "first_seed": TRAINING}
    (score,) = trials.scores([best])
    trials.way = []
    trials.keep(best)
    print(f"{score:.2f}  to begin with: {described(best)}", flush=True)
    for _ in range(options["rounds"]):
        changed = neighbours(best)
        found = trials.scores(changed)
        top = int(np.argmax(found))
        if found[top] < score + options["gain"]:
            break
        best, score = changed[top], found[top]
        trials.keep(best)
        print(f"{score:.2f}  {described(best)}", flush=True)
    print(f"nothing changes it by {options['gain']} or more; trials in {options['output']}")
    return 0


class Trials:
    """Accuracies by config and budget, kept in a file."""

    def __init__(self, path: Path, pictures: int, jobs: int):
        """Takes up what the file holds of the same pictures."""
        self.path, self.pictures, self.jobs = path, pictures, jobs
        self.known: dict[str, list[float]] = {}
        self.asked: dict[str, Any] = {}
        self.way: list[str] = []  # what was kept, one after the other
        if path.exists():
            held = json.loads(path.read_text())
            if held["pictures"] == pictures:
                self.known = held["trials"]

    def scores(self, configs: list[MergeConfig]) -> list[float]:
        """The mean accuracy of each config over the budgets, in per cent."""
        new = [c for c in configs if described(c) not in self.known]
        asked = [replace(c, tokens=tokens) for c in new for tokens in BUDGETS]
        if asked:
            found = everyone(asked, TRAINING, self.pictures, self.jobs)
            for config in new:
                self.known[described(config)] = [100 * float(next(found).mean()) for _ in BUDGETS]
                self._write()
        return [float(np.mean(self.known[described(c)])) for c in configs]

    def keep(self, config: MergeConfig) -> None:
        """Notes a config as the best so far."""
        self.way.append(described(config))
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".part")
        held = self.asked | {
            "pictures": self.pictures,
            "budgets": BUDGETS,
            "trials": self.known,
            "path": self.way,
        }
        partial.write_text(json.dumps(held, indent=1) + "\n")
        partial.replace(self.path)


def neighbours(config: MergeConfig) -> list[MergeConfig]:
    """The configs that differ in one setting."""
    found = [
        replace(config, **{name: value})
        for name, values in FIELDS.items()
        for value in values
        if value != getattr(config, name)
    ]
    own = DEFAULTS | config.parameters
    for name, values in PARAMETERS.items():
        for value in values:
            if value != own[name]:
                changed = {k: v for k, v in (own | {name: value}).items() if v != DEFAULTS[k]}
                found.append(replace(config, parameters=changed))
    return [c for c in found if matters(c)]


def matters(config: MergeConfig) -> bool:
    """Whether a config says nothing that has no effect."""
    plain = MergeConfig(tokens=1)
    if not config.merges_in_tower:
        tower_only = ("metric", "site", "proportional", "depths")
        if any(getattr(config, name) != getattr(plain, name) for name in tower_only) or (
            config.parameters.get("start", 0.9) != 0.9
        ):
            return False
    return config.merges_in_prefix or config.prefix_metric is None


def described(config: MergeConfig) -> str:
    """What a config changes, beside its tokens."""
    plain = asdict(MergeConfig(tokens=1))
    changes = {k: v for k, v in asdict(config).items() if v != plain[k] and k != "tokens"}
    return json.dumps(changes, sort_keys=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
