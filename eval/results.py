"""From lmms-eval's samples to the table and the files."""

import json
import math
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from eval.labels import slug
from eval.plan import Plan
from llava_pitome import embedded
from llava_pitome.cli.bench.environment import machine

PACKAGES = (
    "llava-pitome",
    "torch",
    "transformers",
    "lmms-eval",
    "datasets",
    "accelerate",
    "peft",
    "bitsandbytes",
)
ANSWER_TYPES = ("yes/no", "number", "other")  # VQAv2's
KEPT = (  # of a question, where its task has it
    "question_id", "image_id", "imageId", "question", "answer_type", "multiple_choice_answer"
)  # fmt: skip


def rows(plan: Plan, label: str, merging, found: dict, journal: Path) -> list[dict]:
    """One row a task: accuracy overall and by answer type, tokens, FLOPs, seconds."""
    cost = plan.cost(merging)
    shared = {
        "model": label,
        "merging": None if merging is None else merging.to_dict(),
        "image_tokens": cost.tokens,
        "llm_tokens": cost.llm_tokens,
    }
    return [{"task": task} | shared | _journal(journal, task) | _scores(task, found) for task in plan.tasks]


def _scores(task: str, found: dict) -> dict:
    """Every metric that lmms-eval reports for a task, and accuracy by answer type."""
    numbers = {k: v for k, v in found["results"][task].items() if isinstance(v, int | float) and k != " "}
    samples = found["samples"][task]
    scored = [(s["doc"].get("answer_type"), s["exact_match"]) for s in samples if "exact_match" in s]
    scored = [(kind, float(score)) for kind, score in scored if isinstance(score, int | float)]
    by_type = {
        kind: _mean([s for k, s in scored if k == kind])
        for kind in ANSWER_TYPES
        if any(k == kind for k, _ in scored)
    }
    overall = _mean([s for _, s in scored]) if scored else None
    return {"samples": len(samples), "accuracy": overall, "by_answer_type": by_type, "metrics": numbers}


def _mean(scores: list[float]) -> dict:
    """Mean and its standard error, in per cent."""
    mean = math.fsum(scores) / len(scores)  # the same for any order, and so for any number of processes
    variance = math.fsum((s - mean) ** 2 for s in scores) / max(len(scores) - 1, 1)
    return {"mean": 100 * mean, "stderr": 100 * math.sqrt(variance / len(scores)), "samples": len(scores)}


def _journal(path: Path, task: str) -> dict:
    """FLOPs of a task's first prompt, and seconds over all its batches, stopped runs' included."""
    cost, samples, seconds = {}, 0, 0.0
    for file in sorted(path.parent.glob(path.name + ".*")):
        for line in file.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # an empty line, or half a one that a stopped run left
            if entry["task"] == task:
                cost = cost or entry.get("cost", {})
                samples, seconds = samples + entry.get("samples", 0), seconds + entry.get("seconds", 0.0)
    return cost | {"timed_samples": samples, "seconds_per_sample": seconds / samples if samples else None}


def write_answers(output: Path, label: str, found: dict) -> None:
    """Every question's answer: output/answers/<task>-<model>.jsonl."""
    folder = output / "answers"
    folder.mkdir(parents=True, exist_ok=True)
    for task, samples in found["samples"].items():
        lines = [
            {
                "doc_id": s["doc_id"],
                **{k: s["doc"][k] for k in KEPT if k in s["doc"]},
                "target": s["target"],
                "answer": s["filtered_resps"],
                **{k: s[k] for k in ("exact_match",) if k in s},
            }
            for s in sorted(samples, key=lambda s: s["doc_id"])
        ]
        _replace(
            folder / f"{task}-{slug(label)}.jsonl",
            "".join(json.dumps(line, default=str) + "\n" for line in lines),
        )


def write(plan: Plan, rows: list[dict]) -> Path:
    """Writes output/results.json: every number, the configs, and what is needed to get them again."""
    path = plan.output / "results.json"
    facts = {
        "rows": rows,
        "options": plan.options,
        "merging": plan.merging.to_dict(),
        "model": "embedded" if plan.model == str(embedded.PATH) else plan.model,
        "fingerprint": plan.fingerprint,
        "tasks": plan.tasks,
        "commit": commit(),
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": {"python": platform.python_version(), "system": platform.system()} | machine(),
    }
    _replace(path, json.dumps(facts, indent=1, default=str))
    return path


def show(rows: list[dict]) -> None:
    """Prints the table; the unmerged model is its first row."""
    table = Table(title=None)
    kinds = [k for k in ANSWER_TYPES if any(k in r["by_answer_type"] for r in rows)]
    heads = [
        "task",
        "model",
        "samples",
        "accuracy",
        *kinds,
        "tokens",
        "in the LLM",
        "tower GFLOPs",
        "LLM GFLOPs",
        "s/sample",
    ]
    for head in heads:
        table.add_column(head, justify="left" if head in ("task", "model") else "right", overflow="fold")
    for r in rows:
        accuracy = _percent(r["accuracy"]) if r["accuracy"] else _metrics(r["metrics"])
        table.add_row(
            r["task"], r["model"], str(r["samples"]), accuracy,
            *(_percent(r["by_answer_type"].get(k)) for k in kinds),
            str(r["image_tokens"]), f"{r['llm_tokens']:.4g}", _number(r.get("tower_gflops")),
            _number(r.get("llm_gflops")), _number(r["seconds_per_sample"]),
        )  # fmt: skip
    width = None if Console().is_terminal else 160
    Console(width=width).print(table)


def commit() -> str | None:
    """The checkout's commit, with '+' where files were changed since; None outside a checkout."""
    here = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    if head.returncode:
        return None
    changed = subprocess.run(
        ["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=False
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _replace(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_suffix(path.suffix + ".part")
    partial.write_text(text)
    partial.replace(path)


def _percent(score: dict | None) -> str:
    return "-" if score is None else f"{score['mean']:.1f} ± {score['stderr']:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _metrics(metrics: dict) -> str:
    return ", ".join(f"{k.split(',')[0]} {v:.4g}" for k, v in metrics.items() if "stderr" not in k)
