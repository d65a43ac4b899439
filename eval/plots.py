"""A report's pictures: accuracy against tokens, FLOPs and milliseconds, by place, and by answer type.

Colours are Okabe and Ito's, which colour-blind people can tell apart; methods also differ in marker and dash.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eval.combinations import REFERENCE, UNMERGED
from eval.labels import INPUT, RESIZE, spot
from eval.results import ANSWER_TYPES
from eval.rows import Row
from eval.verdicts import plain, title

MINE = {
    "color": "#D55E00",
    "marker": "o",
    "lw": 3.2,
    "ms": 8,
    "zorder": 2.1,
}  # wide, and below lines that it would hide
RELATED = {"color": "#D55E00", "marker": "s", "ls": "--", "lw": 1.6, "ms": 5}
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, DASHES = ("s", "^", "D", "v", "P", "X", "*", "<", ">"), ("-", "--", ":")
HOME = "each in its own place"
DPI, SHADES = 110, 128
AXES: dict[str, tuple[str, Callable[[Row], float | None]]] = {
    "tokens": (
        "image tokens that are left",
        lambda r: r.tokens if r.place not in ("", INPUT) else r.image_tokens,
    ),
    "flops": ("GFLOPs of a prompt, counted", lambda r: r.gflops.get("total")),
    "milliseconds": ("prefill in milliseconds, median", lambda r: r.times.get("prefill", (None, None))[1]),
}


def draw(rows: Sequence[Row], folder: Path, prefix: str) -> list[Path]:
    """Writes the pictures that these rows can fill, and gives their names.

    Args:
        rows: of one task.
        folder: where to; it is there.
        prefix: of their names.
    """
    import matplotlib

    matplotlib.use("Agg")
    styles = _styles([row.method for row in rows])
    merged = [row for row in rows if row.method != UNMERGED]
    drawn = []
    for name, (label, x) in AXES.items():
        if merged and all(x(row) is not None for row in merged):
            drawn.append(_by_place(rows, styles, x, label, folder / f"{prefix}-{name}.png"))
    kinds = [kind for kind in ANSWER_TYPES if any(kind in row.by_type for row in rows)]
    if merged and len(kinds) > 1:
        drawn.append(_by_type(rows, styles, kinds, folder / f"{prefix}-types.png"))
    return drawn


def _styles(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each method is drawn, the same in every picture."""
    others = [m for m in dict.fromkeys(methods) if m not in (REFERENCE, "released", "best", UNMERGED)]
    found = {REFERENCE: MINE, "released": RELATED, "best": RELATED | {"marker": "^", "ls": ":"}}
    for i, method in enumerate(others):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        dash = DASHES[i // len(COLOURS) % len(DASHES)]
        found[method] = {"color": colour, "marker": marker, "ls": dash, "lw": 1.3, "ms": 5}
    return found


def panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """What is drawn together: every place, the first with the control of smaller pictures; all at home."""
    places = [p for p in dict.fromkeys(row.place for row in rows) if p not in ("", INPUT)]
    found = {place: [row for row in rows if row.place == place] for place in places}
    small = [row for row in rows if row.method == RESIZE]
    if places and small:
        found[places[0]] += small
    home = [row for row in rows if row.at_home and row.method != UNMERGED]
    if len({row.place for row in home}) > 1 or not places:
        found[HOME] = home
    return found


def _by_place(
    rows: Sequence[Row], styles: dict, x: Callable[[Row], float | None], label: str, path: Path
) -> Path:
    """A panel a place, all with the same axes."""
    from matplotlib import pyplot

    shown = panels(rows)
    wide = min(len(shown), 3)
    high = -(-len(shown) // wide)
    figure, axes = pyplot.subplots(
        high, wide, figsize=(5 * wide, 3.9 * high), sharex=True, sharey=True, squeeze=False
    )
    base = plain(list(rows))
    for plot, (name, members) in zip(axes.flat, shown.items()):
        _lines(plot, members, styles, x, lambda row: row.score, name == HOME)
        if base is not None:
            plot.axhline(base.score, color="grey", lw=1, ls="--", label="unmerged")
            if x(base) is not None:
                plot.plot([x(base)], [base.score], color="grey", marker="*", ms=11, zorder=3)
        plot.set_title(name)
        plot.grid(alpha=0.25)
    for plot in axes.flat[len(shown) :]:
        plot.axis("off")
    for row in axes:
        row[0].set_ylabel("accuracy, %" if rows[0].interval else next(iter(rows[0].metrics), "score"))
    for plot in axes.flat[: len(shown)]:
        plot.set_xlabel(label)
        plot.tick_params(labelbottom=True)
    return _save(figure, axes, path)


def _by_type(rows: Sequence[Row], styles: dict, kinds: Sequence[str], path: Path) -> Path:
    """A row of panels a place, in it a panel an answer type."""
    from matplotlib import pyplot

    label, x = AXES["tokens"]
    shown, base = panels(rows), plain(list(rows))
    figure, axes = pyplot.subplots(
        len(shown), len(kinds), figsize=(4.4 * len(kinds), 3.3 * len(shown)), sharex=True, squeeze=False
    )
    for line, (name, members) in zip(axes, shown.items()):
        for plot, kind in zip(line, kinds):
            _lines(plot, members, styles, x, lambda row, kind=kind: row.by_type.get(kind), name == HOME)
            if base is not None and kind in base.by_type:
                plot.axhline(base.by_type[kind], color="grey", lw=1, ls="--", label="unmerged")
            plot.set_title(f"{name}: {kind}", fontsize=10)
            plot.grid(alpha=0.25)
        line[0].set_ylabel("accuracy, %")
    for plot in axes[-1]:
        plot.set_xlabel(label)
    return _save(figure, axes, path)


def _lines(plot: Any, rows: Sequence[Row], styles: dict, x: Callable, y: Callable, placed: bool) -> None:
    """A line a method, with PiToMe's interval."""
    for method in dict.fromkeys(row.method for row in rows):
        mine = [row for row in rows if row.method == method and y(row) is not None]
        for place in dict.fromkeys(row.place for row in mine):
            line = sorted((row for row in mine if row.place == place), key=x)
            several = placed and len({row.place for row in mine}) > 1
            name = f"{title(method)} {spot(place)}" if several else title(method)
            across = [x(row) for row in line]
            plot.plot(across, [y(row) for row in line], label=name, **styles[method])
            if method == REFERENCE and all(row.interval and y(row) == row.score for row in line):
                low, high = zip(*(row.interval for row in line))
                plot.fill_between(across, low, high, color=styles[method]["color"], alpha=0.15, lw=0)


def _save(figure: Any, axes: Any, path: Path) -> Path:
    """Writes a figure with one legend for all of its panels."""
    from matplotlib import pyplot
    from PIL import Image

    named: dict[str, Any] = {}
    for plot in axes.flat:
        for handle, name in zip(*plot.get_legend_handles_labels()):
            named.setdefault(name, handle)
    figure.tight_layout()
    figure.legend(
        named.values(),
        named,
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        ncols=min(len(named), 6),
        fontsize=9,
    )
    figure.savefig(path, dpi=DPI, bbox_inches="tight")
    pyplot.close(figure)
    with Image.open(path) as drawn:  # a third of the size
        few = drawn.convert("RGB").quantize(SHADES, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    return path
