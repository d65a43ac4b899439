"""A figure of panels in rows and columns, drawn by matplotlib."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from llava_pitome.cli.draw.heat import COLOURS
from llava_pitome.cli.draw.panels import Panel, Row

DPI = 100
INK, GREY, EMPTY = "#202124", "#70757a", "#f3f4f6"
GAP, MARGIN = 12, 16  # pixels between panels, and around the figure
COLOURMAP = LinearSegmentedColormap.from_list("energy", np.array(COLOURS) / 255)


def figure(titles: Sequence[str], rows: Sequence[Row], legend: str) -> Figure:
    """A figure in which one pixel of a panel's image is one pixel of the figure.

    Args:
        titles: of the columns.
        rows: with one panel per title.
        legend: the text below.
    """
    size = max(max(panel.image.size) for row in rows for panel in row.panels if panel.image)
    font = max(size // 17, 11)  # pixels
    letters = round(1.7 * size / font)  # that fit into a panel's width
    below = [GAP + font * (4 if any(panel.values for panel in row.panels) else 2) for row in rows]
    heights = [height for gap in below for height in (size, gap)]
    width, label = len(titles) * (size + GAP) - GAP, 10 * font
    fig = Figure((width / DPI, sum(heights) / DPI), DPI)
    grid = fig.add_gridspec(
        len(heights), len(titles), height_ratios=heights, wspace=GAP / size, hspace=0,
        left=0, right=1, bottom=0, top=1,
    )  # fmt: skip
    style = {"fontsize": font * 72 / DPI, "color": INK}
    faint = style | {"color": GREY}
    for i, row in enumerate(rows):
        axes = [fig.add_subplot(grid[2 * i, j]) for j in range(len(titles))]
        for panel, ax in zip(row.panels, axes):
            _draw(ax, panel, size, letters, style)
        name, detail = (textwrap.fill(text, 16) for text in (row.name, row.detail))
        for text, look in ((name, style), ("\n" * (name.count("\n") + 1) + detail, faint)):
            axes[0].text(-label / size, 1, text, look, va="top", transform=axes[0].transAxes)
        for title, ax in zip(titles if i == 0 else (), axes):
            ax.set_title(textwrap.fill(title, letters), style, pad=4)
    fig.text(-label / width, 0, textwrap.fill(legend, round(1.7 * (width + label) / font)), faint, va="top")
    return fig


def save(fig: Figure, path: str | Path) -> None:
    """Writes a figure with a margin around everything drawn; cut at whole pixels, images stay sharp."""
    box = fig.get_tightbbox().padded(MARGIN / DPI)
    pixels = np.array([np.floor(box.min * DPI), np.ceil(box.max * DPI)])
    fig.savefig(path, bbox_inches=Bbox(pixels / DPI), pil_kwargs={"optimize": True})


def _draw(ax: Axes, panel: Panel, size: int, letters: int, style: dict[str, Any]) -> None:
    """Draws a panel; one with neither image nor caption stays white."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if panel.image is None:
        ax.set_facecolor(EMPTY if panel.caption else "white")
        caption, faint = textwrap.fill(panel.caption, letters - 4), style | {"color": GREY}
        ax.text(0.5, 0.5, caption, faint, ha="center", va="center", transform=ax.transAxes)
        return
    ax.imshow(panel.image, interpolation="nearest")
    left, top = ((size - side) // 2 + 0.5 for side in panel.image.size)  # pixel centres are whole numbers
    ax.set(xlim=(-left, size - left), ylim=(size - top, -top))
    if panel.values:
        height = style["fontsize"] / size
        scale = ScalarMappable(Normalize(*panel.values), COLOURMAP)
        bar = ax.inset_axes((0, -1.7 * height, 1, height))
        ax.figure.colorbar(scale, bar, orientation="horizontal").outline.set_visible(False)
        ends = [f"{round(end, 2) + 0:.2f}" for end in panel.values]  # without a negative zero
        bar.set_xticks(panel.values, ends, fontsize=style["fontsize"], color=INK)
        bar.tick_params(length=0)
        for tick, side in zip(bar.get_xticklabels(), ("left", "right")):
            tick.set_ha(side)
        ax = bar
    ax.set_xlabel(panel.caption, style, labelpad=2)
