"""Carries out the runs of a sweep or a recipe: sweep.json, a process per run, and the timing at the end."""

import json
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from eval import timing
from eval.command import count, switch, write_whole
from eval.evaluation.plan import EvaluationPlan
from eval.naming import amount, amount_phrase
from eval.sweep.combinations import Combination
from eval.sweep.processes import Job, identity, run_jobs

SWEEP_FILE = "sweep.json"
EXECUTION_OPTIONS = {
    "jobs": count(None, "processes at a time; by default one per GPU, or one per core"),
    "timing": switch(True, "time all runs at the end"),
    "rounds": timing.OPTIONS["rounds"],
    "new_tokens": timing.OPTIONS["new_tokens"],
    "dry_run": switch(False, "print what would run, with its FLOPs, and stop"),
}


class Run(NamedTuple):
    """A combination with the words of its `python -m eval.run`, and their plan; None where it is skipped."""

    combination: Combination
    words: tuple[str, ...] = ()
    plan: EvaluationPlan | None = None


def run_all(
    folder: Path,
    runs: list[Run],
    environments: list[dict[str, str]],
    time_settings: timing.TimingSettings | None,
) -> int:
    """Runs what is not finished, each run in its own folder; returns the command's exit status.

    Args:
        folder: for everything.
        runs: of one model.
        environments: of the parallel processes, see `processes.environments`.
        time_settings: how to time all of them at the end; None: not at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    active = [run for run in runs if run.plan is not None]
    _write_list(folder, runs, active[0].plan)
    active[0].plan.write_embedded_data()  # once for all
    jobs = [
        Job(
            run.combination.name,
            ("-m", "eval.run", *run.words),
            run.plan.output / "results.json",
            identity(run.plan.options, run.plan.fingerprint),
        )
        for run in active
    ]
    failed = run_jobs(jobs, environments)
    if time_settings is not None:
        failed |= run_jobs([timing.job(folder, time_settings)], [{}])
    for name, log in failed.items():
        print(f"\nsweep: {name} failed: {log}", file=sys.stderr)
    if failed:
        print(
            f"\nsweep: {len(failed)} of {len(jobs) + (time_settings is not None)} failed: "
            f"{', '.join(failed)}; the same command resumes the sweep",
            file=sys.stderr,
        )
        return 1
    print(f"written to {folder}; a report of it: python -m eval.report input={shlex.quote(str(folder))}")
    return 0


def _write_list(folder: Path, runs: list[Run], plan: EvaluationPlan) -> None:
    """Writes the list of combinations, and what they have in common."""
    listed = []
    for c, _, _ in runs:
        entry = {k: getattr(c, k) for k in ("name", "method", "place", "tokens", "seed", "skipped")}
        config = None if c.config is None else c.config.to_dict()
        listed.append(entry | {"config": config, "folder": None if c.skipped else c.name})
    facts = {"model": plan.model_name, "patches": plan.shapes.parts.patches, "tasks": plan.tasks}
    facts |= {key: plan.options[key] for key in ("dtype", "attention", "limit")}
    facts |= {"fingerprint": plan.fingerprint, "combinations": listed}
    write_whole(folder / SWEEP_FILE, json.dumps(facts, indent=1) + "\n")


def print_runs(runs: list[Run]) -> None:
    """Prints what would run, what it costs, and what is skipped."""
    table = Table("run")
    for head in ("tokens at the LLM", "mean over its layers", "tower", "projector", "LLM", "all GFLOPs"):
        table.add_column(head, justify="right", overflow="fold")
    active = [run for run in runs if run.plan is not None]
    for run in active:
        cost = run.plan.cost(run.combination.config)
        flops = (f"{n / 1e9:.4g}" for n in (*cost.flops, cost.flops.total))
        table.add_row(run.combination.name, str(cost.tokens), f"{cost.llm_tokens:.4g}", *flops)
    console = Console(width=None if Console().is_terminal else 120)
    console.print(active[0].plan.announcement, highlight=False, soft_wrap=True)
    console.print(table)
    print(f"{active[0].plan.flops_text}, without the merging itself")
    print_skipped(runs)


def print_skipped(runs: list[Run]) -> None:
    """Prints what does not run, one line per method and place."""
    skipped: dict[tuple[str, str, str], list[int | float]] = {}
    for c in (run.combination for run in runs if run.combination.skipped):
        skipped.setdefault((c.method, c.place, c.skipped), []).append(c.tokens)
    for (method, place, why), tokens in skipped.items():
        kept = ", ".join([*map(amount, tokens[:-1]), amount_phrase(tokens[-1])])
        print(f"skipped {method} in {place} at {kept}: {why}")
