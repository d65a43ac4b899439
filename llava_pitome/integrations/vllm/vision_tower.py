"""Transformers' vision tower in vLLM's models.

The vision tower is transformers' own instead of vLLM's, so that merging uses the hooks of `apply` and a
config serves as it was evaluated. vLLM's towers cannot merge: they fuse queries, keys and values into one
projection whose heads are divided over ranks, so that no rank sees the mean of all keys, and their attention
takes no mask, which proportional attention needs. The cost is vLLM's flash attention in the tower, on few
tokens once they have merged.

Under tensor parallelism every rank holds the complete tower, and all ranks use the features of the first one,
since a rounding that differs could change a merge.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.initialization import no_init_weights
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.model_executor.models.utils import StageMissingLayer, WeightsMapper

from llava_pitome.config import MergeConfig
from llava_pitome.integrations.vllm import validation

WEIGHT_NAMES = WeightsMapper(
    orig_to_new_prefix={
        "vision_tower.vision_model.": "vision_tower.",  # as saved before transformers 5.20
        "vision_tower.head.": None,  # SigLIP's pooling, after the features
        "vision_tower.embeddings.position_ids": None,
    }
)


def replace_tower(model: nn.Module, vllm_config: VllmConfig) -> MergeConfig | None:
    """Gives a model of vLLM transformers' vision tower, and returns how it merges.

    None where this stage of the model has no tower, as with --limit-mm-per-prompt.image 0.

    Raises:
        ValueError: vLLM options for its own vision tower or for LoRA, or a `token_merging` that vLLM cannot
            do.
    """
    _check_options(vllm_config)
    merging = validation.merge_config(model.config)
    with model._mark_tower_model(vllm_config, "image"):
        model.vision_tower = empty_tower(model.config.vision_config)
        model.multi_modal_projector = model.multi_modal_projector  # marked together with the tower
    return None if isinstance(model.vision_tower, StageMissingLayer) else merging


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


def empty_tower(config: Any) -> nn.Module:
    """Transformers' vision tower without weights, with SDPA, an attention kernel that takes a mask."""
    config = copy.deepcopy(config)
    config.vision_use_head = False  # SigLIP's pooling, which LLaVA does not read
    with no_init_weights():
        tower = AutoModel.from_config(config, attn_implementation="sdpa", dtype=torch.get_default_dtype())
    return tower.eval()


def broadcast(x: Tensor) -> Tensor:
    """The tensor of the first rank of the tensor-parallel group, on all ranks."""
    group = get_tp_group()
    return x if group.world_size == 1 else group.broadcast(x.contiguous())
