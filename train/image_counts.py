"""How many tokens the images of a training run have: unmerged, and under each of its merge configs.

Where a model cuts images into tiles, they follow from the images' sizes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llava_pitome import MergeConfig
from llava_pitome.image_layout import ImageLayout
from llava_pitome.image_schedule import tokens_of_image
from llava_pitome.models.parts import ModelParts
from llava_pitome.models.tiling import Tiling

UNMERGED = MergeConfig(ratio=1.0)
Size = tuple[int, int]  # height and width in pixels
GREY: Size = (32, 32)  # of an image that shows nothing


class ImageCounts(NamedTuple):
    """The numbers of a model on which its image tokens depend; what worker processes need of it.

    Attributes:
        patches: of an image, or of a tile.
        layers: of the vision tower, up to the feature layer.
        num_prefix_tokens: tokens before an image's patches that reach the language model, 0 or 1.
        tiling: how images are cut into tiles; None: each is one tile.
    """

    patches: int
    layers: int
    num_prefix_tokens: int = 0
    tiling: Tiling | None = None

    @classmethod
    def of(cls, parts: ModelParts) -> "ImageCounts":
        """Those of a LLaVA."""
        return cls(
            parts.patches, parts.num_feature_layers, parts.num_feature_prefix_tokens, parts.llava.tiling
        )

    def layout(self, size: Size, is_alone: bool) -> ImageLayout | None:
        """The layout of an image, which may be alone in its prompt; None where every image is one tile.

        Raises:
            ValueError: it fits none of the model's grids of tiles.
        """
        return None if self.tiling is None else self.tiling.image(*size, is_alone)

    def tokens(self, config: MergeConfig, layout: ImageLayout | None) -> int:
        """Tokens of an image in the language model's prompt, class token and newlines included.

        Raises:
            ValueError: a budget does not fit the image.
        """
        if layout is None:
            return config.tokens_at(self.patches, self.layers) + self.num_prefix_tokens
        return tokens_of_image(config, self.layers, layout)

    def of_batch(self, config: MergeConfig, batch: Mapping[str, Any]) -> list[int] | int:
        """Tokens of each image of a batch of `collator.Collator`; one number where all have the same."""
        if self.tiling is None:
            return self.tokens(config, None)
        layouts = self.tiling.images(batch["image_sizes"], batch.get("batch_num_images"))
        return [self.tokens(config, layout) for layout in layouts]

    def grey_size(self, configs: Sequence[MergeConfig], sizes: Sequence[Size]) -> Size:
        """The size of an image for batches without any, which stands alone in its prompt.

        Args:
            configs: whose budgets it has to fit.
            sizes: of images that fit them, from which one with few tiles is taken.

        Raises:
            ValueError: no size fits.
        """
        if self.tiling is None:
            return GREY
        if sizes:
            return min(sizes, key=lambda size: self.tiling.image(*size).tiles)
        for size in (GREY, *self.tiling.pinpoints):
            try:
                for config in configs:
                    self.tokens(config, self.tiling.image(*size))
            except ValueError as error:
                reason = error
            else:
                return size
        raise ValueError(
            f"a batch of text alone is given a grey image, and none fits the merge configs: {reason}"
        )
