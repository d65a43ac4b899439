"""A report's plots: accuracy against tokens, FLOPs and milliseconds, by place, and by answer type.

Colours are Okabe and Ito's, which colour-blind people can distinguish; markers and dashes differ, too.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eval.evaluation.results import ANSWER_TYPES
from eval.naming import BEST, INPUT, PITOME, UNMERGED, method_title, place_phrase
from eval.report.rows import Row, unmerged_row

VERMILION = "#D55E00"
RELATED = {"color": VERMILION, "marker": "s", "ls": "--", "lw": 1.6, "ms": 5}
STYLES = {  # PiToMe's line is wide, and below lines that it would hide
    PITOME: {"color": VERMILION, "marker": "o", "lw": 3.2, "ms": 8, "zorder": 2.1},
    "released": RELATED,
    BEST: RELATED | {"marker": "^", "ls": ":"},
}
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, DASHES = ("s", "^", "D", "v", "P", "X", "*", "<", ">"), ("-", "--", ":")
BASE = {"color": "grey", "lw": 1, "ls": "--", "label": "unmerged"}
HOME = "each in its own place"
DPI, PALETTE = 110, 128
Number = Callable[[Row], float | None]
AXES: dict[str, tuple[str, Number]] = {
    "tokens": ("image tokens that are kept", lambda r: r.kept_tokens),
    "flops": ("GFLOPs of a prompt, counted", lambda r: r.gflops.get("total")),
    "milliseconds": ("prefill in milliseconds, median", lambda r: r.times.get("prefill", (None, None))[1]),
}


def draw(rows: Sequence[Row], folder: Path, prefix: str) -> list[Path]:
    """Writes the plots for which these rows have numbers, and returns their paths.

    Args:
        rows: of one task.
        folder: an existing one.
        prefix: of the file names.
    """
    import matplotlib

    matplotlib.use("Agg")
    styles = _styles([row.method for row in rows])
    merged = [row for row in rows if row.method != UNMERGED]
    drawn = []
    for name, (label, x) in AXES.items():
        if merged and all(x(row) is not None for row in merged):
            drawn.append(_draw_places(rows, styles, x, label, folder / f"{prefix}-{name}.png"))
    kinds = [kind for kind in ANSWER_TYPES if any(kind in row.by_type for row in rows)]
    if merged and len(kinds) > 1:
        drawn.append(_draw_answer_types(rows, styles, kinds, folder / f"{prefix}-types.png"))
    return drawn


def _styles(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The line style of each method, the same in every plot."""
    found = dict(STYLES)
    for i, method in enumerate(m for m in dict.fromkeys(methods) if m not in (*STYLES, UNMERGED)):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        dash = DASHES[i // len(COLOURS) % len(DASHES)]
        found[method] = {"color": colour, "marker": marker, "ls": dash, "lw": 1.3, "ms": 5}
    return found


def panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows per panel: every place, the first with the controls at the input; each method at home."""
    places = [p for p in dict.fromkeys(row.place for row in rows) if p not in ("", INPUT)]
    found = {place: [row for row in rows if row.place == place] for place in places}
    if places:
        found[places[0]] += [row for row in rows if row.place == INPUT]
    home = [row for row in rows if row.is_at_home and row.method != UNMERGED]
    if len({row.place for row in home}) > 1 or not places:
        found[HOME] = home
    return found


def _draw_places(rows: Sequence[Row], styles: dict, x: Number, label: str, path: Path) -> Path:
    """A panel per place, all with the same axes."""
    from matplotlib import pyplot

    shown, base = panels(rows), unmerged_row(list(rows))
    columns = min(len(shown), 3)
    lines = -(-len(shown) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(5 * columns, 3.9 * lines), sharex=True, sharey=True, squeeze=False
    )
    for plot, (name, members) in zip(axes.flat, shown.items()):
        _plot_lines(plot, members, styles, x, lambda row: row.score, name == HOME)
        if base is not None:
            plot.axhline(base.score, **BASE)
            if x(base) is not None:
                plot.plot([x(base)], [base.score], color="grey", marker="*", ms=11, zorder=3)
        plot.set(title=name, xlabel=label)
        plot.grid(alpha=0.25)
        plot.tick_params(labelbottom=True)
    for plot in axes.flat[len(shown) :]:
        plot.axis("off")
    for line in axes:
        line[0].set_ylabel("accuracy, %" if rows[0].interval else next(iter(rows[0].metrics), "score"))
    return _save(figure, axes, path)


def _draw_answer_types(rows: Sequence[Row], styles: dict, kinds: Sequence[str], path: Path) -> Path:
    """A row of panels per place with a panel per answer type."""
    from matplotlib import pyplot

    label, x = AXES["tokens"]
    shown, base = panels(rows), unmerged_row(list(rows))
    size = (4.4 * len(kinds), 3.3 * len(shown))
    figure, axes = pyplot.subplots(len(shown), len(kinds), figsize=size, sharex=True, squeeze=False)
    for line, (name, members) in zip(axes, shown.items()):
        for plot, kind in zip(line, kinds):
            _plot_lines(plot, members, styles, x, lambda row, kind=kind: row.by_type.get(kind), name == HOME)
            if base is not None and kind in base.by_type:
                plot.axhline(base.by_type[kind], **BASE)
            plot.set_title(f"{name}: {kind}", fontsize=10)
            plot.grid(alpha=0.25)
        line[0].set_ylabel("accuracy, %")
    for plot in axes[-1]:
        plot.set_xlabel(label)
    return _save(figure, axes, path)


def _plot_lines(plot: Any, rows: Sequence[Row], styles: dict, x: Number, y: Number, is_home: bool) -> None:
    """A line per method and place, PiToMe's with its interval."""
    rows = [row for row in rows if y(row) is not None]
    for method in dict.fromkeys(row.method for row in rows):
        places = dict.fromkeys(row.place for row in rows if row.method == method)
        for place in places:
            line = sorted((row for row in rows if (row.method, row.place) == (method, place)), key=x)
            name = method_title(method)
            if is_home and len(places) > 1:
                name = f"{name} {place_phrase(place)}"
            across = [x(row) for row in line]
            plot.plot(across, [y(row) for row in line], label=name, **styles[method])
            if method == PITOME and all(row.interval and y(row) == row.score for row in line):
                low, high = zip(*(row.interval for row in line))
                plot.fill_between(across, low, high, color=VERMILION, alpha=0.15, lw=0)


def _save(figure: Any, axes: Any, path: Path) -> Path:
    """Writes a figure with one legend for all of its panels."""
    from matplotlib import pyplot
    from PIL import Image

    legend: dict[str, Any] = {}
    for plot in axes.flat:
        for handle, name in zip(*plot.get_legend_handles_labels()):
            legend.setdefault(name, handle)
    figure.tight_layout()
    position = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "ncols": min(len(legend), 6)}
    figure.legend(legend.values(), legend, fontsize=9, **position)
    figure.savefig(path, dpi=DPI, bbox_inches="tight")
    pyplot.close(figure)
    with Image.open(path) as image:  # a palette makes the file three times smaller
        image = image.convert("RGB").quantize(PALETTE, dither=Image.Dither.NONE)
    image.save(path, optimize=True)
    return path
