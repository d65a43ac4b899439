"""Several pictures on one sheet: rows with a name, columns with a head, and a line below each picture."""

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw

from llava_pitome.cli.draw.heat import bar
from llava_pitome.cli.draw.lettering import FAINT, INK, line_height, width, wrapped, write

PAPER, EMPTY = (255, 255, 255), (243, 244, 246)
MARGIN, GAP = 16, 12  # pixels around the sheet, and between pictures
LABEL = 150  # the most pixels for the names of rows


class Panel(NamedTuple):
    """One picture of a sheet.

    Attributes:
        picture: what is to be seen; None: nothing, and `caption`, if any, says why.
        caption: a line below it.
        ends: the numbers at the ends of its colour scale; None: it has none.
    """

    picture: Image.Image | None
    caption: str
    ends: tuple[float, float] | None = None


class Row(NamedTuple):
    """A row of a sheet: its name, what else is to be said of it, and its pictures."""

    name: str
    detail: str
    panels: Sequence[Panel]


class Layout(NamedTuple):
    """Where things are on a sheet, in pixels.

    Attributes:
        size: across the room of each picture.
        letters: height of the font.
        label: across the names of the rows.
        top: of the first row.
        heights: of the rows.
    """

    size: int
    letters: int
    label: int
    top: int
    heights: list[int]

    def column(self, i: int) -> int:
        """The left end of a column of pictures; behind the last one, the sheet's right end is near."""
        return MARGIN + self.label + GAP + i * (self.size + GAP)


def sheet(heads: Sequence[str], rows: Sequence[Row], note: str) -> Image.Image:
    """Rows of pictures as one picture, as large as the pictures make it.

    Args:
        heads: what stands above each column.
        rows: with as many panels as there are heads.
        note: what is to be said below it all.
    """
    laid = _layout(heads, rows)
    size, letters = laid.size, laid.letters
    across = laid.column(len(heads)) - GAP + MARGIN
    below = wrapped(note, letters, across - 2 * MARGIN)
    high = laid.top + sum(laid.heights) + line_height(letters) * len(below) + MARGIN
    whole = Image.new("RGB", (across, high), PAPER)
    draw = ImageDraw.Draw(whole)
    for i, head in enumerate(heads):
        write(draw, wrapped(head, letters, size), (laid.column(i), MARGIN), letters, INK, size)
    y = laid.top
    for row, height in zip(rows, laid.heights):
        name, detail = _label(row, laid.letters, laid.label)
        write(draw, name, (MARGIN, y), letters)
        write(draw, detail, (MARGIN, y + line_height(letters) * len(name)), letters, FAINT)
        for i, panel in enumerate(row.panels):
            _place(whole, draw, panel, (laid.column(i), y), size, letters)
        y += height
    write(draw, below, (MARGIN, y), letters, FAINT)
    return whole


def _layout(heads: Sequence[str], rows: Sequence[Row]) -> Layout:
    """Where things are on a sheet."""
    shown = [panel.picture for row in rows for panel in row.panels if panel.picture is not None]
    size = max(max(picture.size) for picture in shown)
    letters = max(size // 17, 11)
    line = line_height(letters)
    label = max(width(text, letters) for row in rows for text in (row.name, row.detail))
    label = min(label, LABEL * letters // 13)
    top = MARGIN + line * max(len(wrapped(head, letters, size)) for head in heads) + GAP // 2
    heights = []
    for row in rows:
        scale = line if any(panel.ends for panel in row.panels) else 0
        words = line * sum(map(len, _label(row, letters, label)))
        heights.append(max(size + scale + line, words) + GAP)
    return Layout(size, letters, label, top, heights)


def _label(row: Row, letters: int, room: int) -> tuple[list[str], list[str]]:
    """A row's name and what else is said of it, in lines."""
    return wrapped(row.name, letters, room), wrapped(row.detail, letters, room)


def _place(
    whole: Image.Image, draw: ImageDraw.ImageDraw, panel: Panel, at: tuple[int, int], size: int, letters: int
) -> None:
    """Puts a picture on a sheet, with what stands below it."""
    x, y = at
    line = line_height(letters)
    if panel.picture is None and not panel.caption:
        return
    if panel.picture is None:
        draw.rectangle((x, y, x + size - 1, y + size - 1), fill=EMPTY)
        said = wrapped(panel.caption, letters, size - 2 * GAP)
        write(draw, said, (x + GAP, y + (size - line * len(said)) // 2), letters, FAINT, size - 2 * GAP)
        return
    whole.paste(
        panel.picture, (x + (size - panel.picture.width) // 2, y + (size - panel.picture.height) // 2)
    )
    y += size + 3
    if panel.ends:
        _scale(whole, draw, panel.ends, (x, y), size, letters)
        y += line
    write(draw, wrapped(panel.caption, letters, size)[:1], (x, y), letters, INK, size)


def _scale(
    whole: Image.Image,
    draw: ImageDraw.ImageDraw,
    ends: tuple[float, float],
    at: tuple[int, int],
    size: int,
    letters: int,
) -> None:
    """Draws a colour scale with the numbers at its ends."""
    (x, y), line = at, line_height(letters)
    low, high = (f"{round(end, 2) + 0:.2f}" for end in ends)  # without a negative zero
    start, end = width(low, letters) + 6, size - width(high, letters) - 6
    write(draw, [low], (x, y), letters)
    write(draw, [high], (x + end + 6, y), letters)
    colours = bar(max(end - start, 1), line // 2)
    whole.paste(colours, (x + start, y + (line - colours.height) // 2))


def strip(pictures: Sequence[Image.Image], gap: int = 8) -> Image.Image:
    """Pictures of one height side by side on white."""
    whole = Image.new(
        "RGB",
        (sum(p.width for p in pictures) + gap * (len(pictures) - 1), max(p.height for p in pictures)),
        PAPER,
    )
    x = 0
    for picture in pictures:
        whole.paste(picture, (x, 0))
        x += picture.width + gap
    return whole
