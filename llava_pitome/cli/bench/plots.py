"""Pictures of a benchmark: speed-up against tokens, where the time goes, batches, and image sizes."""

from pathlib import Path
from typing import Any

COLOURS = {
    "tower": "#4477aa",
    "merging": "#ee6677",
    "projector": "#ccbb44",
    "llm": "#228833",
    "decode": "#aa3377",
}
TIMED = ("tower", "prefill")  # then the answers
DPI = 110


def draw(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Writes the pictures that these rows can fill, and gives their names.

    Args:
        rows: as `summary.summarise` gives them.
        folder: where to; it is there.
    """
    import matplotlib

    matplotlib.use("Agg")
    drawn = [_breakdown(rows, folder / "breakdown.png")]
    for name, axis in (("speedup", "tokens"), ("batches", "batch"), ("patches", "patches")):
        if len({row[axis] for row in rows if row["merging"]}) > 1:
            drawn.append(_lines(rows, axis, folder / f"{name}.png"))
    return drawn


def _lines(rows: list[dict[str, Any]], axis: str, path: Path) -> Path:
    """Speed-up over dense against one thing that varies, with quartiles; dashed, what the FLOPs promise."""
    from matplotlib import pyplot

    merged = [row for row in rows if row["merging"]]
    parts = [p for p in merged[0]["speedup"] if p in TIMED or (p.startswith("answer") and p != "answer of 1")]
    fixed = ("batch", "patches", "kernels") if axis == "tokens" else ("batch", "patches", "side")
    fixed = tuple(name for name in fixed if name != axis)
    groups = sorted({tuple(row[name] for name in fixed) for row in merged}, key=str)
    figure, axes = pyplot.subplots(1, len(parts), figsize=(5.2 * len(parts), 4), squeeze=False)
    for part, plot in zip(parts, axes[0]):
        for number, group in enumerate(groups):
            line = sorted((r for r in merged if tuple(r[f] for f in fixed) == group), key=lambda r: r[axis])
            x = [r[axis] for r in line]
            low, middle, high = zip(*(r["speedup"][part] for r in line))
            error = [[m - a for m, a in zip(middle, low)], [b - m for m, b in zip(middle, high)]]
            name = ", ".join(f"{f} {v}" for f, v in zip(fixed, group))
            plot.errorbar(x, middle, error, fmt="o-", color=f"C{number}", capsize=3, label=name)
            if part in line[0]["flop_ratio"]:
                limit = [r["flop_ratio"][part] for r in line]
                plot.plot(x, limit, "--", color=f"C{number}", alpha=0.6)
        if part in merged[0]["flop_ratio"]:
            plot.plot([], [], "--", color="grey", label="what FLOPs promise")
        plot.axhline(1, color="grey", lw=0.8)
        plot.set(title=part, xlabel=axis, ylabel="times as fast as dense", ylim=(0, None))
        if axis != "tokens":
            plot.set_xscale("log", base=2)
            plot.set_xticks(x, map(str, x))
        plot.legend(fontsize=7)
    return _save(figure, path)


def _breakdown(rows: list[dict[str, Any]], path: Path) -> Path:
    """Where the time of the prompt, and of one further token, goes: a bar a side, at the smallest batch."""
    from matplotlib import pyplot

    least = min((row["batch"], row["patches"]) for row in rows)
    rows = [row for row in rows if (row["batch"], row["patches"]) == least]
    figure, plot = pyplot.subplots(figsize=(8, 1.2 + 0.5 * len(rows)))
    for y, row in enumerate(rows):
        left, median = 0.0, {part: taken[1] * 1000 for part, taken in row["median"].items()}
        median["tower"] -= median.get("merging", 0.0)
        for part, colour in COLOURS.items():
            if part in median:
                plot.barh(y, median[part], left=left, color=colour, label=part if row is rows[-1] else None)
                left += median[part]
    names = [f"{row['side']}: {row['tokens']} tokens" for row in rows]
    plot.set_yticks(range(len(rows)), names)
    plot.invert_yaxis()
    plot.set(xlabel="milliseconds (decode: one token)", title=f"batch {least[0]}, {least[1]} patches")
    plot.legend(fontsize=8)
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
    return path
