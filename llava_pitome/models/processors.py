"""As many <image> placeholders as image tokens will arrive.

transformers writes one placeholder per patch and checks the number against the features. Counts are known
beforehand, so the processor is told, and nothing behind it (generate, padding, labels, caches) is touched.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

METHODS = ("replace_image_token", "_get_num_multimodal_tokens")


def check(processor: Any, patch_size: int) -> None:
    """Raises ValueError where the processor writes no placeholders, or cuts other patches than the model."""
    if not all(hasattr(type(processor), name) for name in METHODS):
        raise ValueError(
            f"{type(processor).__name__} writes no image placeholders; "
            "pass the LlavaProcessor that AutoProcessor loads"
        )
    if processor.patch_size != patch_size:
        raise ValueError(f"the processor has patch_size={processor.patch_size!r}, the model {patch_size}")


def fit(processor: Any, kept: Callable[[int], int]) -> None:
    """Makes one processor write `kept(patches)` placeholders where it would write `patches`.

    Only this object changes, and nothing that it saves. `unfit` takes it back.
    """
    processor.replace_image_token = partial(_replace_image_token, processor, kept)
    processor._get_num_multimodal_tokens = partial(_get_num_multimodal_tokens, processor, kept)


def unfit(processor: Any) -> None:
    """Gives a processor its own placeholder counts back; one that was never fitted stays as it is."""
    for name in METHODS:
        vars(processor).pop(name, None)


def _replace_image_token(processor: Any, kept: Callable[[int], int], *args: Any, **kwargs: Any) -> str:
    """The placeholders of one image."""
    plain = type(processor).replace_image_token(processor, *args, **kwargs)
    token = processor.image_token
    return token * _after(processor, kept, len(plain) // len(token))


def _get_num_multimodal_tokens(processor: Any, kept: Callable[[int], int], *args: Any, **kwargs: Any) -> Any:
    """The number of placeholders by image size, as servers ask for it."""
    data = type(processor)._get_num_multimodal_tokens(processor, *args, **kwargs)
    if "num_image_tokens" in data:
        data.num_image_tokens = [_after(processor, kept, n) for n in data.num_image_tokens]
    return data


def _after(processor: Any, kept: Callable[[int], int], placeholders: int) -> int:
    """Placeholders after merging: what is no patch (a class token that is read too) stays."""
    extra = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
    return kept(placeholders - extra) + extra
