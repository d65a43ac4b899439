"""`llava-pitome convert`: writes an original checkpoint down as a Hugging Face one."""

import argparse
import sys
from pathlib import Path
from typing import Any

from llava_pitome.models import checkpoints
from llava_pitome.models.checkpoints import DTYPES


def describe(commands: Any, name: str) -> None:
    """Adds the command and its options to a parser's subparsers."""
    parser = commands.add_parser(
        name,
        help="write a checkpoint of the original LLaVA package as a Hugging Face one",
        description="Writes a LLaVA-1.5 checkpoint of the original package as LlavaForConditionalGeneration.",
    )
    parser.add_argument("path", help="folder or hub id of the original checkpoint")
    parser.add_argument("output", type=Path, help="folder to write; it must not be there, or be empty")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (as they are)")


def run(options: argparse.Namespace) -> int:
    """Converts, and says what was written.

    Raises:
        ValueError: a path that holds no original LLaVA-1.5, or an output that holds something.
    """
    output = options.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output={str(output)!r} holds something; name a folder that is new or empty")
    model, processor = checkpoints.convert(options.path, options.dtype)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    sys.stdout.write(f"{output}: LlavaForConditionalGeneration, {model.dtype}, with its processor\n")
    return 0
