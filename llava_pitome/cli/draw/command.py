"""`llava-pitome draw`: which patches of a picture became one token, in several layers, by several methods."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_pitome import embedded
from llava_pitome.cli import model_options as commands
from llava_pitome.cli import options as options_module
from llava_pitome.cli.draw.choices import configs, layers
from llava_pitome.cli.options import whole
from llava_pitome.image_io import open_image
from llava_pitome.models import checkpoints

if TYPE_CHECKING:
    from PIL import Image

    from llava_pitome.cli.draw.panels import Point
    from llava_pitome.tracing.study import Study

SEED = 11  # of the scene "embedded"
QUESTION = "What is in the picture?"
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
SIZES = range(64, 1025)  # pixels across a picture of the sheet


def describe(subparsers: Any, name: str) -> None:
    """Adds the command and its options to a parser's subparsers."""
    parser = subparsers.add_parser(
        name,
        help="draw which patches of a picture became one token",
        description="Draws a picture's tokens behind several tower layers, and PiToMe's energies, by method.",
    )
    add = parser.add_argument
    add("image", help="a picture file; embedded or embedded:SEED is one of the embedded scenes")
    add("-o", "--output", type=Path, default=Path("draw.png"), help=f"{', '.join(ENDINGS)} (draw.png)")
    counts = options_module.reader(
        options_module.Option(None, _layers, "whole numbers from 1, with commas between them", "")
    )
    add("--layers", type=counts, help="tower layers to look behind, from 1 (four up to the last that merges)")
    add("--energy", choices=("own", "all", "none"), default="own",
        help="energy maps of methods that go by an energy, of all, or none (own)")  # fmt: skip
    add("--question", default=QUESTION, help=f"for methods that merge in the language model ({QUESTION})")
    size = options_module.reader(
        options_module.Option(None, _size, f"a whole number from {SIZES[0]} to {SIZES[-1]}", "")
    )
    add("--size", type=size, default=224, help="pixels across each picture (224)")
    options_module.add_flags(parser, options_module.merge_options(methods=True))
    options_module.add_flags(parser, commands.MODEL_OPTIONS)


def run(options: argparse.Namespace) -> int:
    """Draws what the options ask for; whatever can be refused is, before the model is loaded.

    Raises:
        ValueError: options that do not go together or do not fit the model, a picture that cannot be opened,
            or a file that cannot be written.
    """
    _check_output(options.output)
    picture = _picture(options.image)
    commands.check_model(options)
    size = checkpoints.patches_and_layers(options.model)
    chosen = configs(options, *size)
    shown = layers(options.layers, chosen, *size)
    inside = [config.method for config in chosen.values() if config.decoder]
    if inside and not options.question.strip():
        raise ValueError(
            f"--question {options.question!r} is not allowed: {inside[0]} merges in the language model, "
            "where it is read"
        )
    from llava_pitome.api import remove
    from llava_pitome.cli.draw import panels
    from llava_pitome.cli.draw.sheet import sheet
    from llava_pitome.tracing.study import study

    model, processor = commands.load(options, None)
    remove(model)  # a checkpoint that was saved merging
    studies = {
        name: study(model, processor, picture, config, options.question) for name, config in chosen.items()
    }
    points = _points(list(studies.values()), shown)
    rows = [
        row
        for name, found in studies.items()
        for row in panels.rows(name, found, points, options.size, options.energy)
    ]
    note = panels.note(list(studies.values()), rows)
    whole = sheet(["what the tower sees", *(point.head for point in points)], rows, note)
    _save(whole, options.output)
    for name, found in studies.items():
        sys.stdout.write(f"{name}, {panels.said(found.config)}: {_counts(found, points)}\n")
    sys.stdout.write(f"{options.output}\n")
    return 0


def _points(studies: "Sequence[Study]", layers: list[int]) -> "list[Point]":
    """The columns: tower layers, what reaches the language model where that is less, and merges inside it."""
    from llava_pitome.cli.draw.panels import Point

    points = [Point(f"behind layer {n}", "tower", n - 1) for n in layers]
    last = layers[-1] - 1 if layers else -1
    histories = [study.history for study in studies]
    if any(h.after("prefix").tokens < h.after("tower", last).tokens for h in histories):
        points.append(Point("to the LLM", "prefix", 0))
    inside = {m.layer for h in histories for m in h.merges if m.place == "decoder"}
    return points + [Point(f"in the LLM, decoder {n}", "decoder", n) for n in sorted(inside)]


def _counts(study: "Study", points: "Sequence[Point]") -> str:
    """The tokens at every column, for people."""
    found = [f"{point.head} {study.history.after(point.place, point.layer).tokens}" for point in points]
    return ", ".join([f"{study.history.patches} patches", *found])


def _picture(named: str) -> "Image.Image":
    """The picture that is named.

    Raises:
        ValueError: it cannot be opened.
    """
    word, colon, seed = named.partition(":")
    if word != embedded.NAME:
        return open_image(named)
    if colon and not seed.isdecimal():
        raise ValueError(f"{named} is no embedded scene: behind the colon stands a whole number, {word}:7")
    from PIL import Image

    from llava_pitome.embedded.render import render
    from llava_pitome.embedded.scenes import scene

    return Image.fromarray(render(scene(int(seed or SEED))))


def _check_output(path: Path) -> None:
    """Raises ValueError where the sheet could not be written."""
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"--output {path} must end in one of {', '.join(ENDINGS)}")
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder; it must be a file")
    if not path.parent.is_dir():
        raise ValueError(f"--output {path}: there is no folder {path.parent}")
    try:
        if path.exists():
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(f"--output {path} cannot be written: {error.strerror}") from error


def _save(whole: "Image.Image", path: Path) -> None:
    """Writes the sheet.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        whole.save(path, optimize=True)
    except OSError as error:
        raise ValueError(f"--output {path} cannot be written: {error}") from error


def _layers(text: str) -> tuple[int, ...]:
    """Reads whole numbers from 1, separated by commas."""
    return tuple(whole(1)(word) for word in text.split(","))


def _size(text: str) -> int:
    """Reads a number of pixels."""
    if int(text) not in SIZES:
        raise ValueError(text)
    return int(text)
