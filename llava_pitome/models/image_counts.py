"""How many tokens the images and videos of a prompt have at the input of a model's language model."""

from collections.abc import Sequence

from llava_pitome.config import MergeConfig
from llava_pitome.image_layout import ImageLayout
from llava_pitome.image_schedule import tokens_of_image
from llava_pitome.models.parts import ModelParts

Size = tuple[int, int]  # height and width in pixels


def image_counts(parts: ModelParts, config: MergeConfig | None, sizes: Sequence[Size | None]) -> list[int]:
    """The tokens of each image of one prompt, newlines among them.

    Args:
        parts: of the model.
        config: how it merges; None: not at all.
        sizes: of the images; None stands for an image of the vision tower's own size. They matter for models
            that cut images into tiles alone.

    Raises:
        ValueError: an image has no pixels or fits no grid of tiles, or a budget does not fit it.
    """
    tiling = None if parts.llava is None else parts.llava.tiling
    if tiling is None:
        of_each = (
            parts.patches if config is None else config.tokens_at(parts.patches, parts.num_feature_layers)
        )
        return [of_each] * len(sizes)
    own = (tiling.tile, tiling.tile)
    return [_count(parts, config, tiling.image(*(size or own), len(sizes) == 1)) for size in sizes]


def video_counts(parts: ModelParts, config: MergeConfig | None, frames: Sequence[int]) -> list[int]:
    """The tokens of each video of one prompt; arguments as for `image_counts`, with the videos' frames.

    Raises:
        ValueError: the model takes no videos, a video has no frames, or a budget does not fit it.
    """
    check_takes_videos(parts)
    return [_count(parts, config, parts.llava.tiling.video(count)) for count in frames]


def check_takes_videos(parts: ModelParts) -> None:
    """Raises ValueError for a model that takes no videos."""
    tiling = None if parts.llava is None else parts.llava.tiling
    if tiling is None or tiling.frame_side is None:
        raise ValueError(f"a {type(parts.model).__name__} takes no videos")


def _count(parts: ModelParts, config: MergeConfig | None, layout: ImageLayout) -> int:
    return layout.tokens if config is None else tokens_of_image(config, parts.num_feature_layers, layout)
