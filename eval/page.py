"""A report as one HTML file that needs nothing else: styles and pictures are inside."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from eval.examples import Example
from eval.labels import spot
from eval.verdicts import title

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem }
h1, h2, h3 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0 } .wide { overflow-x: auto }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: right; white-space: nowrap }
th { position: sticky; top: 0; background: #f4f4f4; white-space: normal; vertical-align: bottom }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left } tr.mine { background: #fdf0e8; font-weight: 600 }
img { max-width: 100% } .example { border: 1px solid #ddd; border-radius: 6px; padding: 1rem; margin: 1rem 0 }
.answers { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: 0; width: 14rem }
figcaption { font-size: 13px } .right, .wrong { font-weight: 600 }
.right { color: #0072B2 } .wrong { color: #B34700 }
.small { color: #555; font-size: 13px }
"""


def page(heading: str, parts: Iterable[str]) -> str:
    """The whole file."""
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(heading)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(heading)}</h1>\n{body}\n</body>\n</html>\n"
    )


def section(name: str, level: int = 2) -> str:
    """A heading."""
    return f"<h{level}>{escape(name)}</h{level}>"


def paragraph(text: str, small: bool = False) -> str:
    """A paragraph."""
    kind = ' class="small"' if small else ""
    return f"<p{kind}>{escape(text)}</p>"


def bullets(lines: Iterable[str]) -> str:
    """A list."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def table(heads: Sequence[str], lines: Sequence[Sequence[str]], mine: str) -> str:
    """A table; lines that hold the cell `mine` stand out."""
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    body = "\n".join(_line(line, mine in line) for line in lines)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _line(cells: Sequence[str], mine: bool) -> str:
    """A line of a table."""
    kind = ' class="mine"' if mine else ""
    return f"<tr{kind}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


def picture(path: Path) -> str:
    """A picture from a file."""
    return _image(path.read_bytes(), path.stem)


def example(shown: Example) -> str:
    """A question with what every method answered and saw."""
    start = (
        f"<p><b>{escape(shown.question)}</b> &mdash; true answer: <b>{escape(shown.truth)}</b></p>"
        f'<div class="answers"><figure>{_image(_png(shown.picture), "the picture")}'
        "<figcaption>the picture</figcaption></figure>"
    )
    figures = []
    for answer in shown.answers:
        row = answer.row
        verdict = ("right", "&#10003; right") if answer.right else ("wrong", "&#10007; wrong")
        where = f" {spot(row.place)}, {row.tokens} tokens" if row.place else f", {row.image_tokens} tokens"
        name = escape(title(row.method) + where)
        figures.append(
            f"<figure>{_image(_png(answer.drawn), row.name)}<figcaption>{name}<br>"
            f'&ldquo;{escape(answer.said)}&rdquo; <span class="{verdict[0]}">{verdict[1]}</span>'
            "</figcaption></figure>"
        )
    return f'<div class="example">{start}{"".join(figures)}</div></div>'


def _image(png: bytes, name: str) -> str:
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _png(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, "PNG", optimize=True)
    return data.getvalue()
