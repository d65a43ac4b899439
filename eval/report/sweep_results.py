"""Reads what a sweep has written: its list, every combination's numbers and answers, and its timing."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from eval.evaluation.tasks import EMBEDDED_TASKS
from eval.naming import file_name
from eval.sweep.runs import SWEEP_FILE

IMAGE_KEYS = ("image_id", "imageId")  # of a question, where its task has them
QUESTIONS_PER_IMAGE = 1000  # ids that are reserved for each embedded image


class Result(NamedTuple):
    """One combination's results on one task.

    Attributes:
        combination: as sweep.json lists it.
        row: its row in results.json.
        answers: one dict per question, by doc_id.
    """

    combination: dict[str, Any]
    row: dict[str, Any]
    answers: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The combination's name."""
        return self.combination["name"]

    @property
    def is_scored(self) -> bool:
        """Whether every answer has a score."""
        return all(isinstance(a.get("exact_match"), int | float) for a in self.answers)

    def images(self) -> list[Any] | None:
        """The image of each question; None where the task does not identify it."""
        ids = [next((a[key] for key in IMAGE_KEYS if a.get(key) is not None), None) for a in self.answers]
        if None not in ids:
            return ids
        if self.row["task"] in EMBEDDED_TASKS.values():
            return [a["question_id"] // QUESTIONS_PER_IMAGE for a in self.answers]
        return None


class SweepResults(NamedTuple):
    """What a sweep has written so far.

    Attributes:
        facts: of sweep.json.
        run_facts: of one results.json: packages, machine, commit.
        tasks: results by task, the unmerged model first.
        missing: names of combinations without results, or with those of another config.
        outdated: names of combinations whose code or data are not those of the sweep's last command.
        timing: rows of timing.json by name; empty where there is none.
        timing_facts: of timing.json.
    """

    facts: dict[str, Any]
    run_facts: dict[str, Any]
    tasks: dict[str, list[Result]]
    missing: list[str]
    outdated: list[str]
    timing: dict[str, dict[str, Any]]
    timing_facts: dict[str, Any]

    @property
    def embedded_data(self) -> str | None:
        """The embedded model whose questions were evaluated; None for other questions."""
        return next((name for name, task in EMBEDDED_TASKS.items() if task in self.tasks), None)


def read_sweep(folder: Path) -> SweepResults:
    """The results in a sweep's folder.

    Raises:
        ValueError: it holds no sweep, no combination is finished, or they answered different questions.
    """
    if not (folder / SWEEP_FILE).exists():
        raise ValueError(f"input={folder} holds no {SWEEP_FILE}: give a folder that eval.sweep has written")
    facts = json.loads((folder / SWEEP_FILE).read_text())
    tasks: dict[str, list[Result]] = {}
    run_facts, missing, outdated = {}, [], []
    for combination in facts["combinations"]:
        if combination["skipped"]:
            continue
        file = folder / combination["folder"] / "results.json"
        run_facts = json.loads(file.read_text()) if file.exists() else run_facts
        rows = run_facts["rows"] if file.exists() else []
        rows = [row for row in rows if row["merging"] == combination["config"]]
        if not rows:
            missing.append(combination["name"])
        if file.exists() and run_facts["fingerprint"] != facts["fingerprint"]:
            outdated.append(combination["name"])
        for row in rows:
            result = Result(combination, row, _read_answers(file.parent, row))
            tasks.setdefault(row["task"], []).append(result)
    if not tasks:
        raise ValueError(f"no combination of input={folder} is finished, so there is nothing to report")
    for results in tasks.values():
        _check_questions(results)
        results.sort(key=lambda result: result.row["merging"] is not None)
    file = folder / "timing.json"
    timed = json.loads(file.read_text()) if file.exists() else {"rows": []}
    by_name = {row["side"]: row for row in timed["rows"]}
    return SweepResults(facts, run_facts, tasks, missing, outdated, by_name, timed)


def _read_answers(folder: Path, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers to a task, by doc_id."""
    file = folder / "answers" / f"{row['task']}-{file_name(row['model'])}.jsonl"
    return sorted(map(json.loads, file.read_text().splitlines()), key=lambda answer: answer["doc_id"])


def _check_questions(results: list[Result]) -> None:
    """Raises ValueError where not all answered the same questions."""
    questions = [[answer["doc_id"] for answer in result.answers] for result in results]
    for result, ids in zip(results, questions):
        if ids != questions[0]:
            raise ValueError(
                f"{result.name} answered {len(ids)} questions and {results[0].name} {len(questions[0])}, not "
                "the same ones: run the sweep again with one limit"
            )
