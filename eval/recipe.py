"""Runs every line of a recipe: python -m eval.recipe FILE key=value ...

A line is name=FOLDER and the words of one `python -m eval.run`; the words of a line that starts with `every`
apply to all lines below it. `budget` is the number of tokens at which a run is compared, by default what its
last layer keeps. Further words apply to every run and override the recipe's, except for these:
"""

import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

from eval import timing
from eval.command import count
from eval.naming import UNMERGED, place_of
from eval.run import OPTIONS as RUN_OPTIONS
from eval.run import make_plan
from eval.sweep.combinations import Combination
from eval.sweep.processes import environments
from eval.sweep.runs import EXECUTION_OPTIONS, Run, print_runs, run_all
from llava_pitome.cli.options import Option, parse, usage

RECIPES = sorted((Path(__file__).parent / "recipes").glob("*.txt"))
OPTIONS = {
    "output": Option(
        None, str, "a folder", "where everything is written; by default output/ and the recipe's name"
    ),
    **EXECUTION_OPTIONS,
    "timing": EXECUTION_OPTIONS["timing"]._replace(default=False),
}
LINE_OPTIONS = {  # of a line, beside those of eval.run
    "name": Option(None, str, "a folder", "below output, of the run"),
    "budget": count(None, "tokens at which it is compared"),
}


class Recipe(NamedTuple):
    """A recipe whose runs are known to fit their models: the runs by the folder that holds them."""

    options: dict[str, Any]
    environments: list[dict[str, str]]
    folders: dict[Path, list[Run]]


def main(words: list[str]) -> int:
    """Runs a recipe; returns the command's exit status."""
    if not words or {"help", "--help", "-h"} & set(words):
        print(f"{__doc__}{usage(OPTIONS)}\nRecipes: {', '.join(map(str, RECIPES))}")
        return 0 if words else 2
    try:
        recipe = prepare(Path(words[0]), words[1:])
    except ValueError as error:
        print(f"recipe: {error}", file=sys.stderr)
        return 2
    if recipe.options["dry_run"]:
        for runs in recipe.folders.values():
            print_runs(runs)
        return 0
    time_settings = timing.settings(recipe.options)
    return max(run_all(*each, recipe.environments, time_settings) for each in recipe.folders.items())


def prepare(file: Path, words: list[str]) -> Recipe:
    """The recipe in a file with further words.

    Raises:
        ValueError: no such file, or words or lines that are not allowed.
    """
    if not file.is_file():
        raise ValueError(f"{file} is no recipe; there are {', '.join(map(str, RECIPES))}")
    own = [word for word in words if word.partition("=")[0] in OPTIONS]
    options = parse(own, OPTIONS)
    output = Path(options["output"] or Path("output") / file.stem).resolve()
    further = [word for word in words if word not in own]
    folders = make_runs(file, further, options["dry_run"], output)
    return Recipe(options, environments(options["jobs"]), folders)


def make_runs(file: Path, further: list[str], dry_run: bool, output: Path) -> dict[Path, list[Run]]:
    """The runs of a recipe by the folder that holds them, all of one model.

    Raises:
        ValueError: a line that is not allowed, with its number.
    """
    every: list[str] = []
    found: dict[Path, list[Run]] = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        words = shlex.split(line, comments=True)
        if words and words[0] == "every":
            every += words[1:]
        elif words:
            try:
                run = _make_run([*every, *words], further, dry_run, output)
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}") from error
            runs = found.setdefault(run.plan.output.parent, [])
            if any(r.plan.model != run.plan.model or r.plan.output == run.plan.output for r in runs):
                raise ValueError(
                    f"{file}, line {number}: {run.plan.output} is another line's, or another model's"
                )
            runs.append(run)
    if not found:
        raise ValueError(f"{file} holds no runs")
    return found


def _make_run(words: list[str], further: list[str], dry_run: bool, output: Path) -> Run:
    """One run; of words with the same key the last counts."""
    last = {word.partition("=")[0]: word for word in ("baseline=false", *words, *further)}
    line = parse([word for key, word in last.items() if key in LINE_OPTIONS], LINE_OPTIONS)
    if line["name"] is None:
        raise ValueError("name=FOLDER is missing")
    folder = output / line["name"]
    own = [word for key, word in last.items() if key not in LINE_OPTIONS]
    own += [f"questions={folder.parent / 'cache'}", f"output={folder}"]
    plan = make_plan(parse(own, RUN_OPTIONS) | {"dry_run": dry_run})
    return Run(_combination(folder.name, plan, line["budget"]), tuple(own), plan)


def _combination(name: str, plan: Any, budget: int | None) -> Combination:
    """The entry of a run in sweep.json."""
    if plan.is_unmerged:
        return Combination(name, UNMERGED)
    config, recipe = plan.merging, plan.options["recipe"]
    method = (plan.options["method"] or config.method) if recipe == "paper" else recipe
    last = config.llm_lengths(plan.cost(config).tokens, plan.shapes.shapes.llm_layers)[-1]
    fields = {k: v for k, v in config.to_dict().items() if k != "version"}
    seed = config.parameters.get("seed")
    return Combination(name, method, place_of(config), budget or last, seed, recipe, fields)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
