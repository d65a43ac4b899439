"""Images that are cut into tiles under vLLM: their token counts, and a model of transformers that packs them.

Nothing here imports vLLM.
"""

import copy
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn

from llava_pitome.config import MergeConfig
from llava_pitome.image_layout import ImageLayout
from llava_pitome.image_schedule import tokens_of_image
from llava_pitome.models import llava_next, llava_onevision
from llava_pitome.models.checkpoints import vision_counts
from llava_pitome.models.tiling import Tiling

TILED = {"llava_next": llava_next, "llava_onevision": llava_onevision}  # by model type


class TiledCounts(NamedTuple):
    """How many tokens a model that cuts images into tiles makes of them.

    Attributes:
        config: how it merges.
        tiling: how it cuts them.
        layers: of the tower, up to the feature layer.
    """

    config: MergeConfig
    tiling: Tiling
    layers: int

    @classmethod
    def of(cls, config: Any, merging: MergeConfig) -> "TiledCounts":
        """Those of a LlavaNextConfig or LlavaOnevisionConfig.

        Raises:
            ValueError: as for `tiling` of the model's family and for `vision_counts`.
        """
        return cls(merging, TILED[config.model_type].tiling(config), vision_counts(config).layers)

    def layout(self, height: int, width: int, is_alone: bool = True) -> ImageLayout:
        """The layout of an image, as for `Tiling.image`."""
        return self.tiling.image(height, width, is_alone)

    def tokens(self, height: int, width: int, is_alone: bool = True) -> int:
        """The placeholders of an image.

        Args:
            height: in pixels.
            width: in pixels.
            is_alone: whether it is the only image of its prompt.

        Raises:
            ValueError: the config does not fit an image of this size.
        """
        return tokens_of_image(self.config, self.layers, self.layout(height, width, is_alone))

    def largest_image(self) -> tuple[int, int]:
        """Height and width of an image with the most tokens and, among those, the most before merging.

        Raises:
            ValueError: the config fits no image.
        """
        best, size, error = (0, 0), None, None
        for layout, candidate in _sizes_by_layout(self.tiling).items():
            try:
                found = tokens_of_image(self.config, self.layers, layout), layout.tokens
            except ValueError as raised:
                error = raised
                continue
            if found > best:
                best, size = found, candidate
        if size is None:
            raise ValueError(f"no image fits: {error}")
        return size


@lru_cache(maxsize=8)
def _sizes_by_layout(tiling: Tiling) -> dict[ImageLayout, tuple[int, int]]:
    """Every layout of an image, with a height and width in pixels that has it.

    An image that fills its grid from side to side, or from top to bottom, has every layout that a larger or
    smaller one of the same aspect has.
    """
    side, tile = tiling.side, tiling.tile
    found: dict[ImageLayout, tuple[int, int]] = {}
    for height, width in tiling.pinpoints:
        sizes = [(-(-n * tile // side), width) for n in range(1, height * side // tile + 1)]
        sizes += [(height, -(-n * tile // side)) for n in range(1, width * side // tile)]
        for size in sizes:
            found.setdefault(tiling.image(*size), size)
    return found


def empty_model(config: Any) -> nn.Module:
    """The LlavaModel, LlavaNextModel, ... of a config, without weights and without language model."""
    from transformers import AutoModel, LlamaConfig
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(config)
    config.text_config = LlamaConfig(
        hidden_size=config.text_config.hidden_size,
        num_hidden_layers=0,
        vocab_size=1,
        bos_token_id=None,
        eos_token_id=None,
    )
    config.vision_config.vision_use_head = False  # SigLIP's pooling, which LLaVA does not read
    with no_init_weights(), torch.device("meta"):
        model = AutoModel.from_config(config, attn_implementation="sdpa", dtype=torch.get_default_dtype())
    model.language_model = None
    return model.eval()
