"""LLaVA-NeXT (LLaVA-1.6): images as a thumbnail and a grid of tiles, a newline after each row of patches."""

from typing import Any

from llava_pitome.models.tiling import Tiling

CLASSES = ("LlavaNextForConditionalGeneration", "LlavaNextModel")


def tiling(config: Any) -> Tiling:
    """How a LlavaNextConfig says that images are cut.

    Raises:
        ValueError: a grid of image_grid_pinpoints is not made of whole tiles.
    """
    vision = config.vision_config
    pinpoints = tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints)
    tile = vision.image_size
    for grid in pinpoints:
        if any(pixels < tile or pixels % tile for pixels in grid):
            raise ValueError(
                f"image_grid_pinpoints holds {list(grid)}, whose sides are no multiples of a tile's {tile} "
                "pixels"
            )
    return Tiling(vision.image_size // vision.patch_size, vision.image_size, pinpoints)
