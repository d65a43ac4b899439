"""Has vLLM take the merging class for a LLaVA whose config carries `token_merging`, and for no other.

vLLM picks a model's class by the `architectures` in its config. That is read through a convertor chosen by
model type, which is where this asks for `token_merging`, whether it stands in the checkpoint or comes from
--hf-overrides. Every other LLaVA keeps vLLM's own class. What cannot be served raises there too, in the
process that the user started, before there is an engine.
"""

from typing import Any

from vllm import ModelRegistry
from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)

from llava_pitome.integrations.vllm import supported

ARCHITECTURE = "LlavaPitomeForConditionalGeneration"
KIND = "llava"  # model type


class LlavaConvertor(MODEL_ARCH_CONFIG_CONVERTORS.get(KIND, ModelArchConfigConvertorBase)):
    """Reads a LLaVA's config as vLLM does, but for the name of its class."""

    def __init__(self, hf_config: Any, *args: Any, **options: Any):
        """Names the merging class in a config that asks for it.

        Raises:
            ValueError: vLLM cannot serve what it asks for.
        """
        super().__init__(hf_config, *args, **options)
        if supported.merging(hf_config) is not None:
            hf_config.architectures = [ARCHITECTURE]


def register() -> None:
    """What vLLM calls once in each of its processes."""
    MODEL_ARCH_CONFIG_CONVERTORS[KIND] = LlavaConvertor
    ModelRegistry.register_model(ARCHITECTURE, "llava_pitome.integrations.vllm.model:MergingLlava")
