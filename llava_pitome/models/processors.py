"""Processors that write as many <image> placeholders as image tokens reach the language model.

transformers writes one placeholder per patch and compares their number with the features'. Token counts are
known beforehand, so the processor is changed, and nothing after it (generate, padding, labels, caches) has
to be.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from llava_pitome.models.tiling import Tiling

METHODS = ("replace_image_token", "_get_num_multimodal_tokens")
OF_VIDEOS = ("replace_video_token", "get_text_with_replacements")  # of processors that take videos
FITS = "token_merging"  # the attribute of a processor that holds what it was fitted to
STRATEGIES = ("default", "full")  # without an image's first token, and with it


TokensFor = Callable[[Any], int]


class Fit:
    """What a processor was fitted to: how many tokens a model makes of an image.

    Attributes:
        tokens_for: from an image's patches, or its ImageLayout where there is a tiling, to its tokens; None
            while its owner needs none.
        tiling: how the model cuts images into tiles; None where an image is one tile.
    """

    def __init__(self, owner: Any, tokens_for: TokensFor | None, tiling: Tiling | None = None):
        """Keeps them, without keeping the owner alive."""
        self._owner = None if owner is None else weakref.ref(owner)
        self.tokens_for, self.tiling = tokens_for, tiling

    def __deepcopy__(self, _memo: dict) -> "Fit":
        """Itself: it never changes."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For pickle, as for the workers of a data loader: who fitted the processor is not there."""
        tokens_for = self.tokens_for if self.is_in_force else None
        return {"_owner": None, "tokens_for": tokens_for, "tiling": self.tiling}

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


def check_tiled(processor: Any, tiling: Tiling, patch_size: int) -> None:
    """Raises ValueError for a processor that cuts images into other tiles than a model does.

    Args:
        processor: a LlavaNextProcessor, LlavaNextVideoProcessor or LlavaOnevisionProcessor.
        tiling: of the model.
        patch_size: of the model.
    """
    name, images = type(processor).__name__, getattr(processor, "image_processor", None)
    if not hasattr(images, "image_grid_pinpoints") or not hasattr(type(processor), METHODS[0]):
        raise ValueError(
            f"{name} does not cut images into tiles; pass the processor that AutoProcessor loads"
        )
    pinpoints = tuple((int(height), int(width)) for height, width in images.image_grid_pinpoints)
    if pinpoints != tiling.pinpoints:
        raise ValueError(
            f"the processor has image_grid_pinpoints={list(pinpoints)}, the model {list(tiling.pinpoints)}"
        )
    size = images.size
    tile = size["shortest_edge"] if "shortest_edge" in size else min(size["height"], size["width"])
    if tile != tiling.tile:
        raise ValueError(f"the processor makes tiles of {tile} pixels, the model takes {tiling.tile}")
    if hasattr(processor, "patch_size") and processor.patch_size != patch_size:
        raise ValueError(f"the processor has patch_size={processor.patch_size!r}, the model {patch_size}")
    strategy = processor.vision_feature_select_strategy
    if strategy not in STRATEGIES:
        raise ValueError(
            f"the processor has vision_feature_select_strategy={strategy!r}; allowed are "
            f"{' and '.join(map(repr, STRATEGIES))}"
        )
    patches = tiling.side**2
    extra = getattr(processor, "num_additional_image_tokens", 0)
    written = getattr(processor, "num_image_tokens", patches) + extra
    written -= strategy == "default"
    if written != patches:
        raise ValueError(
            f"the processor writes {written} placeholders for a tile, of which the model has {patches} "
            f"patches: vision_feature_select_strategy={strategy!r}, "
            f"num_additional_image_tokens={extra}"
        )
    aspect = getattr(processor, "vision_aspect_ratio", None)
    if tiling.max_tiles is not None and aspect != f"anyres_max_{tiling.max_tiles}":
        raise ValueError(
            f"the processor has vision_aspect_ratio={aspect!r}, the model anyres_max_{tiling.max_tiles}"
        )


def set_token_counts(
    processor: Any, tokens_for: TokensFor | None, owner: Any = None, tiling: Tiling | None = None
) -> None:
    """Makes one processor write `tokens_for(patches)` placeholders where it would write `patches`.

    Only this object changes, and nothing that it saves. Several models may fit one processor: it writes for
    the one that did last and has not taken it back with `restore`.

    Args:
        processor: a LlavaProcessor.
        tokens_for: the counts; None while the owner needs none.
        owner: who fits it, by identity. One that has fitted it before keeps its place among the others.
        tiling: how the model cuts images into tiles; `tokens_for` then takes an ImageLayout.
    """
    fits = list(vars(processor).get(FITS, ()))
    own = next((i for i, fit in enumerate(fits) if fit.is_of(owner)), len(fits))
    fits[own : own + 1] = [Fit(owner, tokens_for, tiling)]
    setattr(processor, FITS, fits)
    if tiling is not None and tiling.frame_side is not None and hasattr(type(processor), OF_VIDEOS[0]):
        processor.replace_video_token = partial(_replace_video_token, processor)
        processor.get_text_with_replacements = partial(_get_text_with_replacements, processor)
    processor.replace_image_token = partial(_replace_image_token, processor)
    processor._get_num_multimodal_tokens = partial(_get_num_multimodal_tokens, processor)


def restore(processor: Any, owner: Any = None) -> None:
    """Takes back what an owner set; a processor that nobody fits has its own placeholder counts again."""
    fits = [fit for fit in vars(processor).get(FITS, ()) if not fit.is_of(owner)]
    if any(fit.is_in_force for fit in fits):
        setattr(processor, FITS, fits)
        return
    for name in (*METHODS, *OF_VIDEOS, FITS):
        vars(processor).pop(name, None)


def _replace_image_token(processor: Any, *args: Any, **kwargs: Any) -> str:
    """The placeholders of one image."""
    token, fit = processor.image_token, _fit(processor)
    if fit is None or fit.tiling is None:
        plain = type(processor).replace_image_token(processor, *args, **kwargs)
        return token * _merged_count(processor, len(plain) // len(token))

    def one_image(image_inputs: dict[str, Any], image_idx: int = 0, **_kwargs: Any) -> int:
        sizes, counts = image_inputs["image_sizes"], image_inputs.get("batch_num_images")
        return fit.tokens_for(fit.tiling.images(sizes, counts)[image_idx])

    return token * one_image(*args, **kwargs)


def _replace_video_token(processor: Any, *args: Any, **kwargs: Any) -> str:
    """The placeholders of one video."""
    fit = _fit(processor)
    if fit is None or fit.tiling is None:
        return type(processor).replace_video_token(processor, *args, **kwargs)

    def one_video(video_inputs: dict[str, Any], video_idx: int = 0, **_kwargs: Any) -> int:
        frames = len(video_inputs["pixel_values_videos"][video_idx])
        return fit.tokens_for(fit.tiling.video(frames))

    return processor.video_token * one_video(*args, **kwargs)


def _get_text_with_replacements(processor: Any, text: list[str], *args: Any, **kwargs: Any) -> Any:
    """Texts with all placeholders.

    Raises:
        ValueError: one holds an image and a video.
    """
    both = [row for row in text if processor.image_token in row and processor.video_token in row]
    if both and _fit(processor) is not None:
        raise ValueError(f"a prompt holds images and videos, which cannot merge together: {both[0]!r}")
    return type(processor).get_text_with_replacements(processor, text, *args, **kwargs)


def _get_num_multimodal_tokens(processor: Any, *args: Any, **kwargs: Any) -> Any:
    """The number of placeholders by image size, as servers ask for it."""
    data, fit = type(processor)._get_num_multimodal_tokens(processor, *args, **kwargs), _fit(processor)
    if fit is not None and fit.tiling is not None:
        sizes = args[0] if args else kwargs.get("image_sizes")
        if sizes is not None:
            data.num_image_tokens = [fit.tokens_for(fit.tiling.image(*size)) for size in sizes]
        if (videos := kwargs.get("video_sizes")) is not None:
            data.num_video_tokens = [fit.tokens_for(fit.tiling.video(frames)) for frames, *_ in videos]
    elif "num_image_tokens" in data:
        data.num_image_tokens = [_merged_count(processor, n) for n in data.num_image_tokens]
    return data


def _fit(processor: Any) -> Fit | None:
    """The fit by which a processor writes; None where nobody's is in force."""
    fits = [fit for fit in vars(processor).get(FITS, ()) if fit.is_in_force]
    return fits[-1] if fits else None


def _merged_count(processor: Any, placeholders: int) -> int:
    """Placeholders of merged tokens; those for tokens that are no patch (a class token) stay."""
    fit = _fit(processor)
    if fit is None:
        return placeholders
    extra = _extra(processor)
    return fit.tokens_for(placeholders - extra) + extra


def _extra(processor: Any) -> int:
    """Placeholders beside those of an image's patches; -1 where the first patch has none."""
    return processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
