"""Reads what a sweep has left: its list, every combination's numbers and answers, and its timing."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from eval.labels import slug

SWEEP, EMBEDDED = "sweep.json", "embedded_vqa"
PICTURE = ("image_id", "imageId")  # of a question, where its task has it
QUESTIONS_A_PICTURE = 1000  # numbers that each embedded picture has for its questions


class Found(NamedTuple):
    """One combination's results on one task.

    Attributes:
        about: the combination, as sweep.json lists it.
        row: its row in results.json.
        answers: one dict a question, by doc_id.
    """

    about: dict[str, Any]
    row: dict[str, Any]
    answers: list[dict[str, Any]]


class Sweep(NamedTuple):
    """What there is of a sweep.

    Attributes:
        facts: of sweep.json.
        results: one results.json's facts: packages, machine, commit.
        tasks: what was found, by task, the unmerged model first.
        missing: names of combinations without results, or with those of another config.
        others: names of combinations whose results are of other code or data than the sweep's last command.
        timing: rows of timing.json by name; empty where there is none.
        timed: its facts.
    """

    facts: dict[str, Any]
    results: dict[str, Any]
    tasks: dict[str, list[Found]]
    missing: list[str]
    others: list[str]
    timing: dict[str, dict[str, Any]]
    timed: dict[str, Any]


def read(folder: Path) -> Sweep:
    """A sweep's folder.

    Raises:
        ValueError: there is no sweep in it, nothing of it is finished, or combinations were asked different
            questions.
    """
    if not (folder / SWEEP).exists():
        raise ValueError(f"input={folder} holds no {SWEEP}: give a folder that eval/sweep.py has written")
    facts = json.loads((folder / SWEEP).read_text())
    tasks: dict[str, list[Found]] = {}
    results, missing, others = {}, [], []
    for about in facts["combinations"]:
        if about["skipped"]:
            continue
        file = folder / about["folder"] / "results.json"
        if not file.exists():
            missing.append(about["name"])
            continue
        results = json.loads(file.read_text())
        if results["fingerprint"] != facts["fingerprint"]:
            others.append(about["name"])
        rows = [row for row in results["rows"] if row["merging"] == about["config"]]
        if not rows:
            missing.append(about["name"])
        for row in rows:
            tasks.setdefault(row["task"], []).append(Found(about, row, _answers(file.parent, row)))
    if not tasks:
        raise ValueError(f"no combination of input={folder} is finished, so there is nothing to report")
    for found in tasks.values():
        _check(found)
        found.sort(key=lambda f: f.row["merging"] is not None)
    timing = folder / "timing.json"
    timed = json.loads(timing.read_text()) if timing.exists() else {"rows": []}
    by_name = {row["side"]: row for row in timed["rows"]}
    return Sweep(facts, results, tasks, missing, others, by_name, timed)


def _answers(folder: Path, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers to a task, by doc_id."""
    file = folder / "answers" / f"{row['task']}-{slug(row['model'])}.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(lines, key=lambda line: line["doc_id"])


def _check(found: list[Found]) -> None:
    """Raises ValueError where not all were asked the same questions."""
    asked = [[answer["doc_id"] for answer in f.answers] for f in found]
    for f, ids in zip(found, asked):
        if ids != asked[0]:
            raise ValueError(
                f"{f.about['name']} was asked {len(ids)} questions and {found[0].about['name']} "
                f"{len(asked[0])}, not the same ones: run the sweep again with one limit"
            )


def scored(found: Found) -> bool:
    """Whether every answer has a score of its own."""
    return all(isinstance(a.get("exact_match"), int | float) for a in found.answers)


def pictures(found: Found) -> list[Any] | None:
    """The picture of each question; None where that is not known."""
    named = [next((a[key] for key in PICTURE if a.get(key) is not None), None) for a in found.answers]
    if None not in named:
        return named
    if found.row["task"] == EMBEDDED:
        return [a["question_id"] // QUESTIONS_A_PICTURE for a in found.answers]
    return None
