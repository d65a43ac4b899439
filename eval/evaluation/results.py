"""From lmms-eval's samples to the printed table, results.json and the answers."""

import json
import math
import platform
import subprocess
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from eval.command import ROOT, write_whole
from eval.evaluation.plan import EvaluationPlan
from eval.naming import file_name
from llava_pitome.cli.bench.environment import machine
from llava_pitome.config import MergeConfig

PACKAGES = ("llava-pitome", "torch", "transformers", "lmms-eval", "datasets", "accelerate", "peft",
            "bitsandbytes")  # fmt: skip
ANSWER_TYPES = ("yes/no", "number", "other")  # VQAv2's
QUESTION_KEYS = (  # stored beside an answer, where the task has them
    "question_id", "image_id", "imageId", "question", "answer_type", "multiple_choice_answer"
)  # fmt: skip


OF_IMAGE = ("image_tokens", "llm_tokens")  # sums over images; the others are over prompts


def make_rows(plan: EvaluationPlan, label: str, merging: MergeConfig | None, found: dict) -> list[dict]:
    """One row per task: accuracy overall and by answer type, tokens, FLOPs, seconds.

    Tokens are the nominal ones of the plan; where images of different sizes have different numbers of tokens,
    the means over the images that were evaluated replace them, and FLOPs by formula those of one prompt.
    """
    cost = plan.cost(merging)
    shared = {
        "model": label,
        "merging": None if merging is None else merging.to_dict(),
        "image_tokens": cost.tokens,
        "llm_tokens": cost.llm_tokens,
    }
    return [
        {"task": task} | shared | _read_journal(plan.journal(merging), task) | _scores(task, found)
        for task in plan.tasks
    ]


def _scores(task: str, found: dict) -> dict:
    """Every metric that lmms-eval reports for a task, and accuracy by answer type."""
    metrics = {k: v for k, v in found["results"][task].items() if isinstance(v, int | float) and k != " "}
    samples = found["samples"][task]
    scored = [(s["doc"].get("answer_type"), s.get("exact_match")) for s in samples]
    scored = [(kind, float(score)) for kind, score in scored if isinstance(score, int | float)]
    groups = {kind: [score for other, score in scored if other == kind] for kind in ANSWER_TYPES}
    return {
        "samples": len(samples),
        "accuracy": _mean([score for _, score in scored]) if scored else None,
        "by_answer_type": {kind: _mean(scores) for kind, scores in groups.items() if scores},
        "metrics": metrics,
    }


def _mean(scores: list[float]) -> dict:
    """Mean and its standard error, in per cent."""
    mean = math.fsum(scores) / len(scores)  # independent of the order, so of the number of processes
    variance = math.fsum((s - mean) ** 2 for s in scores) / max(len(scores) - 1, 1)
    return {"mean": 100 * mean, "stderr": 100 * math.sqrt(variance / len(scores)), "samples": len(scores)}


def _read_journal(path: Path, task: str) -> dict:
    """FLOPs of a task's first prompt, and seconds over all its batches, those of stopped runs included.

    Where batches hold sums over their images and prompts, the means of tokens and FLOPs instead.
    """
    cost, samples, seconds = {}, 0, 0.0
    sums: Counter[str] = Counter()
    for file in sorted(path.parent.glob(path.name + ".*")):
        for line in file.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # an empty line, or an incomplete one of a stopped run
            if entry["task"] == task:
                cost = cost or entry.get("cost", {})
                samples, seconds = samples + entry.get("samples", 0), seconds + entry.get("seconds", 0.0)
                sums.update(entry.get("sums", {}))
    images, prompts = sums.pop("images", 0), sums.pop("prompts", 0)
    for key, total in sums.items():
        if count := images if key in OF_IMAGE else prompts:
            cost[key] = total / count
    return cost | {"timed_samples": samples, "seconds_per_sample": seconds / samples if samples else None}


def write_answers(output: Path, label: str, found: dict) -> None:
    """Writes the answer to every question: output/answers/<task>-<model>.jsonl."""
    (output / "answers").mkdir(parents=True, exist_ok=True)
    for task, samples in found["samples"].items():
        lines = [
            {"doc_id": s["doc_id"]}
            | {k: s["doc"][k] for k in QUESTION_KEYS if k in s["doc"]}
            | {"target": s["target"], "answer": s["filtered_resps"]}
            | {k: s[k] for k in ("exact_match",) if k in s}
            for s in sorted(samples, key=lambda s: s["doc_id"])
        ]
        write_whole(
            output / "answers" / f"{task}-{file_name(label)}.jsonl",
            "".join(json.dumps(line, default=str) + "\n" for line in lines),
        )


def write(plan: EvaluationPlan, rows: list[dict]) -> Path:
    """Writes output/results.json: every number, the configs, and what is needed to reproduce them."""
    facts = {
        "rows": rows,
        "options": plan.options,
        "merging": plan.merging.to_dict(),
        "model": plan.model_name,
        "fingerprint": plan.fingerprint,
        "tasks": plan.tasks,
        "commit": commit(),
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": {"python": platform.python_version(), "system": platform.system()} | machine(),
    }
    path = plan.output / "results.json"
    write_whole(path, json.dumps(facts, indent=1, default=str))
    return path


def print_table(rows: list[dict]) -> None:
    """Prints the table; the unmerged model is its first row."""
    kinds = [k for k in ANSWER_TYPES if any(k in r["by_answer_type"] for r in rows)]
    heads = ["samples", "accuracy", *kinds, "tokens", "in the LLM", "tower GFLOPs", "LLM GFLOPs", "s/sample"]
    table = Table("task", "model")
    for head in heads:
        table.add_column(head, justify="right", overflow="fold")
    for r in rows:
        metrics = ", ".join(
            f"{k.split(',')[0]} {v:.4g}" for k, v in r["metrics"].items() if "stderr" not in k
        )
        table.add_row(
            r["task"], r["model"], str(r["samples"]), _percent(r["accuracy"]) if r["accuracy"] else metrics,
            *(_percent(r["by_answer_type"].get(k)) for k in kinds),
            f"{r['image_tokens']:.6g}", f"{r['llm_tokens']:.4g}",
            *(_number(r.get(key)) for key in ("tower_gflops", "llm_gflops", "seconds_per_sample")),
        )  # fmt: skip
    Console(width=None if Console().is_terminal else 160).print(table)


def commit() -> str | None:
    """The checkout's commit, with '+' where files have changed since; None outside a checkout."""

    def git(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)

    head = git("rev-parse", "HEAD")
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if git("status", "--porcelain").stdout.strip() else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _percent(score: dict | None) -> str:
    return "-" if score is None else f"{score['mean']:.1f} ± {score['stderr']:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
