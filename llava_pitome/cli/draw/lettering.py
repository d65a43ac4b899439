"""Text in pictures, in the font that pillow brings."""

from functools import cache

from PIL import ImageDraw, ImageFont

INK, FAINT = (32, 33, 36), (112, 117, 122)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, `size` pixels high."""
    return ImageFont.load_default(size)


def line_height(size: int) -> int:
    """Pixels from one line to the next."""
    return sum(font(size).getmetrics()) + max(size // 5, 2)


def width(text: str, size: int) -> int:
    """Pixels across a line of text."""
    return round(font(size).getlength(text) + 0.5)


def wrapped(text: str, size: int, room: int) -> list[str]:
    """Text in lines that fit into `room` pixels; a word that is longer is cut in pieces."""
    lines: list[str] = []
    for word in text.split():
        if lines and width(f"{lines[-1]} {word}", size) <= room:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and width(lines[-1] + letter, size) > room:
                lines.append("")
            lines[-1] += letter
    return lines


def write(
    draw: ImageDraw.ImageDraw,
    lines: list[str],
    at: tuple[int, int],
    size: int,
    colour: tuple[int, int, int] = INK,
    centre: int = 0,
) -> None:
    """Writes lines one below the other from a point on; in the middle of `centre` pixels where given."""
    x, y = at
    for text in lines:
        inset = max((centre - width(text, size)) // 2, 0) if centre else 0
        draw.text((x + inset, y), text, fill=colour, font=font(size))
        y += line_height(size)
