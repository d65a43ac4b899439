"""What can be served by vLLM while it merges, checked on configs alone; the only other place is `model`."""

from typing import Any

from llava_pitome.api import FIELD
from llava_pitome.config import MergeConfig
from llava_pitome.models import checkpoints
from llava_pitome.models import hf_llava as llava

STRATEGIES = ("default", "full")  # of vision_feature_select_strategy


def merging(config: Any) -> MergeConfig | None:
    """How the LLaVA of a transformers config is to merge in vLLM; None where its config does not say.

    Raises:
        ValueError: vLLM cannot serve what `token_merging` asks for, or it does not fit the model.
    """
    values = getattr(config, FIELD, None)
    if values is None:
        return None
    if not isinstance(values, dict):
        raise ValueError(f"{FIELD}={values!r} is not allowed: it must be a dict of MergeConfig's fields")
    found = MergeConfig.from_dict(values)
    check(found, config)
    return found


def check(merging: MergeConfig, config: Any) -> None:
    """Raises ValueError where vLLM cannot serve the LLaVA of a transformers config merging like this."""
    tower = config.vision_config.model_type if config.model_type == "llava" else None
    if tower not in checkpoints.TOWERS:
        what = f"a model of type {config.model_type!r}" + (f" with a {tower!r}" if tower else "")
        raise ValueError(
            f"vLLM cannot merge in {what}; supported is a 'llava' with {' or '.join(checkpoints.TOWERS)}"
        )
    strategy = config.vision_feature_select_strategy
    if strategy not in STRATEGIES:
        raise ValueError(
            f"vision_feature_select_strategy={strategy!r} is not allowed; allowed are {', '.join(STRATEGIES)}"
        )
    _check_places(merging)
    llava.check_front(merging, strategy == "full", class_tokens(config))
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    merging.tokens_at(patches, features(config))  # raises where the numbers do not fit


def _check_places(merging: MergeConfig) -> None:
    """Raises ValueError for what would change something inside vLLM's language model."""
    asked = {
        "decoder": dict(merging.decoder) if merging.merging_layers else None,
        "llm_proportional": merging.llm_proportional or None,
        "positions": None if merging.positions == "packed" else merging.positions,
    }
    for name, value in asked.items():
        if value is not None:
            raise ValueError(
                f"{name}={value!r} is not supported under vLLM: it changes the language model's attention, "
                "cache or positions, which are vLLM's own; merge in the tower or at the prefix (ratio, "
                "tokens, prefix), or serve with `llava-pitome serve`"
            )


def class_tokens(config: Any) -> int:
    """Class tokens, 0 or 1, of the tower of a transformers config."""
    return int(config.vision_config.model_type == "clip_vision_model")


def features(config: Any) -> int:
    """Layers of the tower up to the one whose output is read."""
    return llava.feature_layers(config.vision_feature_layer, config.vision_config.num_hidden_layers)
