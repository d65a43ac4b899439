"""LLaVA-NeXT-Video: images as in LLaVA-NeXT, and videos whose frames are pooled before the projector."""

from typing import Any

from llava_pitome.models import llava_next
from llava_pitome.models.tiling import Tiling

CLASSES = ("LlavaNextVideoForConditionalGeneration", "LlavaNextVideoModel")


def tiling(config: Any) -> Tiling:
    """How a LlavaNextVideoConfig says that images are cut and frames are pooled."""
    images = llava_next.tiling(config)
    return images._replace(frame_side=images.side // config.spatial_pool_stride)
