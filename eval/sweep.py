"""Every method in every place at every number of tokens: python eval/sweep.py key=value ...

Each combination is one run of eval/run.py in a process of its own; the unmerged model runs once. At the end
all are timed in turns. What is finished is not run again: the same command goes on where it was stopped.
Writes sweep.json, timing.json and a folder a combination; eval/report.py makes tables and pictures of them.
"""

import json
import sys
from pathlib import Path

from eval import batch, readers, timing
from eval.combinations import PLACES, SHARES, Combination, every
from eval.helping import helped
from eval.labels import RESIZE
from eval.run import OPTIONS as RUN
from eval.run import planned
from llava_pitome.cli.options import Option, boolean, folder, listed, parse, whole
from llava_pitome.config import RECIPES
from llava_pitome.methods import METHODS

NAMES = (*METHODS, *(name for name in RECIPES if name != "paper"), RESIZE)
PASSED = ("model", "tasks", "data", "limit", "batch_size", "dtype", "attention", "text")  # to every run
OPTIONS = {
    "methods": Option(
        NAMES,
        listed,
        "methods, recipes, RECIPE:METHOD or resize, with commas; NAME@PLACE is run there alone",
        "what to compare",
    ),
    "tokens": Option(
        None, readers.counts, "whole numbers, with commas", "that stay; half, 30, 20 and 10 % where not given"
    ),
    "places": Option(
        PLACES,
        listed,
        "tower, prefix, tower+prefix, decoder:K, with commas",
        "where; K is a layer of the LLM",
    ),
    "seeds": Option((0, 1, 2), readers.counts, "whole numbers, with commas", "of methods that draw"),
    **{key: RUN[key] for key in PASSED},
    "model": RUN["model"]._replace(default="embedded"),
    "output": Option("output/sweep", folder, "a folder, not a file", "where everything goes"),
    "jobs": Option(None, whole(1), "a whole number from 1", "processes at a time; one a GPU, or one a core"),
    "timing": Option(True, boolean, "true | false", "time all of them at the end"),
    "rounds": timing.OPTIONS["rounds"],
    "new_tokens": timing.OPTIONS["new_tokens"],
    "dry_run": Option(False, boolean, "true | false", "say what would run, with its FLOPs, and stop"),
}


def main(words: list[str]) -> int:
    """Runs a sweep; returns the command's exit status."""
    if helped(words, __doc__, OPTIONS):
        return 0
    try:
        options = parse(words, OPTIONS)
        output = Path(options["output"]).resolve()
        environments = batch.slots(options["jobs"])
        runs = planned_runs(options, output)
    except ValueError as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 2
    from eval.campaign import carry_out, show, tell_skipped

    if options["dry_run"]:
        show(runs)
        return 0
    tell_skipped(runs)
    timed = timing.Timed(options["rounds"], options["new_tokens"]) if options["timing"] else None
    return carry_out(output, runs, environments, timed)


def planned_runs(options: dict, output: Path) -> list:
    """Every run, checked against the model.

    Raises:
        ValueError: whatever does not fit together.
    """
    from eval.campaign import Run

    shared = [f"{key}={_word(options[key])}" for key in PASSED if options[key] != RUN[key].default]
    shared += ["baseline=false", f"questions={output / 'cache'}"]

    def run(combination: Combination) -> Run:
        if combination.skipped:
            return Run(combination)
        words = (*shared, *_said(combination), f"output={output / combination.name}")
        return Run(combination, words, planned(parse(words, RUN) | {"dry_run": options["dry_run"]}))

    plain = run(Combination("unmerged", "unmerged"))
    patches = plain.plan.sizes.parts.patches
    tokens = options["tokens"] or tuple(round(patches * share) for share in SHARES)
    found = every(options["methods"], options["places"], tokens, options["seeds"], patches)
    return [run(combination) for combination in found]


def _said(combination: Combination) -> list[str]:
    """The words of eval/run.py that say how to merge."""
    if combination.fields is None:
        return ["ratio=1"]
    return [f"recipe={combination.recipe}", f"merging={json.dumps(combination.fields)}"]


def _word(value: object) -> str:
    """A value as it would be typed."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
