"""Medians, quartiles and speed-ups of samples, as rows, Markdown tables and plots."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

PARTS = (
    "tower",
    "merging",
    "projector",
    "packing",
    "llm",
    "prefill",
    "decode",
)  # in tables, before the answers
COLOURS = {"tower": "#4477aa", "merging": "#ee6677", "projector": "#ccbb44", "packing": "#66ccee",
           "llm": "#228833", "decode": "#aa3377"}  # fmt: skip
DPI = 110


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of `timing.measure` with statistics; the first row of every batch is dense.

    Adds:
        median: (first quartile, median, third quartile) of the seconds of every part.
        speedup: the same of dense seconds by this variant's, round by round, for every part both have.
        merging_share: merging's share of the tower's median, None where it was not timed.
        flop_ratio: dense FLOPs by this variant's, of the tower and, where there is one, the prefill.
        efficiency: median speed-up by FLOP ratio, of the tower and the prefill.
    """
    dense: dict[tuple[int, int], dict[str, Any]] = {}
    return [row | _statistics(row, dense.setdefault((row["batch"], row["patches"]), row)) for row in rows]


def _statistics(row: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    import pandas as pd

    seconds, dense_seconds = pd.DataFrame(row["seconds"]), pd.DataFrame(dense["seconds"])
    median = _quartiles(seconds)
    speedup = _quartiles((dense_seconds / seconds)[[part for part in seconds if part in dense_seconds]])
    flops, dense_flops = row["flops"], dense["flops"]
    ratio = {"tower": dense_flops["tower"] / flops["tower"]}
    if "llm" in flops:
        ratio["prefill"] = sum(dense_flops.values()) / sum(flops.values())
    return {
        "median": median,
        "speedup": speedup,
        "merging_share": median["merging"][1] / median["tower"][1] if "merging" in median else None,
        "flop_ratio": ratio,
        "efficiency": {part: speedup[part][1] / ratio[part] for part in ratio},
    }


def _quartiles(samples: Any) -> dict[str, tuple[float, float, float]]:
    """Returns first quartile, median and third quartile of every column of a DataFrame."""
    quartiles = samples.quantile([0.25, 0.5, 0.75])
    return {part: tuple(values) for part, values in quartiles.to_dict("list").items()}


def full_table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns what `summarise` returned as a Markdown table with a column for everything."""
    timed = {part for row in rows for part in row["median"]}
    answers = sorted(filter(_is_answer, timed), key=lambda part: int(part.split()[-1]))
    parts, table = [*(part for part in PARTS if part in timed), *answers], []
    for row in rows:
        cells = {name: row[name] for name in ("batch", "patches", "side", "tokens")}
        if any(other.get("tiles", 1) > 1 for other in rows):
            gflops = row["flops"]["tower"] / row["batch"] / row["tiles"] / 1e9
            cells["tiles"], cells["tower, GFLOPs a tile"] = row["tiles"], f"{gflops:.1f}"
        for part in parts:
            median, speedup = row["median"].get(part), row["speedup"].get(part)
            if part == "merging":
                cells[part] = f"{row['merging_share']:.1%}" if median else ""
                continue
            cells[f"{part}, ms"] = f"{median[1] * 1000:.1f}" if median else ""
            if part in ("tower", "prefill", "llm") or _is_answer(part):
                cells[f"{part}, speed-up"] = "{1:.2f} ({0:.2f}-{2:.2f})".format(*speedup) if speedup else ""
            if part in row["flop_ratio"]:
                ratio, efficiency = row["flop_ratio"][part], row["efficiency"][part]
                cells[f"{part}, FLOP ratio -> efficiency"] = f"{ratio:.2f} -> {efficiency:.2f}"
        cells["peak, MB"] = f"{row['peak_bytes'] / 1e6:.1f}"
        if "kv_cache_bytes" in row:
            cells["KV cache, MB"] = f"{row['kv_cache_bytes'] / 1e6:.1f}"
        table.append(cells)
    return markdown(table)


def short_table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the merging rows of `summarise` as a narrow Markdown table: speed-ups beside FLOP ratios."""
    table = []
    for row in (row for row in rows if row["merging"]):
        cells = {
            "batch": row["batch"],
            "patches": row["patches"],
            "ratio": row["side"],
            "tokens": row["tokens"],
        }
        cells["merging's share of the tower"] = f"{row['merging_share']:.1%}"
        for part, ratio in row["flop_ratio"].items():
            cells[f"{part} (by FLOPs)"] = f"{row['speedup'][part][1]:.2f} ({ratio:.2f})"
        table.append(cells | {part: f"{row['speedup'][part][1]:.2f}" for part in _long_answers(row)})
    return markdown(table)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Returns rows of cells by column as a Markdown table."""
    lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _is_answer(part: str) -> bool:
    return part.startswith("answer of ")


def _long_answers(row: dict[str, Any]) -> list[str]:
    """Returns the answers of more than one token; one token takes the time of the prefill."""
    return [part for part in row["speedup"] if _is_answer(part) and part != "answer of 1"]


def plot(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Writes plots of what `summarise` returned into a folder that exists; returns their paths.

    breakdown.png always; speedup.png, batches.png and patches.png where tokens, batch or patches vary.
    """
    import matplotlib

    matplotlib.use("Agg")
    merging = [row for row in rows if row["merging"]]
    figures = {folder / "breakdown.png": _plot_breakdown(rows)}
    for name, axis in (("speedup", "tokens"), ("batches", "batch"), ("patches", "patches")):
        if len({row[axis] for row in merging}) > 1:
            figures[folder / f"{name}.png"] = _plot_speedup(merging, axis)
    for path, figure in figures.items():
        figure.tight_layout()
        figure.savefig(path, dpi=DPI)
        matplotlib.pyplot.close(figure)
    return list(figures)


def _plot_speedup(rows: list[dict[str, Any]], axis: str) -> Any:
    """Plots the speed-up over dense against one quantity, with quartiles; dashed lines are FLOP ratios."""
    import numpy as np
    from matplotlib import pyplot

    fixed = [n for n in ("batch", "patches", "kernels" if axis == "tokens" else "side") if n != axis]

    def label(row: dict[str, Any]) -> str:
        return ", ".join(f"{name} {row[name]}" for name in fixed)

    rows = sorted(rows, key=lambda row: (label(row), row[axis]))
    parts = [*rows[0]["flop_ratio"], *_long_answers(rows[0])]
    figure, plots = pyplot.subplots(1, len(parts), figsize=(5.2 * len(parts), 4), squeeze=False)
    for part, plot in zip(parts, plots[0]):
        for number, (name, group) in enumerate(groupby(rows, label)):
            line = list(group)
            x, quartiles = [row[axis] for row in line], np.array([row["speedup"][part] for row in line]).T
            plot.errorbar(
                x, quartiles[1], np.abs(quartiles[::2] - quartiles[1]), fmt="o-", capsize=3, label=name
            )
            if part in line[0]["flop_ratio"]:
                ratios = [row["flop_ratio"][part] for row in line]
                plot.plot(x, ratios, "--", color=f"C{number}", alpha=0.6)
        if part in rows[0]["flop_ratio"]:
            plot.plot([], [], "--", color="grey", label="FLOP ratio")
        plot.axhline(1, color="grey", lw=0.8)
        plot.set(title=part, xlabel=axis, ylabel="speed-up over dense", ylim=(0, None))
        if axis != "tokens":
            ticks = sorted({row[axis] for row in rows})
            plot.set_xscale("log", base=2)
            plot.set_xticks(ticks, map(str, ticks))
        plot.legend(fontsize=7)
    return figure


def _plot_breakdown(rows: Sequence[dict[str, Any]]) -> Any:
    """Plots the time of the prefill and of one decoded token by part, at the smallest batch."""
    import pandas as pd

    batch, patches = min((row["batch"], row["patches"]) for row in rows)
    medians = pd.DataFrame({
        f"{row['side']}: {row['tokens']} tokens": {part: q[1] * 1000 for part, q in row["median"].items()}
        for row in rows if (row["batch"], row["patches"]) == (batch, patches)
    }).T  # fmt: skip
    if "merging" in medians:
        medians["tower"] -= medians["merging"].fillna(0)
    parts = [part for part in COLOURS if part in medians]
    plot = medians[parts].plot.barh(stacked=True, color=COLOURS, figsize=(8, 1.2 + 0.5 * len(medians)))
    plot.invert_yaxis()
    plot.set(xlabel="milliseconds (decode: one token)", title=f"batch {batch}, {patches} patches")
    plot.legend(fontsize=8)
    return plot.figure
