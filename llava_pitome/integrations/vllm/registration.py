"""Registers the merging classes with vLLM, for LLaVAs whose config carries `token_merging` and for no others.

vLLM selects a model's class by the `architectures` of its config, which it reads through a convertor selected
by model type. The convertors registered here check `token_merging`, whether it comes from the checkpoint or
from --hf-overrides, in the process that the user started, before there is an engine. Models that merge in
transformers alone have one too, which raises where their config carries `token_merging`.
"""

from typing import Any

from vllm import ModelRegistry
from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)

from llava_pitome.integrations.vllm import validation
from llava_pitome.models.checkpoints import MODELS

MODULES = {"llava": "model"}  # of this package, by model type; other classes are in tiled_models


def convertor(model_type: str) -> type[ModelArchConfigConvertorBase]:
    """The convertor of a model type that vLLM has, extended to select the merging class."""

    class Convertor(MODEL_ARCH_CONFIG_CONVERTORS.get(model_type, ModelArchConfigConvertorBase)):
        """Reads a config as vLLM does, and replaces `architectures` where it carries `token_merging`.

        Raises:
            ValueError: a `token_merging` that vLLM cannot do, or that does not fit the model.
        """

        def __init__(self, hf_config: Any, *args: Any, **kwargs: Any):
            super().__init__(hf_config, *args, **kwargs)
            if validation.merge_config(hf_config) is not None:
                hf_config.architectures = [validation.CLASSES[hf_config.model_type]]

    return Convertor


def register() -> None:
    """Registers convertors and classes; vLLM calls it once in each of its processes."""
    for model_type in MODELS:
        MODEL_ARCH_CONFIG_CONVERTORS[model_type] = convertor(model_type)
    for model_type, name in validation.CLASSES.items():
        module = MODULES.get(model_type, "tiled_models")
        ModelRegistry.register_model(name, f"llava_pitome.integrations.vllm.{module}:{name}")
