"""What vLLM can merge, checked on configs before anything starts."""

import dataclasses
from typing import Any

from llava_pitome.config import MergeConfig
from llava_pitome.config_validation import AMOUNTS
from llava_pitome.integrations.vllm.tiled_counts import TILED, TiledCounts, empty_model
from llava_pitome.models import config_checks, hf_llava
from llava_pitome.models.checkpoints import vision_counts
from llava_pitome.saved_config import KEY

STRATEGIES = ("default", "full")  # of vision_feature_select_strategy
CLASSES = {  # that merge under vLLM, by model type
    "llava": "LlavaPitomeForConditionalGeneration",
    "llava_next": "LlavaNextPitomeForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionPitomeForConditionalGeneration",
}


def merge_config(config: Any) -> MergeConfig | None:
    """The merge config that a LLaVA's config carries; None where it carries none.

    Raises:
        ValueError: `token_merging` is not a merge config, does not fit the model, or vLLM cannot do it.
    """
    values = getattr(config, KEY, None)
    if values is None:
        return None
    if not isinstance(values, dict):
        raise ValueError(f"{KEY}={values!r} is not allowed: it must be a dict of MergeConfig's fields")
    merging = MergeConfig.from_dict(values)
    check(merging, config)
    return merging


def check(merging: MergeConfig, config: Any) -> None:
    """Raises ValueError where vLLM cannot serve the LLaVA of a config merging like this."""
    if config.model_type not in CLASSES:
        raise ValueError(
            f"a model of type {config.model_type!r} is not supported under vLLM with {KEY}; supported are "
            f"{', '.join(CLASSES)}. Serve it with `llava-pitome serve`"
        )
    vision_counts(config)  # raises where the vision tower is not supported
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(
            f"vision_feature_layer={config.vision_feature_layer!r} is not supported under vLLM, which reads "
            "a single layer; serve with `llava-pitome serve`"
        )
    strategy = config.vision_feature_select_strategy
    if strategy not in STRATEGIES:
        raise ValueError(
            f"vision_feature_select_strategy={strategy!r} is not allowed; allowed are {', '.join(STRATEGIES)}"
        )
    in_language_model = {
        "decoder": dict(merging.decoder) if merging.merging_layers else None,
        "llm_proportional": merging.llm_proportional or None,
        "positions": None if merging.positions == "packed" else merging.positions,
    }
    for name, value in in_language_model.items():
        if value is not None:
            raise ValueError(
                f"{name}={value!r} is not supported under vLLM: it changes the language model's attention, "
                "KV cache or position ids, which are vLLM's own; merge in the vision tower or after the "
                "projector (ratio, tokens, prefix), or serve with `llava-pitome serve`"
            )
    if config.model_type in TILED:
        for name in config_checks.OF_VIDEOS:
            if value := getattr(merging, name):
                raise ValueError(
                    f"{name}={value!r} is not supported under vLLM, where images merge and videos do not; "
                    "serve with `llava-pitome serve`"
                )
    if merging.decoder:  # layers that merge nothing
        others = any(getattr(merging, name) is not None for name in AMOUNTS if name != "decoder")
        merging = dataclasses.replace(merging, decoder={}, **{} if others else {"ratio": 1.0})
    config_checks.check(hf_llava.find(empty_model(config)), merging)
    if config.model_type in TILED:
        TiledCounts.of(config, merging).largest_image()
