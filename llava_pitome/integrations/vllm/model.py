"""vLLM's LLaVA with a tower that merges, and as many placeholders as tokens will arrive.

The tower is transformers' own, in place of vLLM's: merging is then what `apply` does, hook for hook, and what
was evaluated is what is served. vLLM's towers offer no place for it: queries, keys and values come from one
fused projection, divided over ranks by heads, so that no rank sees the mean of all keys, and their attention
takes no mask, which proportional attention needs. What is lost is vLLM's flash attention in the tower, where
merging leaves few tokens. The projector, on which `prefix` hooks, and everything behind it are vLLM's.

Every rank of a tensor-parallel group holds the whole tower, so that each takes the mean over all heads; and
all go on with what the first one computed, since a rounding that differs could decide a merge.

Shapes: I images, T tokens of the tower, N that reach the language model, D channels.
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

from llava_pitome.config import MergeConfig
from llava_pitome.hooks.handle import MergeHandle
from llava_pitome.integrations.vllm import supported
from llava_pitome.models import hf_llava as llava
from llava_pitome.models.parts import LlavaParts


class MergingInfo(LlavaProcessingInfo):
    """How many tokens an image becomes."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Tokens N that stay of an image: what vLLM counts, with its patches as MergeConfig counts them."""
        config = self.get_hf_config()
        encoder = self.get_vision_encoder_info()
        tokens = encoder.get_num_image_tokens(image_width=image_width, image_height=image_height)
        front = supported.class_tokens(config)
        left = supported.merging(config).tokens_at(tokens - front, supported.features(config))
        return get_num_selected_vision_tokens(left + front, config.vision_feature_select_strategy)


@MULTIMODAL_REGISTRY.register_processor(
    LlavaMultiModalProcessor, info=MergingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class MergingLlava(LlavaForConditionalGeneration):
    """A LLaVA whose config carries `token_merging`."""

    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_prefix={
            "vision_tower.vision_model.": "vision_tower.",  # as checkpoints had it before transformers 5.20
            "vision_tower.head.": None,  # SigLIP's pooling, behind what is read
            "vision_tower.embeddings.position_ids": None,
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        """Builds vLLM's model, with another tower.

        Raises:
            ValueError: what vLLM was told to do with its own tower, or `token_merging`, cannot be done.
        """
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        _check(vllm_config)
        merging = supported.merging(self.config)
        with self._mark_tower_model(vllm_config, "image"):
            self.vision_tower = _tower(self.config.vision_config)
            self.multi_modal_projector = self.multi_modal_projector  # marked together with it
        if not isinstance(self.vision_tower, StageMissingLayer):  # as with --limit-mm-per-prompt.image 0
            self.merging = _merging(self.vision_tower, self.multi_modal_projector, self.config, merging)
            self.merging.install()

    def _image_pixels_to_features(self, vision_tower: nn.Module, pixel_values: Tensor) -> Tensor:
        """The features (I, N, D) that go into the projector, of pictures (I, 3, height, width)."""
        states = vision_tower(pixel_values, output_hidden_states=True).hidden_states  # (I, T, D) each
        features = states[supported.features(self.config)]
        if self.config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        return _agreed(features)

    def _process_image_input(self, image_input: Any) -> Any:
        """What stands for the images in the prompt: features behind the projector, or what was given."""
        found = super()._process_image_input(image_input)
        return found if isinstance(image_input, LlavaImageEmbeddingInputs) else _agreed(found)


def _check(vllm_config: VllmConfig) -> None:
    """Raises ValueError for what vLLM's tower could do and transformers' cannot."""
    if vllm_config.lora_config is not None:
        raise ValueError("LoRA is not supported where tokens merge: merge the adapter into its model first")
    multimodal = vllm_config.model_config.get_multimodal_config()
    asked = {
        "mm_encoder_attn_backend": multimodal.mm_encoder_attn_backend,
        "mm_encoder_attn_dtype": multimodal.mm_encoder_attn_dtype,
    }
    for name, value in asked.items():
        if value is not None:
            raise ValueError(f"{name}={value} is for vLLM's own tower, and this one merges: leave it out")


def _tower(config: Any) -> nn.Module:
    """Transformers' vision tower, empty, for SDPA: an attention kernel that takes a mask."""
    config = copy.deepcopy(config)
    config.vision_use_head = False  # SigLIP's; nothing reads what comes of it
    with no_init_weights():
        return AutoModel.from_config(
            config, attn_implementation="sdpa", dtype=torch.get_default_dtype()
        ).eval()


def _merging(tower: nn.Module, projector: nn.Module, config: Any, merging: MergeConfig) -> MergeHandle:
    """The hooks, as `apply` makes them."""
    front = supported.class_tokens(config) if config.vision_feature_select_strategy == "full" else 0
    around = LlavaParts(  # the language model is vLLM's own and stays as it is
        tower=tower,
        feature_layer=config.vision_feature_layer,
        first_read=config.vision_feature_select_strategy == "full",
        projector=projector,
        llm=None,
        outer=None,
        image_token=config.image_token_id,
    )
    parts = llava.find(tower)._replace(feature=supported.features(config), front=front, whole=around)
    return MergeHandle(parts, merging, True, None)


def _agreed(x: Tensor) -> Tensor:
    """What the first rank of a tensor-parallel group has, on all of them."""
    group = get_tp_group()
    return x if group.world_size == 1 else group.broadcast(x.contiguous())
