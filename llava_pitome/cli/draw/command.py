"""`llava-pitome draw`: which patches of an image became one token, layer by layer, for several methods."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_pitome import embedded
from llava_pitome.cli.draw.configs import method_configs, shown_layers
from llava_pitome.cli.model_options import MODEL_OPTIONS, check_model, load
from llava_pitome.cli.options import Option, add_flags, merge_options, one_of, several, whole
from llava_pitome.config import MergeConfig
from llava_pitome.image_io import open_image
from llava_pitome.image_layout import ImageLayout
from llava_pitome.video_io import read_video

if TYPE_CHECKING:
    from PIL import Image

    from llava_pitome.cli.draw.panels import Point
    from llava_pitome.models.image_counts import ImageCounts
    from llava_pitome.tracing import ImageTrace

SEED = 11  # of the scene "embedded"
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
OPTIONS = {
    "output": Option(Path("draw.png"), Path, ", ".join(ENDINGS), "the file to write", short="-o"),
    "layers": Option(
        None, several(whole(1)), "whole numbers from 1, with commas between them",
        "tower layers whose outputs are shown; by default four, up to the last that merges",
    ),
    "energy": Option(
        "own", one_of("own", "all", "none"), "own | all | none",
        "energy maps of the methods that have an energy, of all methods, or none",
    ),
    "frames": Option(
        None, whole(1), "a whole number from 1", "reads the file as a video (needs PyAV) and draws at most "
        "as many of its frames",
    ),
    "question": Option("What is in the picture?", str, "text", "for methods that merge in the LLM"),
    "size": Option(224, whole(64, 1024), "a whole number from 64 to 1024", "pixels of each panel"),
    **merge_options(methods=True),
    **MODEL_OPTIONS,
}  # fmt: skip


def describe(subparsers: Any, name: str) -> None:
    """Adds the command's parser."""
    parser = subparsers.add_parser(
        name,
        description="Draws the tokens of an image, or of a video's frames, after several tower layers, and "
        "the energies of tokens, a row per method.",
    )
    parser.add_argument(
        "image",
        help="an image file, or with --frames a video; embedded or embedded:SEED is a scene of the embedded "
        "benchmark",
    )
    add_flags(parser, OPTIONS)


def run(options: argparse.Namespace) -> int:
    """Draws the figure; everything that can be refused is refused before the model is loaded.

    Raises:
        ValueError: options that contradict each other or do not fit the model, an image or video that cannot
            be opened, or an output that cannot be written.
    """
    from llava_pitome.api import remove
    from llava_pitome.cli.draw import figure, panels
    from llava_pitome.models.image_counts import counts_of_checkpoint
    from llava_pitome.tracing import trace_image, trace_video

    _check_output(options.output)
    image = read_video(options.image, options.frames) if options.frames else _image(options.image)
    check_model(options)
    counts = counts_of_checkpoint(options.model)
    layout = _layout(counts, image, options.model)
    sizes = counts.patches, counts.layers, layout
    configs = method_configs(options, *sizes)
    layers = shown_layers(options.layers, configs, *sizes)
    in_language_model = [config.method for config in configs.values() if config.decoder]
    if in_language_model and not options.question.strip():
        raise ValueError(
            f"--question {options.question!r} is not allowed: {in_language_model[0]} merges in the language "
            "model, which reads it"
        )
    model, processor = load(options, MergeConfig(ratio=1.0))  # however it was saved to merge
    remove(model)
    trace = trace_video if options.frames else trace_image
    traces = {
        name: trace(model, processor, image, config, options.question) for name, config in configs.items()
    }
    points = _points(list(traces.values()), layers)
    rows = [
        row
        for name, traced in traces.items()
        for row in panels.rows(name, traced, points, options.size, options.energy)
    ]
    titles = ["tiles" if layout else "input of the tower", *(point.title for point in points)]
    try:
        figure.save(figure.figure(titles, rows, panels.legend(list(traces.values()), rows)), options.output)
    except OSError as error:
        raise ValueError(f"--output {options.output} cannot be written: {error}") from error
    for name, traced in traces.items():
        after = [f"{point.title} {traced.trace.after(point.place, point.layer).tokens}" for point in points]
        newlines = [f"of which {traced.newlines} newlines"] if traced.newlines else []
        line = ", ".join([f"{traced.trace.patches} patches", *after, *newlines])
        sys.stdout.write(f"{name}, {panels.describe(traced.config)}: {line}\n")
    sys.stdout.write(f"{options.output}\n")
    return 0


def _points(traces: "Sequence[ImageTrace]", layers: list[int]) -> "list[Point]":
    """The columns: tower layers, the LLM's input where it has fewer tokens, and merges inside the LLM."""
    from llava_pitome.cli.draw.panels import Point

    points = [Point(f"after layer {n}", "tower", n - 1) for n in layers]
    last = layers[-1] - 1 if layers else -1
    found = [traced.trace for traced in traces]
    if any(t.after("prefix").tokens != t.after("tower", last).tokens for t in found):
        points.append(Point("to the LLM", "prefix", 0))
    merging = {m.layer for t in found for m in t.merges if m.place == "decoder"}
    return points + [Point(f"in the LLM, decoder {n}", "decoder", n) for n in sorted(merging)]


def _layout(counts: "ImageCounts", image: Any, model: str) -> ImageLayout | None:
    """How a model cuts an image, or a list of frames, into tiles; None where an image is one tile.

    Raises:
        ValueError: frames are given for a model that takes no videos.
    """
    if not isinstance(image, list):
        return None if counts.tiling is None else counts.tiling.image(image.height, image.width)
    if not counts.takes_videos:
        raise ValueError(f"--frames is not allowed with --model {model}, which takes no videos")
    return counts.tiling.video(len(image))


def _image(name: str) -> "Image.Image":
    """The image in a file, or an embedded scene.

    Raises:
        ValueError: it cannot be opened.
    """
    word, colon, seed = name.partition(":")
    if word != embedded.NAME:
        return open_image(name)
    if colon and not seed.isdecimal():
        raise ValueError(f"{name} is no embedded scene: a whole number must follow the colon, as in {word}:7")
    from PIL import Image

    from llava_pitome.embedded.render import render
    from llava_pitome.embedded.scenes import scene

    return Image.fromarray(render(scene(int(seed or SEED))))


def _check_output(path: Path) -> None:
    """Raises ValueError for a file that cannot be written."""
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
