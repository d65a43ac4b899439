"""Registers the merging class with vLLM, for LLaVAs whose config carries `token_merging` and for no others.

vLLM selects a model's class by the `architectures` of its config, which it reads through a convertor selected
by model type. The convertor registered here checks `token_merging`, whether it comes from the checkpoint or
from --hf-overrides, in the process that the user started, before there is an engine.
"""

from typing import Any

from vllm import ModelRegistry
from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)

from llava_pitome.integrations.vllm import validation

ARCHITECTURE = "LlavaPitomeForConditionalGeneration"
MODEL_TYPE = "llava"


class LlavaPitomeConfigConvertor(MODEL_ARCH_CONFIG_CONVERTORS.get(MODEL_TYPE, ModelArchConfigConvertorBase)):
    """Reads a LLaVA's config as vLLM does, and selects the merging class where it carries `token_merging`."""

    def __init__(self, hf_config: Any, *args: Any, **kwargs: Any):
        """Replaces `architectures` in a config that carries `token_merging`.

        Raises:
            ValueError: a `token_merging` that vLLM cannot do, or that does not fit the model.
        """
        super().__init__(hf_config, *args, **kwargs)
        if validation.merge_config(hf_config) is not None:
            hf_config.architectures = [ARCHITECTURE]


def register() -> None:
    """Registers convertor and class; vLLM calls it once in each of its processes."""
    MODEL_ARCH_CONFIG_CONVERTORS[MODEL_TYPE] = LlavaPitomeConfigConvertor
    ModelRegistry.register_model(ARCHITECTURE, f"llava_pitome.integrations.vllm.model:{ARCHITECTURE}")
