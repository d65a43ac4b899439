"""Processors that write as many <image> placeholders as image tokens reach the language model.

transformers writes one placeholder per patch and compares their number with the features'. Token counts are
known beforehand, so the processor is changed, and nothing after it (generate, padding, labels, caches) has
to be.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

METHODS = ("replace_image_token", "_get_num_multimodal_tokens")


def check(processor: Any, patch_size: int) -> None:
    """Raises ValueError for a processor without placeholders, or of another patch size than the model."""
    if not all(hasattr(type(processor), name) for name in METHODS):
        raise ValueError(
            f"{type(processor).__name__} writes no image placeholders; "
            "pass the LlavaProcessor that AutoProcessor loads"
        )
    if processor.patch_size != patch_size:
        raise ValueError(f"the processor has patch_size={processor.patch_size!r}, the model {patch_size}")


def set_token_counts(processor: Any, tokens_for: Callable[[int], int]) -> None:
    """Makes one processor write `tokens_for(patches)` placeholders where it would write `patches`.

    Only this object changes, and nothing that it saves. `restore` takes it back.
    """
    processor.replace_image_token = partial(_replace_image_token, processor, tokens_for)
    processor._get_num_multimodal_tokens = partial(_get_num_multimodal_tokens, processor, tokens_for)


def restore(processor: Any) -> None:
    """Gives a processor its own placeholder counts back; one that was never fitted stays as it is."""
    for name in METHODS:
        vars(processor).pop(name, None)


def _replace_image_token(processor: Any, tokens_for: Callable[[int], int], *args: Any, **kwargs: Any) -> str:
    """The placeholders of one image."""
    plain = type(processor).replace_image_token(processor, *args, **kwargs)
    token = processor.image_token
    return token * _merged_count(processor, tokens_for, len(plain) // len(token))


def _get_num_multimodal_tokens(
    processor: Any, tokens_for: Callable[[int], int], *args: Any, **kwargs: Any
) -> Any:
    """The number of placeholders by image size, as servers ask for it."""
    data = type(processor)._get_num_multimodal_tokens(processor, *args, **kwargs)
    if "num_image_tokens" in data:
        data.num_image_tokens = [_merged_count(processor, tokens_for, n) for n in data.num_image_tokens]
    return data


def _merged_count(processor: Any, tokens_for: Callable[[int], int], placeholders: int) -> int:
    """Placeholders of merged tokens; those for tokens that are no patch (a class token) stay."""
    extra = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
    return tokens_for(placeholders - extra) + extra
