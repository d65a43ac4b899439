"""Many runs carried out: their list in sweep.json, a process each, and at the end their timing."""

import json
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from eval import batch, timing
from eval.combinations import Combination
from eval.plan import Plan
from eval.questions import EMBEDDED_TASK
from llava_pitome import embedded
from llava_pitome.embedded import dataset

SWEEP = "sweep.json"
HERE = Path(__file__).parent


class Run(NamedTuple):
    """A combination, and the words for eval/run.py that run it; neither words nor plan where none does."""

    combination: Combination
    words: tuple[str, ...] = ()
    plan: Plan | None = None


def carry_out(
    folder: Path, runs: list[Run], environments: list[dict[str, str]], timed: timing.Timed | None
) -> int:
    """Runs what is not finished, each in a folder of its own; returns the command's exit status.

    Args:
        folder: for everything.
        runs: of one model.
        environments: of the processes that run at a time, see `batch.slots`.
        timed: how to time all of them at the end; None: not at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plans = [run.plan for run in runs if run.plan is not None]
    _write(folder, runs, plans[0])
    if any(plan.tasks == (EMBEDDED_TASK,) for plan in plans):
        dataset.write(plans[0].embedded_folder())  # once for all
    work = [
        batch.Job(
            run.combination.name,
            (str(HERE / "run.py"), *run.words),
            run.plan.output / "results.json",
            batch.mark(run.plan.options, run.plan.fingerprint),
        )
        for run in runs
        if run.plan is not None
    ]
    failed = batch.run(work, environments)
    if timed is not None:
        failed |= batch.run([timing.job(folder, timed)], [{}])
    for name, said in failed.items():
        print(f"\nsweep: {name} failed: {said}", file=sys.stderr)
    if failed:
        print(
            f"\nsweep: {len(failed)} of {len(work) + (timed is not None)} failed: {', '.join(failed)}; the "
            "same command goes on from there",
            file=sys.stderr,
        )
        return 1
    print(f"written to {folder}; a report of it: eval/report.py input={shlex.quote(str(folder))}")
    return 0


def _write(folder: Path, runs: list[Run], plan: Plan) -> None:
    """The list of combinations, and what they have in common."""
    listed = []
    for c, _, _ in runs:
        config = None if c.config is None else c.config.to_dict()
        told = {k: getattr(c, k) for k in ("name", "method", "place", "tokens", "seed", "skipped")}
        listed.append(told | {"config": config, "folder": None if c.skipped else c.name})
    o = plan.options
    facts = {
        "model": "embedded" if plan.model == str(embedded.PATH) else plan.model,
        "patches": plan.sizes.parts.patches,
        "tasks": plan.tasks,
        "dtype": o["dtype"],
        "attention": o["attention"],
        "limit": o["limit"],
        "fingerprint": plan.fingerprint,
    }
    partial = folder / f"{SWEEP}.part"
    partial.write_text(json.dumps(facts | {"combinations": listed}, indent=1) + "\n")
    partial.replace(folder / SWEEP)


def show(runs: list[Run]) -> None:
    """Prints what would run, what it costs, and what is skipped."""
    table = Table(title=None)
    for head in (
        "run",
        "tokens at the LLM",
        "mean over its layers",
        "tower",
        "projector",
        "LLM",
        "all GFLOPs",
    ):
        table.add_column(head, justify="left" if head == "run" else "right", overflow="fold")
    for run in runs:
        if run.plan is not None:
            cost = run.plan.cost(run.combination.config)
            flops = [*cost.flops, cost.flops.total]
            cells = [str(cost.tokens), f"{cost.llm_tokens:.4g}", *(f"{n / 1e9:.4g}" for n in flops)]
            table.add_row(run.combination.name, *cells)
    console = Console(width=None if Console().is_terminal else 120)
    first = next(run.plan for run in runs if run.plan is not None)
    console.print(first.announcement, highlight=False, soft_wrap=True)
    console.print(table)
    text = first.options["text"]
    print(
        f"FLOPs by formula, for one picture and {text} further tokens (text=), choosing and merging left out"
    )
    tell_skipped(runs)


def tell_skipped(runs: list[Run]) -> None:
    """Prints what does not run, a line a method and place."""
    skipped: dict[tuple[str, str, str], list[str]] = {}
    for c in (run.combination for run in runs if run.combination.skipped):
        skipped.setdefault((c.method, c.place, c.skipped), []).append(str(c.tokens))
    for (method, place, why), tokens in skipped.items():
        print(f"skipped {method} in {place} at {', '.join(tokens)} tokens: {why}")
