"""vLLM's LLaVA-NeXT and LLaVA-OneVision with images that merge, one placeholder for each token after merging.

The vision tower is transformers' own, for the reasons in vision_tower.py. Images are encoded and packed by
the `get_image_features` of transformers' model, with the hooks of `apply`, around the projector and newline
vector of vLLM's model. Their counts are therefore those of transformers, from which vLLM's own differ:
OneVision's assume anyres_max_9, and several images of a prompt to be cut into tiles each.

Shapes: I images, T tiles of each, N tokens of one after merging, newlines among them, D channels.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageEmbeddingItems, ImageProcessorItems, ImageSize
from vllm.multimodal.processing import PromptReplacement

from llava_pitome.hooks.handle import MergeHandle
from llava_pitome.integrations.vllm import validation
from llava_pitome.integrations.vllm.tiled_counts import TiledCounts, empty_model
from llava_pitome.integrations.vllm.vision_tower import WEIGHT_NAMES, broadcast, replace_tower
from llava_pitome.models import hf_llava, processors

IN_ONE_PROMPT = "several_images"  # a processor option of this file: the images share a prompt
OF_TILES = ("image_grid_pinpoints", "size", "crop_size", "do_resize", "do_center_crop", "vision_aspect_ratio")


class _MergedCounts:
    """vLLM's token counts, after merging."""

    @cached_property
    def counts(self) -> TiledCounts:
        """The model's."""
        config = self.get_hf_config()
        return TiledCounts.of(config, validation.merge_config(config))

    def get_hf_processor(self, **kwargs: object) -> Any:
        """Transformers' processor.

        Raises:
            ValueError: it cuts images into other tiles than the model, or an option that would change them.
        """
        given = self.ctx.get_merged_mm_kwargs(kwargs)  # with those of --mm-processor-kwargs
        given |= dict(given.get("images_kwargs") or {})
        if found := [name for name in OF_TILES if name in given]:
            raise ValueError(
                f"{found[0]}={given[found[0]]!r} is not allowed with token merging: images are cut into the "
                "tiles that the model's config says"
            )
        processor = super().get_hf_processor(**kwargs)
        processors.check_tiled(processor, self.counts.tiling, self.get_hf_config().vision_config.patch_size)
        return processor

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """The number N of placeholders of an image that is alone in its prompt."""
        return self.counts.tokens(image_height, image_width)

    @cached_property
    def _largest_image(self) -> ImageSize:
        height, width = self.counts.largest_image()
        return ImageSize(width=width, height=height)

    def get_image_size_with_most_features(self) -> ImageSize:
        """The size of an image with the most placeholders."""
        return self._largest_image


class LlavaNextPitomeProcessingInfo(_MergedCounts, LlavaNextProcessingInfo):
    """vLLM's token counts of LLaVA-NeXT, after merging."""


class LlavaOnevisionPitomeProcessingInfo(_MergedCounts, LlavaOnevisionProcessingInfo):
    """vLLM's token counts of LLaVA-OneVision, after merging."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Images without limit, and no videos."""
        return {"image": None}

    def validate_num_items(self, modality: str, num_items: int) -> None:
        """Raises ValueError for videos, and for more images than the server allows."""
        if modality == "video" and num_items:
            raise ValueError(
                "videos are not supported under vLLM with token merging; serve with `llava-pitome serve`"
            )
        super().validate_num_items(modality, num_items)


class LlavaOnevisionPitomeProcessor(LlavaOnevisionMultiModalProcessor):
    """Images as transformers prepares them: several in a prompt are one tile each.

    vLLM prepares and caches every image by itself. Whether there were several is therefore an option of the
    processor, on which the keys of all caches depend.
    """

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Prepares a prompt."""
        if inputs.mm_data_items.get_all_counts().get("image", 0) > 1:
            inputs.hf_processor_mm_kwargs = {**inputs.hf_processor_mm_kwargs, IN_ONE_PROMPT: True}
        return super().apply(inputs, timing_ctx)

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        """The pixels (I, T, 3, height, width) and sizes of images that are not cached."""
        options = {name: value for name, value in hf_kwargs.items() if name != IN_ONE_PROMPT}
        data, options, passthrough = self._get_hf_mm_inputs(mm_items, options)
        if not data or IN_ONE_PROMPT not in hf_kwargs:
            return super()._apply_hf_processor_main(mm_items, options)
        images = list(data["images"])
        while len(images) < 2:  # the others are cached, and an image alone would be cut into tiles
            images.append(images[-1])
        data |= {"images": [images], "text": self._get_hf_mm_text({"image": len(images)})}
        processed = self._call_hf_processor(data, options)
        count = mm_items.get_all_counts()["image"]
        for name in ("pixel_values", "image_sizes"):
            processed[name] = processed[name][:count]
        return self._finalize_hf_mm_data(data, options, passthrough, processed)

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        """The placeholders of the images."""
        token = self.info.get_hf_config().image_token_index
        is_alone = IN_ONE_PROMPT not in hf_processor_mm_kwargs

        def placeholders(index: int) -> list[int]:
            images = mm_items.get_items("image", (ImageEmbeddingItems, ImageProcessorItems))
            if isinstance(images, ImageEmbeddingItems):
                return [token] * images.get_feature_size(index)
            size = images.get_image_size(index)
            return [token] * self.info.counts.tokens(size.height, size.width, is_alone)

        return [PromptReplacement(modality="image", target=[token], replacement=placeholders)]


class _MergingImages:
    """A model of vLLM whose config carries `token_merging` and that cuts images into tiles."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        """Builds vLLM's model, with transformers' vision tower.

        Raises:
            ValueError: vLLM options for its own vision tower or for LoRA, or a `token_merging` that vLLM
                cannot do.
        """
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        merging = replace_tower(self, vllm_config)
        self.encoder: ImageEncoder | None = None
        if merging is not None:
            counts = TiledCounts.of(self.config, merging)
            self.encoder = ImageEncoder(self.config, counts, self.vision_tower, self.multi_modal_projector)

    def _process_image_input(self, image_input: Any) -> Any:
        """The image tokens (N, D) of the language model, or the given embeddings."""
        if image_input["type"] == "image_embeds":
            return image_input["data"]
        return self.encoder(image_input["pixel_values"], image_input["image_sizes"], self.image_newline)


class ImageEncoder:
    """Transformers' model around the vision tower, projector and newline vector of a model of vLLM.

    It is no module, so that vLLM finds every weight once.
    """

    def __init__(self, config: Any, counts: TiledCounts, tower: nn.Module, projector: nn.Module):
        """Builds it, and applies the merging.

        Args:
            config: of vLLM's model.
            counts: of the model.
            tower: transformers' own.
            projector: vLLM's.
        """
        self.counts, self._model = counts, empty_model(config)
        self._model.vision_tower, self._model.multi_modal_projector = tower, projector
        projector.register_forward_pre_hook(_of_first_rank)
        parts = hf_llava.find(self._model)
        self._merging = MergeHandle(parts, counts.config, True, None)
        self._merging.install(parts)

    def __call__(self, pixels: Tensor | Sequence[Tensor], sizes: Tensor, newline: Tensor) -> list[Tensor]:
        """The tokens (N, D) of each image.

        Args:
            pixels: (T, 3, height, width) of each image; those of images that were prepared together may end
                with tiles that are not the image's.
            sizes: (I, 2) height and width of each in pixels.
            newline: (D,).
        """
        self._model.image_newline = newline
        sizes = sizes.tolist()
        single = [i for i, x in enumerate(pixels) if len(x) == 1]  # a tiled image has a thumbnail and a tile
        found: dict[int, Tensor] = {}
        if tiled := [i for i in range(len(sizes)) if i not in single]:
            tiles = [self.counts.layout(*sizes[i]).tiles for i in tiled]
            x = torch.cat([pixels[i][:n] for i, n in zip(tiled, tiles)])
            out = self._model.get_image_features(x, image_sizes=[sizes[i] for i in tiled], return_dict=True)
            found |= zip(tiled, out.pooler_output)
        if single:
            both = single * 2 if len(single) == 1 else single  # one alone would be an image of several tiles
            out = self._model.get_image_features(
                torch.cat([pixels[i] for i in both]),
                image_sizes=[sizes[i] for i in both],
                batch_num_images=[len(both)],
                return_dict=True,
            )
            found |= zip(single, out.pooler_output)
        images = [found[i] for i in range(len(sizes))]
        return list(broadcast(torch.cat(images)).split([len(x) for x in images]))


def _of_first_rank(_projector: nn.Module, args: tuple) -> tuple:
    """Before the projector: the features of the first rank, from which others may differ by roundings."""
    return (broadcast(args[0]), *args[1:])


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextMultiModalProcessor, info=LlavaNextPitomeProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class LlavaNextPitomeForConditionalGeneration(_MergingImages, LlavaNextForConditionalGeneration):
    """A LLaVA-NeXT whose config carries `token_merging`."""

    hf_to_vllm_mapper = LlavaNextForConditionalGeneration.hf_to_vllm_mapper | WEIGHT_NAMES


@MULTIMODAL_REGISTRY.register_processor(
    LlavaOnevisionPitomeProcessor,
    info=LlavaOnevisionPitomeProcessingInfo,
    dummy_inputs=LlavaOnevisionDummyInputsBuilder,
)
class LlavaOnevisionPitomeForConditionalGeneration(_MergingImages, LlavaOnevisionForConditionalGeneration):
    """A LLaVA-OneVision whose config carries `token_merging`."""

    hf_to_vllm_mapper = LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper | WEIGHT_NAMES
