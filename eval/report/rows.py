"""The rows of a report: accuracy with its interval, and the differences to PiToMe's."""

import json
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from eval.naming import BEST, PITOME, TOWER, UNMERGED, home_place
from eval.report.significance import RESAMPLES, holm, intervals, p_values, sum_by_image
from eval.report.sweep_results import Result, SweepResults

MEBI = 2**20
REFERENCES = {"cross": (PITOME, TOWER), "best": (BEST, home_place(BEST))}  # by the kind of difference


class Difference(NamedTuple):
    """A row's accuracy minus a reference's, in points: mean, 95 % interval, p value, and that by Holm."""

    mean: float
    low: float
    high: float
    p: float
    holm: float


@dataclass
class Row:
    """One method in one place at one number of tokens; the seeds of a random method are averaged.

    Attributes:
        name: of its first combination.
        method: as in sweep.json.
        place: where it merges.
        tokens: at which it is compared: a number, or a share of an image's own.
        seeds: how many are averaged.
        config: of its first combination.
        image_tokens: at the input of the language model; where images differ, the mean.
        llm_tokens: at the input of one of its layers, on average.
        score: accuracy in per cent, or the task's own metric where answers have no scores.
        metrics: everything that lmms-eval reports.
        interval: 95 %, of the accuracy.
        of_base: score in per cent of the unmerged model's.
        by_type: accuracy by answer type, in per cent.
        gflops: by part, counted in the task's first prompt.
        same: difference to PiToMe in the same place at the same tokens.
        cross: for the method's own place, difference to PiToMe in the tower at the same tokens.
        best: for the method's own place, difference to the recipe best in its own at the same tokens.
        times: milliseconds by part, quartiles; empty where nothing was timed.
        peak: MiB that the prefill allocates.
        cache: MiB of the KV cache after it.
    """

    name: str
    method: str
    place: str
    tokens: int | float | None
    seeds: int
    config: dict[str, Any] | None
    image_tokens: float
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
    def is_at_home(self) -> bool:
        """Whether it merges in the place of its own paper or recipe."""
        return re.sub(r":\d+", "", self.place) == home_place(self.method)

    @property
    def merges_late(self) -> bool:
        """Whether all image tokens pass the first layers of the language model."""
        return "decoder" in self.place

    @property
    def kept_tokens(self) -> float:
        """Image tokens that are kept at last; where images differ, the mean."""
        if self.tokens is None or not self.merges_late:
            return self.image_tokens
        return self.tokens * self.image_tokens if isinstance(self.tokens, float) else self.tokens


def make_rows(sweep: SweepResults, task: str, resamples: int = RESAMPLES, seed: int = 0) -> list[Row]:
    """The rows of a task, the unmerged model first."""
    groups: dict[str, list[Result]] = {}
    for result in sweep.tasks[task]:
        groups.setdefault(_without_seed(result.combination), []).append(result)
    rows = [_make_row(group, sweep) for group in groups.values()]
    base = unmerged_row(rows)
    for row in rows:
        row.of_base = 100 * row.score / base.score if base is not None and base.score else None
    if all(result.is_scored for result in sweep.tasks[task]):
        scores = np.stack([_mean_scores(group) for group in groups.values()], 1)  # (Q, rows)
        images = sweep.tasks[task][0].images() or range(len(scores))  # unknown images count as different
        _compare(rows, *sum_by_image(scores, images), resamples, seed)
    return rows


def unmerged_row(rows: list[Row]) -> Row | None:
    """The unmerged model's row."""
    return next((row for row in rows if row.method == UNMERGED), None)


def _without_seed(combination: dict[str, Any]) -> str:
    """A key that combinations share which differ in their seed alone."""
    config = dict(combination["config"] or {})
    config["parameters"] = {k: v for k, v in config.get("parameters", {}).items() if k != "seed"}
    return json.dumps([*(combination[key] for key in ("method", "place", "tokens")), config], sort_keys=True)


def _mean_scores(group: list[Result]) -> np.ndarray:
    """The score of every question (Q,), averaged over seeds."""
    return np.mean([[float(a["exact_match"]) for a in result.answers] for result in group], 0)


def _make_row(group: list[Result], sweep: SweepResults) -> Row:
    """A row without its comparisons."""
    combination, first = group[0].combination, group[0].row

    def mean(values: Any) -> float:
        return float(np.mean(list(values)))

    metrics = {
        name: mean(result.row["metrics"][name] for result in group)
        for name in first["metrics"]
        if "stderr" not in name
    }
    accuracy = [result.row["accuracy"] for result in group]
    score = mean(a["mean"] for a in accuracy) if all(accuracy) else next(iter(metrics.values()), 0.0)
    row = Row(
        *(combination[key] for key in ("name", "method", "place", "tokens")), len(group),
        combination["config"], first["image_tokens"], first["llm_tokens"], score, metrics,
    )  # fmt: skip
    for kind in first["by_answer_type"]:
        row.by_type[kind] = mean(result.row["by_answer_type"][kind]["mean"] for result in group)
    parts = {part: first.get(f"{part}_gflops") for part in ("tower", "projector", "llm")}
    if None not in parts.values():
        row.gflops = parts | {"total": sum(parts.values())}
    timed = next((sweep.timing[result.name] for result in group if result.name in sweep.timing), None)
    if timed is not None:
        row.times = {part: [1000 * s for s in seconds] for part, seconds in timed["median"].items()}
        row.peak, row.cache = timed["peak_bytes"] / MEBI, timed["kv_cache_bytes"] / MEBI
    return row


def _compare(rows: list[Row], sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> None:
    """Fills in intervals and differences, all from the same resampled images.

    Args:
        rows: to fill in.
        sums: (P, rows) of the scores of each image's questions.
        counts: (P,) questions about each image.
        resamples: for intervals and p values.
        seed: of the resampling.
    """
    index: dict[tuple[str, str, float | None], int] = {}
    for i, row in enumerate(rows):
        index.setdefault((row.method, row.place, row.tokens), i)
    pairs = [("same", i, index.get((PITOME, row.place, row.tokens))) for i, row in enumerate(rows)]
    for i, row in enumerate(rows):
        if row.is_at_home:
            pairs += [(kind, i, index.get((*other, row.tokens))) for kind, other in REFERENCES.items()]
    pairs = [(kind, i, j) for kind, i, j in pairs if j is not None and i != j and rows[i].tokens is not None]
    differences = sums[:, [i for _, i, _ in pairs]] - sums[:, [j for _, _, j in pairs]]  # (P, pairs)
    low, high = 100 * intervals(np.concatenate([sums, differences], 1), counts, resamples, seed)
    for row, *interval in zip(rows, low, high):
        row.interval = tuple(map(float, interval))
    families: dict[tuple[str, str], list[int]] = {}  # comparisons that Holm's method adjusts together
    for n, (kind, i, _) in enumerate(pairs):
        families.setdefault((kind, rows[i].place if kind == "same" else ""), []).append(n)
    p = p_values(differences, resamples, seed + 1)
    adjusted = {n: value for f in families.values() for n, value in zip(f, holm([p[m] for m in f]))}
    means = 100 * differences.sum(0) / counts.sum()
    for n, (kind, i, _) in enumerate(pairs):
        numbers = (means[n], low[len(rows) + n], high[len(rows) + n], p[n], adjusted[n])
        setattr(rows[i], kind, Difference(*map(float, numbers)))
