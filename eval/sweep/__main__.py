"""Every method in every place at every number of tokens: python -m eval.sweep key=value ...

A model that cuts images into tiles is compared at shares of each image's own tokens. Each combination is one
`python -m eval.run` in its own process; the unmerged model runs once. At the end all of them are timed,
interleaved. Finished runs are not repeated: the same command resumes a stopped sweep.
Writes sweep.json, timing.json and a folder per combination, which `python -m eval.report` reads.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from eval import timing
from eval.command import run_command
from eval.naming import RESIZE, THUMBNAIL, UNMERGED
from eval.run import OPTIONS as RUN_OPTIONS
from eval.run import make_plan
from eval.sweep.combinations import PLACES, SHARES, TILED_SHARES, Combination, combinations
from eval.sweep.processes import environments
from eval.sweep.runs import EXECUTION_OPTIONS, Run, print_runs, print_skipped, run_all
from llava_pitome.cli.options import Option, amount, folder, listed, parse, several, whole
from llava_pitome.config import RECIPES
from llava_pitome.methods import METHODS
from llava_pitome.models.config_checks import check_tiles
from llava_pitome.models.parts import ModelParts

NAMES = (*METHODS, *(name for name in RECIPES if name != "paper"), RESIZE, THUMBNAIL)
SHARED = ("model", "tasks", "data", "limit", "batch_size", "dtype", "attention", "text")  # with eval.run
OPTIONS = {
    "methods": Option(
        NAMES,
        listed,
        "methods, recipes, RECIPE:METHOD, resize, thumbnail, with commas; NAME@PLACE runs there only",
        "what to compare",
    ),
    "tokens": Option(
        None,
        several(amount, distinct=True),
        "whole numbers, or shares in (0, 1) for a model that cuts images into tiles, with commas",
        "image tokens to keep; by default 50, 30, 20 and 10 %, with tiles also 5 %",
    ),
    "places": Option(
        PLACES,
        listed,
        "tower, prefix, tower+prefix, decoder:K, with commas",
        "where to merge; K is a layer of the LLM",
    ),
    "seeds": Option(
        (0, 1, 2), several(whole(0), distinct=True), "whole numbers, with commas", "of random methods"
    ),
    **{key: RUN_OPTIONS[key] for key in SHARED},
    "model": RUN_OPTIONS["model"]._replace(default="embedded"),
    "output": Option("output/sweep", folder, "a folder, not a file", "where everything is written"),
    **EXECUTION_OPTIONS,
}


class Sweep(NamedTuple):
    """A sweep whose runs are known to fit the model."""

    options: dict[str, Any]
    folder: Path
    environments: list[dict[str, str]]
    runs: list[Run]


def main(words: list[str]) -> int:
    """Runs a sweep; returns the command's exit status."""
    return run_command("sweep", __doc__, OPTIONS, words, prepare, execute)


def prepare(options: dict[str, Any]) -> Sweep:
    """A sweep of these options.

    Raises:
        ValueError: a method, place or number of tokens that does not exist or fit the model.
    """
    output = Path(options["output"]).resolve()
    return Sweep(options, output, environments(options["jobs"]), make_runs(options, output))


def execute(sweep: Sweep) -> int:
    """Prints a dry run, or runs and times what is not finished."""
    if sweep.options["dry_run"]:
        print_runs(sweep.runs)
        return 0
    print_skipped(sweep.runs)
    return run_all(sweep.folder, sweep.runs, sweep.environments, timing.settings(sweep.options))


def make_runs(options: dict[str, Any], output: Path) -> list[Run]:
    """Every run, checked against the model.

    Raises:
        ValueError: as `prepare`.
    """
    shared = [f"{key}={_as_word(options[key])}" for key in SHARED if options[key] != RUN_OPTIONS[key].default]
    shared += ["baseline=false", f"questions={output / 'cache'}"]

    def run(combination: Combination) -> Run:
        if combination.skipped:
            return Run(combination)
        if shapes is not None and (reason := _refusal(combination, shapes.parts)):
            return Run(combination._replace(fields=None, skipped=reason))
        merging = ["ratio=1"]
        if combination.fields is not None:
            merging = [f"recipe={combination.recipe}", f"merging={json.dumps(combination.fields)}"]
        words = (*shared, *merging, f"output={output / combination.name}")
        return Run(combination, words, make_plan(parse(words, RUN_OPTIONS) | {"dry_run": options["dry_run"]}))

    shapes = None
    shapes = run(Combination(UNMERGED, UNMERGED)).plan.shapes
    patches, is_tiled = shapes.parts.patches, shapes.parts.llava.tiling is not None
    default = TILED_SHARES if is_tiled else tuple(round(patches * share) for share in SHARES)
    tokens = options["tokens"] or default
    found = combinations(options["methods"], options["places"], tokens, options["seeds"], patches, is_tiled)
    return [run(combination) for combination in found]


def _refusal(combination: Combination, parts: ModelParts) -> str | None:
    """Why a model that cuts images into tiles cannot merge by a method in a place; None where it can."""
    if combination.config is None or parts.llava.tiling is None:
        return None
    try:
        check_tiles(parts, combination.config)
    except ValueError as error:
        return str(error)
    return None


def _as_word(value: object) -> str:
    """A value as it is typed."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
