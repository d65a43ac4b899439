"""Runs every line of a recipe: python eval/recipe.py FILE key=value ...

A line is name=FOLDER and the words of one eval/run.py command; the words of a line that starts with `every`
go to all lines below. `budget` says at how many tokens a run is compared, where that is not what is left at
its end. Further words go to every run and win over the recipe's, but for these:
"""

import shlex
import sys
from pathlib import Path

from eval import batch, timing
from eval.combinations import UNMERGED, Combination
from eval.labels import place
from eval.run import OPTIONS as RUN
from eval.run import planned
from llava_pitome.cli.options import Option, boolean, parse, usage, whole

RECIPES = Path(__file__).parent / "recipes"
OWN = {  # keys of the whole
    "output": Option(
        None, str, "a folder", "where everything goes; output/ and the recipe's name where not given"
    ),
    "jobs": Option(None, whole(1), "a whole number from 1", "processes at a time; one a GPU, or one a core"),
    "timing": Option(False, boolean, "true | false", "time all of them at the end"),
    "rounds": timing.OPTIONS["rounds"],
    "new_tokens": timing.OPTIONS["new_tokens"],
    "dry_run": RUN["dry_run"],
}
LINE = {  # keys of a line, beside those of eval/run.py
    "name": Option(None, str, "a folder", "below output, where the run goes"),
    "budget": Option(None, whole(1), "a whole number from 1", "tokens at which it is compared"),
}


def main(words: list[str]) -> int:
    """Runs a recipe; returns the command's exit status."""
    if not words or {"help", "--help", "-h"} & set(words):
        print(f"{__doc__}{usage(OWN)}\nRecipes: {', '.join(str(f) for f in sorted(RECIPES.glob('*.txt')))}")
        return 0 if words else 2
    try:
        file = Path(words[0])
        if not file.is_file():
            raise ValueError(
                f"{file} is no recipe; there are {', '.join(str(f) for f in RECIPES.glob('*.txt'))}"
            )
        mine = [word for word in words[1:] if word.partition("=")[0] in OWN]
        options = parse(mine, OWN)
        output = Path(options["output"] or Path("output") / file.stem).resolve()
        environments = batch.slots(options["jobs"])
        folders = planned_runs(file, [w for w in words[1:] if w not in mine], options["dry_run"], output)
    except ValueError as error:
        print(f"recipe: {error}", file=sys.stderr)
        return 2
    from eval.campaign import carry_out, show

    if options["dry_run"]:
        for runs in folders.values():
            show(runs)
        return 0
    timed = timing.Timed(options["rounds"], options["new_tokens"]) if options["timing"] else None
    return max(carry_out(folder, runs, environments, timed) for folder, runs in folders.items())


def planned_runs(file: Path, further: list[str], dry: bool, output: Path) -> dict[Path, list]:
    """The runs of a recipe by the folder that holds them, all of one model.

    Raises:
        ValueError: a line that does not fit, with its number.
    """
    from eval.campaign import Run

    every: list[str] = []
    found: dict[Path, list[Run]] = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        words = shlex.split(line, comments=True)
        if words and words[0] == "every":
            every += words[1:]
        elif words:
            try:
                run = _run([*every, *words], further, dry, output)
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


def _run(words: list[str], further: list[str], dry: bool, output: Path):
    """One run; of words with the same key the last counts."""
    from eval.campaign import Run

    last = {word.partition("=")[0]: word for word in ("baseline=false", *words, *further)}
    line = parse([word for key, word in last.items() if key in LINE], LINE)
    if line["name"] is None:
        raise ValueError("name=FOLDER is missing")
    folder = output / line["name"]
    shared = f"questions={folder.parent / 'cache'}"
    mine = (*(word for key, word in last.items() if key not in LINE), shared, f"output={folder}")
    plan = planned(parse(mine, RUN) | {"dry_run": dry})
    return Run(_combination(folder.name, plan, line["budget"]), mine, plan)


def _combination(name: str, plan, budget: int | None) -> Combination:
    """What sweep.json says of a run."""
    if plan.idle:
        return Combination(name, UNMERGED)
    config, options = plan.merging, plan.options
    named = options["method"] or config.method
    method = named if options["recipe"] == "paper" else options["recipe"]
    shapes = plan.sizes.shapes
    left = config.llm_lengths(plan.cost(config).tokens, shapes.llm_layers)[-1]
    fields = {k: v for k, v in config.to_dict().items() if k != "version"}
    seed = config.parameters.get("seed")
    where = place(config)
    return Combination(name, method, where, budget or left, seed, options["recipe"], fields)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
