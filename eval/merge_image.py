"""Draws the README's image: python -m eval.merge_image [seed=N] [ratio=R] [output=FILE].

An image of the embedded benchmark, and which of its patches merge into one token.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from eval.command import ROOT, count, run_command
from eval.embedded_images import embedded_image
from llava_pitome import MergeConfig, load, merge_tokens
from llava_pitome.cli.draw.overlay import overlay
from llava_pitome.cli.options import Option, share
from llava_pitome.embedded.scenes import PATCH
from llava_pitome.merge.plan import trace

METHODS = ("pitome", "tome", "random")
SCALE = 3  # screen pixels per image pixel
OPTIONS = {
    "seed": count(11, "of the scene", low=0),
    "ratio": Option(0.9, share, "a number in (0, 1]", "share that each layer keeps"),
    "output": Option(str(ROOT / "eval/results/merged.png"), str, "a file", "where the image is written"),
}


def main(words: list[str]) -> int:
    """Draws the image and its tokens; returns the command's exit status."""
    return run_command("merge_image", __doc__, OPTIONS, words, lambda options: options, draw)


def draw(options: dict[str, Any]) -> None:
    """Writes the image beside its tokens by each method."""
    image = embedded_image(options["seed"])
    model, processor = load("embedded", dtype=torch.float32)
    pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    drawn = [image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.NEAREST)]
    for method in METHODS:
        with merge_tokens(model, MergeConfig(options["ratio"], method=method)) as handle, torch.no_grad():
            model.model.get_image_features(pixel_values=pixels)
            drawn.append(overlay(image, trace(handle.plans())[0], PATCH * SCALE))
    Path(options["output"]).parent.mkdir(parents=True, exist_ok=True)
    gap = np.full((drawn[0].height, 8, 3), 255, np.uint8)
    side_by_side = np.hstack([x for panel in drawn for x in (panel, gap)][:-1])
    Image.fromarray(side_by_side).save(options["output"], optimize=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
