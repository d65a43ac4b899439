"""Draws the README's picture: python eval/picture.py [seed=N] [ratio=R] [output=FILE].

A picture of the embedded benchmark, and which of its patches become one token.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from llava_pitome import MergeConfig, load, merge_tokens
from llava_pitome.cli.draw.overlay import overlay
from llava_pitome.cli.options import Option, parse, share, whole
from llava_pitome.embedded.render import render
from llava_pitome.embedded.scenes import PATCH, scene
from llava_pitome.merge.plan import trace

SHOWN = ("pitome", "tome", "random")
SCALE = 3  # screen pixels a picture pixel
OPTIONS = {
    "seed": Option(11, whole(0), "a whole number from 0", "of the scene"),
    "ratio": Option(0.9, share, "a number in (0, 1]", "share each layer keeps"),
    "output": Option("eval/results/merged.png", str, "a file", "where the picture goes"),
}


def main(words: list[str]) -> int:
    """Draws the scene, and its tokens."""
    options = parse(words, OPTIONS)
    picture = Image.fromarray(render(scene(options["seed"])))
    model, processor = load("embedded", dtype=torch.float32)
    pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    drawn = [picture.resize((picture.width * SCALE, picture.height * SCALE), Image.Resampling.NEAREST)]
    for method in SHOWN:
        with merge_tokens(model, MergeConfig(options["ratio"], method=method)) as merging, torch.no_grad():
            model.model.get_image_features(pixel_values=pixels)
            drawn.append(overlay(picture, trace(merging.plans())[0], PATCH * SCALE))
    Path(options["output"]).parent.mkdir(parents=True, exist_ok=True)
    gap = np.full((drawn[0].height, 8, 3), 255, np.uint8)
    side_by_side = np.hstack([x for image in drawn for x in (image, gap)][:-1])
    Image.fromarray(side_by_side).save(options["output"], optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
