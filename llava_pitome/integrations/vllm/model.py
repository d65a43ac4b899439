"""vLLM's LLaVA with a vision tower that merges, and one placeholder for each token after merging.

The vision tower is transformers' own, for the reasons in vision_tower.py. The projector, on which `prefix`
merges, and the language model are vLLM's.

Shapes: I images, T tokens of the tower's hidden states, N image tokens after merging, D channels.
"""

from functools import cached_property
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaImageEmbeddingInputs,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.vision import get_num_selected_vision_tokens
from vllm.multimodal import MULTIMODAL_REGISTRY

from llava_pitome.config import MergeConfig
from llava_pitome.hooks.handle import MergeHandle
from llava_pitome.integrations.vllm import validation
from llava_pitome.integrations.vllm.vision_tower import WEIGHT_NAMES, broadcast, replace_tower
from llava_pitome.models import hf_llava
from llava_pitome.models.checkpoints import vision_counts
from llava_pitome.models.parts import LlavaParts, ModelParts


class LlavaPitomeProcessingInfo(LlavaProcessingInfo):
    """vLLM's token counts, after merging."""

    @cached_property
    def merging(self) -> MergeConfig:
        """How the model merges."""
        return validation.merge_config(self.get_hf_config())

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """The number N of placeholders of an image."""
        config = self.get_hf_config()
        _, layers, num_prefix_tokens = vision_counts(config)
        before = self.get_vision_encoder_info().get_num_image_tokens(
            image_width=image_width, image_height=image_height
        )
        kept = self.merging.tokens_at(before - num_prefix_tokens, layers)
        return get_num_selected_vision_tokens(kept + num_prefix_tokens, config.vision_feature_select_strategy)


@MULTIMODAL_REGISTRY.register_processor(
    LlavaMultiModalProcessor, info=LlavaPitomeProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class LlavaPitomeForConditionalGeneration(LlavaForConditionalGeneration):
    """A LLaVA whose config carries `token_merging`."""

    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | WEIGHT_NAMES

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        """Builds vLLM's model, with transformers' vision tower.

        Raises:
            ValueError: vLLM options for its own vision tower or for LoRA, or a `token_merging` that vLLM
                cannot do.
        """
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        merging = replace_tower(self, vllm_config)
        if merging is not None:
            parts = _model_parts(self.vision_tower, self.multi_modal_projector, self.config)
            self.merging = MergeHandle(parts, merging, True, None)
            self.merging.install(parts)

    def _image_pixels_to_features(self, vision_tower: nn.Module, pixel_values: Tensor) -> Tensor:
        """The projector's input (I, N, D) for images (I, 3, height, width)."""
        hidden_states = vision_tower(pixel_values, output_hidden_states=True).hidden_states  # (I, T, D) each
        features = hidden_states[vision_counts(self.config).layers]
        if self.config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        features = broadcast(features)
        self.merging.recognise(features)  # the first rank's may differ by roundings
        return features

    def _process_image_input(self, image_input: Any) -> Any:
        """The image tokens of the language model: features after the projector, or the given embeddings."""
        tokens = super()._process_image_input(image_input)
        return tokens if isinstance(image_input, LlavaImageEmbeddingInputs) else broadcast(tokens)


def _model_parts(tower: nn.Module, projector: nn.Module, config: Any) -> ModelParts:
    """The vision tower and projector as parts of a LLaVA."""
    _, layers, num_prefix_tokens = vision_counts(config)
    reads_first_token = config.vision_feature_select_strategy == "full"
    llava = LlavaParts(
        tower=tower,
        feature_layer=config.vision_feature_layer,
        reads_first_token=reads_first_token,
        projector=projector,
        llm=None,  # vLLM's own, which does not change
        multimodal=None,
        image_token=config.image_token_id,
    )
    return hf_llava.find(tower)._replace(
        feature_layers=(layers,),
        num_feature_prefix_tokens=num_prefix_tokens if reads_first_token else 0,
        llava=llava,
    )
