"""vLLM's LLaVA with a vision tower that merges, and one placeholder for each token after merging.

The vision tower is transformers' own instead of vLLM's, so that merging uses the hooks of `apply` and a
config serves as it was evaluated. vLLM's towers cannot merge: they fuse queries, keys and values into one
projection whose heads are divided over ranks, so that no rank sees the mean of all keys, and their attention
takes no mask, which proportional attention needs. The cost is vLLM's flash attention in the tower, on few
tokens once they have merged. The projector, on which `prefix` merges, and the language model are vLLM's.

Under tensor parallelism every rank holds the complete tower, and all ranks use the features of the first one,
since a rounding that differs could change a merge.

Shapes: I images, T tokens of the tower's hidden states, N image tokens after merging, D channels.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.initialization import no_init_weights
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaImageEmbeddingInputs,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.utils import StageMissingLayer, WeightsMapper
from vllm.model_executor.models.vision import get_num_selected_vision_tokens
from vllm.multimodal import MULTIMODAL_REGISTRY

from llava_pitome.hooks.handle import MergeHandle
from llava_pitome.integrations.vllm import validation
from llava_pitome.models import hf_llava
from llava_pitome.models.checkpoints import vision_counts
from llava_pitome.models.parts import LlavaParts, ModelParts


class LlavaPitomeProcessingInfo(LlavaProcessingInfo):
    """vLLM's token counts, after merging."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """The number N of placeholders of an image."""
        config = self.get_hf_config()
        _, layers, num_prefix_tokens = vision_counts(config)
        before = self.get_vision_encoder_info().get_num_image_tokens(
            image_width=image_width, image_height=image_height
        )
        kept = validation.merge_config(config).tokens_at(before - num_prefix_tokens, layers)
        return get_num_selected_vision_tokens(kept + num_prefix_tokens, config.vision_feature_select_strategy)


@MULTIMODAL_REGISTRY.register_processor(
    LlavaMultiModalProcessor, info=LlavaPitomeProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class LlavaPitomeForConditionalGeneration(LlavaForConditionalGeneration):
    """A LLaVA whose config carries `token_merging`."""

    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_prefix={
            "vision_tower.vision_model.": "vision_tower.",  # as saved before transformers 5.20
            "vision_tower.head.": None,  # SigLIP's pooling, after the features
            "vision_tower.embeddings.position_ids": None,
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        """Builds vLLM's model, with transformers' vision tower.

        Raises:
            ValueError: vLLM options for its own vision tower or for LoRA, or a `token_merging` that vLLM
                cannot do.
        """
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        _check_options(vllm_config)
        merging = validation.merge_config(self.config)
        with self._mark_tower_model(vllm_config, "image"):
            self.vision_tower = _empty_tower(self.config.vision_config)
            self.multi_modal_projector = self.multi_modal_projector  # marked together with the tower
        if not isinstance(self.vision_tower, StageMissingLayer):  # as with --limit-mm-per-prompt.image 0
            parts = _model_parts(self.vision_tower, self.multi_modal_projector, self.config)
            self.merging = MergeHandle(parts, merging, True, None)
            self.merging.install(parts)

    def _image_pixels_to_features(self, vision_tower: nn.Module, pixel_values: Tensor) -> Tensor:
        """The projector's input (I, N, D) for images (I, 3, height, width)."""
        hidden_states = vision_tower(pixel_values, output_hidden_states=True).hidden_states  # (I, T, D) each
        features = hidden_states[vision_counts(self.config).layers]
        if self.config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        features = _broadcast(features)
        self.merging.recognise(features)  # the first rank's may differ by roundings
        return features

    def _process_image_input(self, image_input: Any) -> Any:
        """The image tokens of the language model: features after the projector, or the given embeddings."""
        tokens = super()._process_image_input(image_input)
        return tokens if isinstance(image_input, LlavaImageEmbeddingInputs) else _broadcast(tokens)


def _check_options(vllm_config: VllmConfig) -> None:
    """Raises ValueError for options that vLLM's own vision tower takes and transformers' does not."""
    if vllm_config.lora_config is not None:
        raise ValueError(
            "LoRA is not supported with token merging under vLLM: merge the adapter into its base model first"
        )
    multimodal = vllm_config.model_config.get_multimodal_config()
    for name in ("mm_encoder_attn_backend", "mm_encoder_attn_dtype"):
        if (value := getattr(multimodal, name)) is not None:
            raise ValueError(
                f"{name}={value} is not allowed with token merging: it is for vLLM's own vision tower"
            )


def _empty_tower(config: Any) -> nn.Module:
    """Transformers' vision tower without weights, with SDPA, an attention kernel that takes a mask."""
    config = copy.deepcopy(config)
    config.vision_use_head = False  # SigLIP's pooling, which LLaVA does not read
    with no_init_weights():
        tower = AutoModel.from_config(config, attn_implementation="sdpa", dtype=torch.get_default_dtype())
    return tower.eval()


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


def _broadcast(x: Tensor) -> Tensor:
    """The tensor of the first rank of the tensor-parallel group, on all ranks."""
    group = get_tp_group()
    return x if group.world_size == 1 else group.broadcast(x.contiguous())
