"""Checkpoints of the original LLaVA package, loaded into the Hugging Face class without that package."""

from typing import Any

import torch
from torch import nn

from llava_pitome.models.conversion import processors, weights
from llava_pitome.models.conversion.configs import config, is_original

__all__ = ["config", "is_original", "load"]
PADDED = 64  # rows of the vocabulary come in multiples of this, as in the converted checkpoints on the hub


def load(
    path: str, raw: dict[str, Any], hub: dict[str, Any], tower_hub: dict[str, Any], **options: Any
) -> tuple[nn.Module, Any]:
    """The model and processor of an original checkpoint.

    Rows that the vocabulary gains, for <image> and up to a multiple of PADDED, are the mean of the others, so
    that none of them can be the likeliest next token; generate never gives them.

    Args:
        path: its folder or hub id.
        raw: its config.json.
        hub: where its files come from: revision, token, ...
        tower_hub: the same for its tower's.
        **options: as for `from_pretrained`, with a dtype.

    Raises:
        ValueError: a checkpoint that is not supported, or that lacks weights.
    """
    from transformers import LlavaForConditionalGeneration

    made = config(raw, tower_hub)
    state = weights.model(path, hub)
    rows = weights.rows(state)
    processor = processors.build(path, raw, made, hub, tower_hub)
    made.image_token_index = processor.image_token_id
    needed = max(rows, len(processor.tokenizer))
    made.text_config.vocab_size = rows if needed == rows else -(-needed // PADDED) * PADDED
    weights.grow(state, made.text_config.vocab_size)
    own_tower = bool(raw.get("unfreeze_mm_vision_tower"))
    state = weights.with_tower(state, None if own_tower else raw["mm_vision_tower"], tower_hub)
    if options["dtype"] == "auto":
        options["dtype"] = made.dtype or state[weights.HEAD].dtype
    model, found = LlavaForConditionalGeneration.from_pretrained(
        None, config=made, state_dict=state, output_loading_info=True, **options
    )
    if found["missing_keys"]:
        raise ValueError(f"{path} lacks weights: {', '.join(sorted(found['missing_keys'])[:5])}")
    model.name_or_path = model.config.name_or_path = path
    _generate_no_others(model, rows, processor.tokenizer)
    return model, processor


def _generate_no_others(model: nn.Module, rows: int, tokenizer: Any) -> None:
    """Tells generate which tokens end an answer, and that those behind row `rows` are none."""
    settings = model.generation_config
    text = model.config.text_config
    settings.bos_token_id, settings.eos_token_id = text.bos_token_id, text.eos_token_id
    settings.pad_token_id = text.pad_token_id = tokenizer.pad_token_id
    if (added := text.vocab_size - rows) > 0:
        settings.suppress_tokens = torch.arange(rows, rows + added).tolist()
