"""How many tokens the images and videos of a prompt have at the input of a model's language model."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from llava_pitome.config import MergeConfig
from llava_pitome.image_layout import ImageLayout
from llava_pitome.image_schedule import tokens_of_image
from llava_pitome.models import checkpoints, hf_llava
from llava_pitome.models.parts import ModelParts
from llava_pitome.models.tiling import Tiling

Size = tuple[int, int]  # height and width in pixels


class ImageCounts(NamedTuple):
    """The numbers of a model on which its token counts depend.

    Attributes:
        patches: of an image, or of one of its tiles.
        layers: of the vision tower, up to the feature layer.
        tiling: how the model cuts images into tiles; None where an image is one tile.
    """

    patches: int
    layers: int
    tiling: Tiling | None = None

    @property
    def takes_videos(self) -> bool:
        """Whether the model takes videos."""
        return self.tiling is not None and self.tiling.frame_side is not None

    def images(self, config: MergeConfig | None, sizes: Sequence[Size | None]) -> list[int]:
        """The tokens of each image of one prompt, newlines among them.

        Args:
            config: how the model merges; None: not at all.
            sizes: of the images, which matter for models that cut images into tiles alone; None stands for
                the tiling's nominal size.

        Raises:
            ValueError: an image has no pixels or fits no grid of tiles, or a budget does not fit it.
        """
        if self.tiling is None:
            of_each = self.patches if config is None else config.tokens_at(self.patches, self.layers)
            return [of_each] * len(sizes)
        found = [size or self.tiling.nominal_size for size in sizes]
        return [self._count(config, self.tiling.image(*size, len(sizes) == 1)) for size in found]

    def videos(self, config: MergeConfig | None, frames: Sequence[int]) -> list[int]:
        """The tokens of each video of one prompt; `frames` are theirs, for the rest see `images`.

        Raises:
            ValueError: the model takes no videos, a video has no frames, or a budget does not fit it.
        """
        if not self.takes_videos:
            raise ValueError("this model takes no videos")
        return [self._count(config, self.tiling.video(count)) for count in frames]

    def _count(self, config: MergeConfig | None, layout: ImageLayout) -> int:
        return layout.tokens if config is None else tokens_of_image(config, self.layers, layout)


def counts_of(parts: ModelParts) -> ImageCounts:
    """The counts of a model."""
    tiling = None if parts.llava is None else parts.llava.tiling
    return ImageCounts(parts.patches, parts.num_feature_layers, tiling)


def counts_of_checkpoint(path: str) -> ImageCounts:
    """The counts of a checkpoint's model, without reading its weights.

    Raises:
        ValueError: as for `checkpoints.read_config` and `checkpoints.vision_counts`.
    """
    config: Any = checkpoints.read_config(path)
    patches, layers, _ = checkpoints.vision_counts(config)
    family = hf_llava.TILED.get(checkpoints.MODELS[config.model_type])
    return ImageCounts(patches, layers, None if family is None else family.tiling(config))
