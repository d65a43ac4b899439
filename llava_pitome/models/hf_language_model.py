"""Where the parts of a LLaVA's language model are, and what it must be like for tokens to merge inside it."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from llava_pitome.config import MergeConfig
from llava_pitome.models.language_model_parts import LanguageModelParts
from llava_pitome.models.parts import BlockParts, ModelParts

KINDS = (
    "LlamaModel",
    "MistralModel",
    "Qwen2Model",
)  # whose layers are known to be what the hooks take them for
KERNELS = ("sdpa", "eager")  # attention kernels that take a mask of their own for every layer
SUPPORTED = "language models built like Llama (Llama, Vicuna, Mistral without a sliding window, Qwen2)"


def find(parts: ModelParts, config: MergeConfig) -> LanguageModelParts | None:
    """The language model of a LLaVA, where a config changes something inside it; None elsewhere."""
    if parts.whole is None or not config.reaches_llm:
        return None
    llm = parts.whole.llm
    tokens = partial(config.tokens_at, layers=parts.feature)
    return LanguageModelParts(
        outer=parts.whole.outer,
        model=llm,
        blocks=tuple(_block(layer) for layer in llm.layers),
        norm=llm.norm,
        rotary=llm.rotary_emb,
        image_token=parts.whole.image_token,
        front=parts.front,
        image_tokens=partial(_image_tokens, parts.patch_size, parts.front, tokens),
        cached_keys=_cached_keys,
        plain=partial(_plain, llm),
        check=partial(_check, llm),
    )


def check_model(model: nn.Module, llm: nn.Module) -> None:
    """Raises ValueError unless merging knows its way inside a model's language model."""
    if not {c.__name__ for c in type(llm).__mro__} & set(KINDS):
        raise ValueError(
            f"tokens cannot merge inside a {type(llm).__name__}; supported are {SUPPORTED}. Merge in the "
            "tower or at the prefix instead"
        )
    if getattr(llm.config, "sliding_window", None) is not None and getattr(
        llm.config, "use_sliding_window", True
    ):
        raise ValueError(
            f"tokens cannot merge inside a language model with sliding_window={llm.config.sliding_window}; "
            "merge in the tower or at the prefix instead"
        )
    settings = getattr(model, "generation_config", None)
    kind = getattr(settings, "cache_implementation", None)
    if kind not in (None, "dynamic"):
        raise ValueError(
            f"generation_config.cache_implementation={kind!r} cannot hold layers of different lengths; set "
            "it to None to merge inside the language model"
        )


def check_kernel(llm: nn.Module) -> None:
    """Raises ValueError unless the language model's attention kernel takes masks."""
    kernel = llm.config._attn_implementation
    if kernel not in KERNELS:
        raise ValueError(
            f"merging inside the language model needs an attention kernel that takes a mask; "
            f"attn_implementation={kernel!r} does not, allowed are {', '.join(map(repr, KERNELS))}"
        )


def _check(llm: nn.Module, given: dict) -> None:
    """Raises ValueError for a cache, mask or kernel that cannot work, before anything runs."""
    check_kernel(llm)
    cache, mask = given.get("past_key_values"), given.get("attention_mask")
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", ())}
    if cache is not None and (type(cache).__name__ != "DynamicCache" or kinds - {"DynamicLayer"}):
        what = type(cache).__name__ + (f" with {', '.join(sorted(kinds))}" if kinds else "")
        raise ValueError(
            f"{what} cannot hold layers of different lengths; merging inside the language model needs a "
            "DynamicCache (cache_implementation=None)"
        )
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask is {shape}; merging inside the language model needs it as (prompts, tokens)"
        )
    positions = given.get("position_ids") if given.get("pixel_values") is not None else None
    if mask is None and cache is None and positions is not None and bool((positions.diff() != 1).any()):
        raise ValueError(
            "position_ids without attention_mask start again within a row, as where sequences are packed; "
            "merging inside the language model needs one prompt a row"
        )


def _plain(llm: nn.Module) -> bool:
    """Whether the kernel is causal without a mask."""
    return llm.config._attn_implementation == "sdpa"


def _block(layer: nn.Module) -> BlockParts:
    a = layer.self_attn
    heads, key_heads = a.config.num_attention_heads, a.config.num_key_value_heads
    norm = layer.post_attention_layernorm
    return BlockParts(layer, a, a.q_proj, a.k_proj, a.v_proj, a.o_proj, heads, key_heads, norm, layer.mlp)


def _image_tokens(patch: int, front: int, tokens: Any, kwargs: dict, last: int) -> int | None:
    """Tokens of each image in a call of LlavaModel; None where it gets no picture.

    Pictures that are encoded already may have been cut where a prompt is prefilled in chunks, so that the
    patches of the `last` ones that were encoded say how long they should be.
    """
    encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
    if encoded is not None:
        return tokens(last) + front if last else len(encoded.pooler_output[0])
    pixels = kwargs.get("pixel_values")
    if pixels is None:
        return None
    return tokens((pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)) + front


def _cached_keys(cache: Any, layer: int, count: int) -> Tensor:
    """The first keys (B, H, count, C) of a layer."""
    return cache.layers[layer].keys[:, :, :count]
