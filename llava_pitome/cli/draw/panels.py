"""What stands on a sheet: a study's tokens and energies at some point of the model, one picture each."""

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from llava_pitome.cli.draw.heat import heat, spread
from llava_pitome.cli.draw.overlay import overlay
from llava_pitome.cli.draw.sheet import Panel, Row
from llava_pitome.config import MergeConfig
from llava_pitome.tracing.study import Study

TOKENS = (
    "The patches of one token have their mean colour, with lines between tokens; a patch that is a token of "
    "its own shows the picture."
)
DROPPED = "Dark patches were dropped."
ENERGY = (
    "Energy (the paper's equation 4, or what the recipe makes of it) is that of the tokens in front of a "
    "layer's merge: high in a crowd, where tokens merge, low where one is alone and protected. Every map has "
    "its own scale."
)


class Point(NamedTuple):
    """A point of the model.

    Attributes:
        head: what it is called.
        place: a name in PLACES.
        layer: behind which to look, from 0; 0 at the prefix.
    """

    head: str
    place: str
    layer: int


def plain(study: Study, size: int) -> Panel:
    """The picture as the tower sees it, `size` pixels across or a little less."""
    rows, columns = (n * _step(study, size) for n in study.grid)
    shown = study.view.resize((columns, rows), Image.Resampling.BICUBIC)
    return Panel(shown, f"{study.history.patches} patches")


def tokens(study: Study, point: Point, size: int) -> Panel:
    """Which patches are one token behind a point of the model."""
    state = study.history.after(point.place, point.layer)
    drawn = overlay(study.view, state.slot, _step(study, size), study.grid, state.dropped)
    return Panel(drawn, f"{state.tokens} tokens")


def energy(study: Study, point: Point, size: int, borrowed: bool = False) -> Panel:
    """The energy of the token that each patch is in, in front of the merge at a point of the model.

    Where the method goes by no energy there is no picture, unless PiToMe's is `borrowed`; nor is there where
    nothing merges.
    """
    merge = study.history.merge(point.place, point.layer)
    if merge is None:
        return Panel(None, "nothing merges here")
    values = merge.energy(borrowed)
    if values is None:
        return Panel(None, f"{merge.sight.method} goes by no energy")
    slot, dropped, count = merge.before
    drawn = heat(values, slot, _step(study, size), study.grid, dropped)
    return Panel(drawn, f"in front: {count} tokens", spread(values, dropped))


def rows(name: str, study: Study, points: Sequence[Point], size: int, energies: str = "own") -> list[Row]:
    """A study's rows of a sheet: its tokens, and the energies.

    Args:
        name: of the method.
        study: what is drawn.
        points: of the model, one a column; the picture itself is in front of them.
        size: pixels across a picture.
        energies: "own": where the method goes by an energy; "all": PiToMe's for the others too; "none".
    """
    found = [Row(name, said(study.config), [plain(study, size), *(tokens(study, p, size) for p in points)])]
    if energies == "none":
        return found
    borrowed = energies == "all"
    maps = [energy(study, point, size, borrowed) for point in points]
    if any(panel.picture for panel in maps):
        method = study.config.method
        whose = f"that {method} goes by" if _own(study) else f"PiToMe's, of what {method} merges by"
        found.append(Row("energy", whose, [Panel(None, ""), *maps]))
    return found


def note(studies: Sequence[Study], rows: Sequence[Row]) -> str:
    """What is to be said below a sheet."""
    dropped = any(bool(study.history.after("decoder", 10**6).dropped.any()) for study in studies)
    mapped = any(panel.ends for row in rows for panel in row.panels)
    return " ".join([TOKENS] + [DROPPED] * dropped + [ENERGY] * mapped)


def said(config: MergeConfig) -> str:
    """How far a config merges, and where."""
    parts = [f"{config.tokens} tokens"] if config.tokens is not None else []
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


def _own(study: Study) -> bool:
    """Whether the method goes by an energy anywhere."""
    return any(merge.energy() is not None for merge in study.history.merges)


def _step(study: Study, size: int) -> int:
    """Screen pixels across a patch."""
    return max(size // max(study.grid), 1)
