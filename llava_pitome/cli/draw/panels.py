"""The panels of a figure: tokens and energies of a traced image at points of the model."""

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from llava_pitome.cli.draw import overlay as overlays
from llava_pitome.cli.draw.heat import heat, value_range
from llava_pitome.cli.draw.overlay import Outside, overlay
from llava_pitome.config import MergeConfig
from llava_pitome.tracing import ImageTrace

TOKENS = (
    "The patches of one token have their mean colour, with lines between tokens; a patch that is a token of "
    "its own shows the image."
)
DROPPED = "Dark patches were dropped."
PADDING = "Hatched patches show padding, which is in no token that reaches the language model."
ENERGY = (
    "Energy (equation 4 of the paper, or the recipe's variant) is that of the tokens before a layer's merge: "
    "high for tokens that are similar to many others, which merge; low for distinct tokens, which are "
    "protected. Every map has its own scale."
)


class Point(NamedTuple):
    """A point of the model: after a layer, or after the projector.

    Attributes:
        title: its name in the figure.
        place: a name in PLACES.
        layer: from 0; 0 after the projector.
    """

    title: str
    place: str
    layer: int


class Panel(NamedTuple):
    """One image of a figure.

    Attributes:
        image: None for a panel without an image, whose caption, if any, says why.
        caption: a line below the image.
        values: the lowest and highest value of its colour scale; None: it has none.
    """

    image: Image.Image | None
    caption: str
    values: tuple[float, float] | None = None


class Row(NamedTuple):
    """A row of a figure: its name, a detail below the name, and its panels."""

    name: str
    detail: str
    panels: Sequence[Panel]


def plain(traced: ImageTrace, size: int) -> Panel:
    """The image without merges, about `size` pixels high and wide."""
    image = overlays.plain(traced.image, _step(traced, size), traced.grid, _outside(traced))
    return Panel(image, f"{traced.trace.patches} patches")


def tokens(traced: ImageTrace, point: Point, size: int) -> Panel:
    """The tokens after a point of the model."""
    state = traced.trace.after(point.place, point.layer)
    step, outside = _step(traced, size), _outside(traced)
    image = overlay(traced.image, state.slot, step, traced.grid, state.dropped, outside)
    if point.place == "prefix" and traced.newlines:
        newlines = f"{traced.newlines} newline{'s' * (traced.newlines > 1)}"
        return Panel(image, f"{state.tokens - traced.newlines} tokens, {newlines}")
    return Panel(image, f"{state.tokens} tokens")


def energy(traced: ImageTrace, point: Point, size: int, fallback: bool = False) -> Panel:
    """The energies of the tokens before the merge at a point of the model.

    The panel has no image where nothing merges, or where the method has no energy and `fallback` does not ask
    for PiToMe's.
    """
    merge = traced.trace.merge(point.place, point.layer)
    if merge is None or not merge.compared:
        return Panel(None, "nothing merges here")
    values = merge.energy(fallback)
    if values is None:
        return Panel(None, f"{merge.record.method} has no energy")
    slot, dropped, count = merge.before
    image = heat(values, slot, _step(traced, size), traced.grid, dropped, _outside(traced))
    return Panel(image, f"before: {count} tokens", value_range(values, dropped))


def rows(
    name: str, traced: ImageTrace, points: Sequence[Point], size: int, energies: str = "own"
) -> list[Row]:
    """The rows of one method: its tokens and, where there are any, its energies.

    Args:
        name: of the method.
        traced: the image.
        points: of the model, one per column; the image itself is the column before them.
        size: the most pixels of a panel.
        energies: "own": of methods that have an energy; "all": PiToMe's for the others too; "none".
    """
    panels = [plain(traced, size), *(tokens(traced, point, size) for point in points)]
    found = [Row(name, describe(traced.config), panels)]
    if energies == "none":
        return found
    maps = [energy(traced, point, size, energies == "all") for point in points]
    if any(panel.image for panel in maps):
        method = traced.config.method
        is_own = any(merge.energy() is not None for merge in traced.trace.merges)
        detail = f"of {method}" if is_own else f"PiToMe's, of the tokens of {method}"
        found.append(Row("energy", detail, [Panel(None, ""), *maps]))
    return found


def legend(traces: Sequence[ImageTrace], rows: Sequence[Row]) -> str:
    """The text below a figure."""
    any_dropped = any(bool(t.trace.merges and t.trace.merges[-1].after.dropped.any()) for t in traces)
    any_padding = any(t.padding is not None and bool(t.padding.any()) for t in traces)
    any_energy = any(panel.values for row in rows for panel in row.panels)
    return " ".join([TOKENS] + [DROPPED] * any_dropped + [PADDING] * any_padding + [ENERGY] * any_energy)


def describe(config: MergeConfig) -> str:
    """How far a config merges, and where."""
    parts = [f"{config.tokens} tokens"] if config.tokens is not None else []
    names = {"tokens_per_tile": "a tile", "tokens_per_frame": "a frame", "tokens_per_video": "a video"}
    parts += [f"{n} tokens {of}" for name, of in names.items() if (n := getattr(config, name)) is not None]
    if isinstance(config.ratio, tuple):
        parts.append("a ratio per layer")
    elif config.ratio is not None:
        parts.append(f"ratio {config.ratio:g}")
    if config.prefix is not None:
        parts.append(f"{_kept(config.prefix)} at the prefix")
    parts += [f"{_kept(keep)} in the LLM" for keep in config.decoder.values()]
    if config.resize is not None:
        parts.append(f"resized to {config.resize[0]} x {config.resize[1]}")
    return ", ".join(parts)


def _kept(keep: float | int) -> str:
    return f"{keep} tokens" if isinstance(keep, int) else f"ratio {keep:g}"


def _outside(traced: ImageTrace) -> Outside | None:
    """The cells of the grid that no token stands for."""
    return None if traced.blank is None else Outside(traced.padding, traced.blank)


def _step(traced: ImageTrace, size: int) -> int:
    """Pixels per patch."""
    return max(size // max(traced.grid), 1)
