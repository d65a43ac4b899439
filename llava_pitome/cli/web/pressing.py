"""What pressing does: an answer as it grows, a look at a point of the model, how many tokens are left."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from llava_pitome.cli.draw import panels
from llava_pitome.cli.draw.panels import Point
from llava_pitome.cli.web import received
from llava_pitome.cli.web.desk import Answer, Desk
from llava_pitome.cli.web.start import merging
from llava_pitome.config import MergeConfig
from llava_pitome.image_io import open_image
from llava_pitome.methods import METHODS
from llava_pitome.tracing import ImageTrace

SIZE = 448  # pixels across a drawn picture
EMPTY = "*Ask something; what merged is shown here.*"


class Pressing:
    """What the page does at a desk, with values as clients send them.

    Every method raises gr.Error for values that are not allowed, before anything is worked out.
    """

    def __init__(self, desk: Desk):
        """Asks the model at a desk."""
        self._desk = desk

    def ask(self, picture: Any, question: Any, method: Any, ratio: Any, compare: Any) -> Iterator[tuple]:
        """What changes on the page while an answer is worked out.

        Its items are answer, numbers, plain answer, its numbers, the column beside, study, layer slider.
        """
        try:
            config = self._merging(method, ratio)
            words, both = received.question(question), received.compare(compare)
            yield from self._asked(picture and picture["path"], words, config, both)
        except ValueError as error:
            raise refusal(error) from error

    def look(self, seen: ImageTrace | None, layer: Any) -> tuple[Any, Any, str]:
        """Overlay, energy and a line about a point of the model."""
        points = None if seen is None else _points(seen)
        try:
            at = received.layer(layer, self._desk.feature if points is None else len(points) - 1)
        except ValueError as error:
            raise refusal(error) from error
        return (None, None, EMPTY) if points is None else _look(seen, points[at])

    def amount(self, method: Any, ratio: Any) -> str:
        """How many tokens the choices leave."""
        try:
            config = self._merging(method, ratio)
        except ValueError as error:
            raise refusal(error) from error
        tokens = config.tokens_at(self._desk.patches, self._desk.feature)
        inside = min(config.decoder.values(), default=tokens)
        place = METHODS[config.method].places[0]
        return f"{min(tokens, inside)} image tokens of {self._desk.patches}, merged in the {place}"

    def _merging(self, method: Any, ratio: Any) -> MergeConfig:
        """How the choices merge."""
        name, keep = received.method(method), received.ratio(ratio)
        return merging(name, keep, self._desk.patches, self._desk.feature)

    def _asked(self, path: str | None, question: str, config: MergeConfig, both: bool) -> Iterator[tuple]:
        """As `ask`, of values that are allowed."""
        picture = open_image(Path(path).read_bytes()) if path else None
        same = gr.skip()
        yield "", "", "", "", gr.update(visible=both), None, same
        for found in self._desk.ask(picture, question, config):
            yield found.text, _line(found), same, same, same, same, same
        if picture is not None:
            seen = self._desk.study(picture, question, config)
            last = len(_points(seen)) - 1
            yield same, same, same, same, same, seen, gr.update(maximum=last, value=last)
        if both:
            for found in self._desk.ask(picture, question, None):
                yield same, same, found.text, _line(found), same, same, same


def refusal(error: ValueError) -> gr.Error:
    """An error that is shown in words."""
    return gr.Error(str(error), print_exception=False)


def _points(seen: ImageTrace) -> list[Point | None]:
    """Where one can look: the picture, behind every layer that merges, and what the language model gets."""
    found: list[Point | None] = [None]
    for merge in seen.trace.merges:
        head = {
            "tower": f"behind layer {merge.layer + 1} of the tower", "prefix": "behind the projector",
            "decoder": f"behind layer {merge.layer + 1} of the language model",
        }[merge.place]  # fmt: skip
        found.append(Point(head, merge.place, merge.layer))
    return found


def _look(seen: ImageTrace, point: Point | None) -> tuple[Any, Any, str]:
    """The pictures at a point of the model, and a line about it."""
    if point is None:
        return panels.plain(seen, SIZE).image, None, f"the picture: {seen.trace.patches} patches"
    tokens = panels.tokens(seen, point, SIZE)
    energy = panels.energy(seen, point, SIZE, fallback=True)
    before = seen.trace.merge(point.place, point.layer).before.tokens
    said = f"{point.title}: **{tokens.caption}** of {seen.trace.patches} patches"
    return tokens.image, energy.image, f"{said}; energy of the {before} in front"


def _line(found: Answer) -> str:
    """The numbers of an answer that is whole."""
    if found.numbers is None:
        return ""
    return f"{found.numbers.line()} · {found.gflops:.2f} GFLOPs"
