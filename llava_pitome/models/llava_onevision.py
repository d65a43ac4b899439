"""LLaVA-OneVision: images as in LLaVA-NeXT with large grids pooled, several images, and videos.

Several images of a prompt are one tile each. The frames of a video are pooled after the projector.
"""

import re
from typing import Any

from llava_pitome.models import llava_next
from llava_pitome.models.tiling import Tiling

CLASSES = ("LlavaOnevisionForConditionalGeneration", "LlavaOnevisionModel")


def tiling(config: Any) -> Tiling:
    """How a LlavaOnevisionConfig says that images are cut and frames are pooled.

    Raises:
        ValueError: vision_aspect_ratio is not of the form anyres_max_9.
    """
    found = re.fullmatch(r"anyres_max_(\d+)", config.vision_aspect_ratio)
    if found is None:
        raise ValueError(
            f"vision_aspect_ratio={config.vision_aspect_ratio!r} is not supported; allowed is anyres_max_N"
        )
    images = llava_next.tiling(config)
    return images._replace(
        max_tiles=int(found[1]),
        has_single_tiles=True,
        frame_side=-(-images.side // 2),
        video_newline=True,
    )
