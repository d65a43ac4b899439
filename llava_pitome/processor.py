"""As many <image> placeholders as image tokens will arrive.

transformers writes one placeholder per patch and checks the number against the features. Counts are known
beforehand, so the processor is told, and nothing behind it (generate, padding, labels, caches) is touched.
"""

from collections.abc import Callable
from typing import Any

METHODS = ("replace_image_token", "_get_num_multimodal_tokens")


def fit(processor: Any, patch_size: int, kept: Callable[[int], int]) -> None:
    """Makes one processor write `kept(patches)` placeholders where it would write `patches`.

    Only this object changes, and nothing that it saves. `unfit` takes it back.

    Raises:
        ValueError: the processor writes no placeholders, or cuts patches of another size than the model.
    """
    if not all(hasattr(type(processor), name) for name in METHODS):
        raise ValueError(
            f"{type(processor).__name__} writes no image placeholders; "
            "pass the LlavaProcessor that AutoProcessor loads"
        )
    if processor.patch_size != patch_size:
        raise ValueError(f"the processor has patch_size={processor.patch_size!r}, the model {patch_size}")
    unfit(processor)
    replace, count = processor.replace_image_token, processor._get_num_multimodal_tokens

    def after(placeholders: int) -> int:
        extra = processor.num_additional_image_tokens - (
            processor.vision_feature_select_strategy == "default"
        )
        return kept(placeholders - extra) + extra

    def replace_image_token(*args: Any, **kwargs: Any) -> str:
        token = processor.image_token
        return token * after(len(replace(*args, **kwargs)) // len(token))

    def get_num_multimodal_tokens(*args: Any, **kwargs: Any) -> Any:
        data = count(*args, **kwargs)
        if data.get("num_image_tokens") is not None:
            data["num_image_tokens"] = [after(n) for n in data["num_image_tokens"]]
        return data

    processor.replace_image_token = replace_image_token
    processor._get_num_multimodal_tokens = get_num_multimodal_tokens


def unfit(processor: Any) -> None:
    """Gives a processor its own placeholder counts back; one that was never fitted stays as it is."""
    for name in METHODS:
        vars(processor).pop(name, None)
