"""Processors that write as many <image> placeholders as image tokens reach the language model.

transformers writes one placeholder per patch and compares their number with the features'. Token counts are
known beforehand, so the processor is changed, and nothing after it (generate, padding, labels, caches) has
to be.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

METHODS = ("replace_image_token", "_get_num_multimodal_tokens")
FITS = "token_merging"  # the attribute of a processor that holds what it was fitted to
STRATEGIES = ("default", "full")  # without an image's first token, and with it


class Fit:
    """What a processor was fitted to: how many tokens a model makes of an image.

    Attributes:
        tokens_for: from an image's patches to its tokens; None while its owner needs none.
    """

    def __init__(self, owner: Any, tokens_for: Callable[[int], int] | None):
        """Keeps both, without keeping the owner alive."""
        self._owner = None if owner is None else weakref.ref(owner)
        self.tokens_for = tokens_for

    def __deepcopy__(self, _memo: dict) -> "Fit":
        """Itself: it never changes."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For pickle, as for the workers of a data loader: who fitted the processor is not there."""
        return {"_owner": None, "tokens_for": self.tokens_for if self.is_in_force else None}

    def is_of(self, owner: Any) -> bool:
        """Whether an owner fitted the processor."""
        return (None if self._owner is None else self._owner()) is owner

    @property
    def is_in_force(self) -> bool:
        """Whether its owner, and so a model that merges, still exists."""
        return self.tokens_for is not None and (self._owner is None or self._owner() is not None)


def check(processor: Any, patch_size: int, extra_tokens: int) -> None:
    """Raises ValueError for a processor that writes other placeholders than a model has image tokens.

    Args:
        processor: a LlavaProcessor.
        patch_size: of the model.
        extra_tokens: an image's features that are no patch, less patches that are no feature.
    """
    if not all(hasattr(type(processor), name) for name in METHODS):
        raise ValueError(
            f"{type(processor).__name__} writes no image placeholders; "
            "pass the LlavaProcessor that AutoProcessor loads"
        )
    if processor.patch_size != patch_size:
        raise ValueError(f"the processor has patch_size={processor.patch_size!r}, the model {patch_size}")
    extra, strategy = processor.num_additional_image_tokens, processor.vision_feature_select_strategy
    if strategy not in STRATEGIES:
        raise ValueError(
            f"the processor has vision_feature_select_strategy={strategy!r}; allowed are "
            f"{' and '.join(map(repr, STRATEGIES))}"
        )
    if _extra(processor) != extra_tokens:
        raise ValueError(
            f"the processor has num_additional_image_tokens={extra!r} and "
            f"vision_feature_select_strategy={strategy!r}, and so writes {_extra(processor):+d} placeholders "
            f"beside those of an image's patches; the model makes {extra_tokens:+d} tokens"
        )


def set_token_counts(processor: Any, tokens_for: Callable[[int], int] | None, owner: Any = None) -> None:
    """Makes one processor write `tokens_for(patches)` placeholders where it would write `patches`.

    Only this object changes, and nothing that it saves. Several models may fit one processor: it writes for
    the one that did last and has not taken it back with `restore`.

    Args:
        processor: a LlavaProcessor.
        tokens_for: the counts; None while the owner needs none.
        owner: who fits it, by identity. One that has fitted it before keeps its place among the others.
    """
    fits = list(vars(processor).get(FITS, ()))
    own = next((i for i, fit in enumerate(fits) if fit.is_of(owner)), len(fits))
    fits[own : own + 1] = [Fit(owner, tokens_for)]
    setattr(processor, FITS, fits)
    processor.replace_image_token = partial(_replace_image_token, processor)
    processor._get_num_multimodal_tokens = partial(_get_num_multimodal_tokens, processor)


def restore(processor: Any, owner: Any = None) -> None:
    """Takes back what an owner set; a processor that nobody fits has its own placeholder counts again."""
    fits = [fit for fit in vars(processor).get(FITS, ()) if not fit.is_of(owner)]
    if any(fit.is_in_force for fit in fits):
        setattr(processor, FITS, fits)
        return
    for name in (*METHODS, FITS):
        vars(processor).pop(name, None)


def _replace_image_token(processor: Any, *args: Any, **kwargs: Any) -> str:
    """The placeholders of one image."""
    plain = type(processor).replace_image_token(processor, *args, **kwargs)
    token = processor.image_token
    return token * _merged_count(processor, len(plain) // len(token))


def _get_num_multimodal_tokens(processor: Any, *args: Any, **kwargs: Any) -> Any:
    """The number of placeholders by image size, as servers ask for it."""
    data = type(processor)._get_num_multimodal_tokens(processor, *args, **kwargs)
    if "num_image_tokens" in data:
        data.num_image_tokens = [_merged_count(processor, n) for n in data.num_image_tokens]
    return data


def _merged_count(processor: Any, placeholders: int) -> int:
    """Placeholders of merged tokens; those for tokens that are no patch (a class token) stay."""
    fits = [fit for fit in vars(processor).get(FITS, ()) if fit.is_in_force]
    if not fits:
        return placeholders
    extra = _extra(processor)
    return fits[-1].tokens_for(placeholders - extra) + extra


def _extra(processor: Any) -> int:
    """Placeholders beside those of an image's patches; -1 where the first patch has none."""
    return processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
