"""What vLLM can merge, checked on configs before anything starts."""

from typing import Any

from llava_pitome.config import MergeConfig
from llava_pitome.models import hf_llava
from llava_pitome.models.checkpoints import vision_counts
from llava_pitome.saved_config import KEY

STRATEGIES = ("default", "full")  # of vision_feature_select_strategy


def merge_config(config: Any) -> MergeConfig | None:
    """The merge config that a LlavaConfig carries; None where it carries none.

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
    """Raises ValueError where vLLM cannot serve the LLaVA of a LlavaConfig merging like this."""
    patches, layers, num_prefix_tokens = vision_counts(config)
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
    hf_llava.check_first_token(merging, strategy == "full", num_prefix_tokens)
    merging.tokens_at(patches, layers)  # raises where the numbers do not fit the model
