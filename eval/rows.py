"""The rows of a report's tables: accuracy with its interval, and what sets it apart from PiToMe's."""

import json
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from eval.combinations import REFERENCE, UNMERGED
from eval.comparison import DRAWS, by_picture, holm, intervals, p_values
from eval.gather import Found, Sweep, pictures, scored
from eval.labels import home

BEST = "best"  # the recipe that a search found, another reference beside the paper's
TOWER = "tower"
ALPHA = 0.05  # below which a difference is told as one
MEBI = 2**20


class Difference(NamedTuple):
    """A row's accuracy minus a reference's, in points, its 95 % interval, its p value, and that by Holm."""

    mean: float
    low: float
    high: float
    p: float
    holm: float


@dataclass
class Row:
    """One method in one place at one number of tokens; several draws of it are averaged.

    Attributes:
        name: of its first combination.
        method: as in sweep.json.
        place: where it merges.
        tokens: that it is compared at.
        seeds: draws that are averaged.
        config: of its first combination.
        image_tokens: that reach the language model.
        llm_tokens: in front of one of its layers, on average.
        score: accuracy in per cent, or the task's own metric where answers have no scores of their own.
        metrics: everything that lmms-eval reports.
        interval: 95 %, of the accuracy.
        of_base: score in per cent of the unmerged model's.
        by_type: accuracy by answer type, in per cent.
        gflops: by part, counted in the task's first prompt.
        same: difference to PiToMe in the same place at the same tokens.
        cross: in the method's own place, difference to PiToMe in the tower at the same tokens.
        best: in the method's own place, difference to the recipe best in its own at the same tokens.
        times: milliseconds by part, quartiles; empty where nothing was timed.
        peak: MiB that the prefill allocates.
        cache: MiB of keys and values behind it.
    """

    name: str
    method: str
    place: str
    tokens: int | None
    seeds: int
    config: dict[str, Any] | None
    image_tokens: int
    llm_tokens: float
    score: float
    metrics: dict[str, float]
    interval: tuple[float, float] | None = None
    of_base: float | None = None
    by_type: dict[str, float] = field(default_factory=dict)
    gflops: dict[str, float] = field(default_factory=dict)
    same: Difference | None = None
    cross: Difference | None = None
    best: Difference | None = None
    times: dict[str, list[float]] = field(default_factory=dict)
    peak: float | None = None
    cache: float | None = None

    @property
    def at_home(self) -> bool:
        """Whether it merges where its own paper or recipe does."""
        return re.sub(r":\d+", "", self.place) == home(self.method)


def make(sweep: Sweep, task: str, draws: int = DRAWS, seed: int = 0) -> list[Row]:
    """The rows of a task, the unmerged model first."""
    groups: dict[str, list[Found]] = {}
    for found in sweep.tasks[task]:
        groups.setdefault(_kind(found.about), []).append(found)
    rows = [_row(group, sweep) for group in groups.values()]
    base = next((row for row in rows if row.method == UNMERGED), None)
    for row in rows:
        row.of_base = 100 * row.score / base.score if base is not None and base.score else None
    everyone = [found for group in groups.values() for found in group]
    if all(scored(found) for found in everyone):
        scores = np.stack([_scores(group) for group in groups.values()], 1)  # (Q, rows)
        seen = pictures(everyone[0]) or list(
            range(len(scores))
        )  # a question of an unknown picture has its own
        _compare(rows, *by_picture(scores, seen), draws, seed)
    return rows


def _kind(about: dict[str, Any]) -> str:
    """The same for draws of one thing."""
    config = dict(about["config"] or {})
    config["parameters"] = {k: v for k, v in config.get("parameters", {}).items() if k != "seed"}
    return json.dumps([about["method"], about["place"], about["tokens"], config], sort_keys=True)


def _scores(group: list[Found]) -> np.ndarray:
    """The score of every question (Q,), averaged over draws."""
    return np.mean([[float(a["exact_match"]) for a in found.answers] for found in group], 0)


def _row(group: list[Found], sweep: Sweep) -> Row:
    """A row without what takes others to know."""
    about, first = group[0].about, group[0].row
    accuracy = [found.row["accuracy"] for found in group]
    metrics = {
        k: float(np.mean([found.row["metrics"][k] for found in group]))
        for k in first["metrics"]
        if "stderr" not in k
    }
    score = (
        float(np.mean([a["mean"] for a in accuracy])) if all(accuracy) else next(iter(metrics.values()), 0.0)
    )
    made = Row(
        about["name"], about["method"], about["place"], about["tokens"], len(group), about["config"],
        first["image_tokens"], first["llm_tokens"], score, metrics,
    )  # fmt: skip
    for kind in first["by_answer_type"]:
        made.by_type[kind] = float(np.mean([found.row["by_answer_type"][kind]["mean"] for found in group]))
    parts = {part: first.get(f"{part}_gflops") for part in ("tower", "projector", "llm")}
    if None not in parts.values():
        made.gflops = parts | {"total": sum(parts.values())}
    timed = next((sweep.timing[f.about["name"]] for f in group if f.about["name"] in sweep.timing), None)
    if timed is not None:
        made.times = {part: [1000 * s for s in taken] for part, taken in timed["median"].items()}
        made.peak, made.cache = timed["peak_bytes"] / MEBI, timed["kv_cache_bytes"] / MEBI
    return made


def _compare(rows: list[Row], sums: np.ndarray, counts: np.ndarray, draws: int, seed: int) -> None:
    """Fills in the intervals and differences, all from the same drawn pictures."""
    at: dict[tuple[str, str, int | None], int] = {}
    for i, row in enumerate(rows):
        at.setdefault((row.method, row.place, row.tokens), i)
    pairs = [("same", i, at.get((REFERENCE, row.place, row.tokens))) for i, row in enumerate(rows)]
    for i, row in enumerate(rows):
        if row.at_home:
            pairs.append(("cross", i, at.get((REFERENCE, TOWER, row.tokens))))
            pairs.append(("best", i, at.get((BEST, home(BEST), row.tokens))))
    pairs = [(kind, i, j) for kind, i, j in pairs if j is not None and i != j and rows[i].tokens is not None]
    apart = sums[:, [i for _, i, _ in pairs]] - sums[:, [j for _, _, j in pairs]]  # (P, pairs)
    low, high = 100 * intervals(np.concatenate([sums, apart], 1), counts, draws, seed)
    p = p_values(apart, draws, seed + 1)
    for i, row in enumerate(rows):
        row.interval = (float(low[i]), float(high[i]))
    families: dict[tuple[str, str], list[int]] = {}
    for n, (kind, i, _) in enumerate(pairs):
        families.setdefault((kind, rows[i].place if kind == "same" else ""), []).append(n)
    adjusted = dict(pair for told in families.values() for pair in zip(told, holm([p[n] for n in told])))
    for n, (kind, i, _) in enumerate(pairs):
        mean = 100 * apart[:, n].sum() / counts.sum()
        at_end = low[len(rows) + n], high[len(rows) + n]
        setattr(rows[i], kind, Difference(float(mean), *map(float, at_end), float(p[n]), adjusted[n]))
