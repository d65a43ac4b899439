"""`llava-pitome convert`: converts a checkpoint of the original LLaVA package to Hugging Face's format."""

import argparse
import sys
from pathlib import Path
from typing import Any

from llava_pitome.cli.options import Option, add_flags, one_of
from llava_pitome.models import checkpoints
from llava_pitome.models.checkpoints import DTYPES

OPTIONS = {
    "dtype": Option("auto", one_of(*DTYPES), " | ".join(DTYPES), "dtype of the weights; auto: as saved"),
}


def describe(subparsers: Any, name: str) -> None:
    """Adds the command's parser."""
    parser = subparsers.add_parser(
        name,
        description="Converts a LLaVA-1.5 checkpoint of the original package to Hugging Face's format.",
    )
    parser.add_argument("path", help="folder or hub id of the original checkpoint")
    parser.add_argument("output", type=Path, help="a new or empty folder to write")
    add_flags(parser, OPTIONS)


def run(options: argparse.Namespace) -> int:
    """Writes the converted checkpoint.

    Raises:
        ValueError: a path without an original LLaVA-1.5 checkpoint, or an output that is not empty.
    """
    output = options.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output={str(output)!r} is not empty; give a new or empty folder")
    model, processor = checkpoints.convert(options.path, options.dtype)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    sys.stdout.write(f"{output}: LlavaForConditionalGeneration, {model.dtype}, with its processor\n")
    return 0
