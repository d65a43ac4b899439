"""Language models of transformers that are built like Llama: their parts, and what merging in them requires.

Shapes: B prompts, T tokens of this forward pass, P tokens in the KV cache, H heads, C channels a head.
"""

from typing import Any

from torch import Tensor, nn

from llava_pitome.config import MergeConfig
from llava_pitome.image_layout import ImageLayout
from llava_pitome.image_schedule import tokens_of_image
from llava_pitome.models.parts import WRAPPED, BlockParts, LanguageModelParts, ModelParts, without_wrapper

CLASSES = ("LlamaModel", "MistralModel", "Qwen2Model")  # whose layers the hooks were tested with
MASKED = ("sdpa", "eager")  # attention implementations that take an additive mask
SUPPORTED = "language models built like Llama (Llama, Vicuna, Mistral without a sliding window, Qwen2)"


def find(parts: ModelParts, config: MergeConfig) -> LanguageModelParts | None:
    """The language model of a LLaVA, where a config changes something inside it; None elsewhere."""
    if parts.llava is None or not config.reaches_llm:
        return None
    llm = parts.llava.llm
    return LanguageModelParts(
        multimodal=parts.llava.multimodal,
        model=llm,
        blocks=tuple(_block(layer) for layer in llm.layers),
        norm=llm.norm,
        rotary=llm.rotary_emb,
        image_token=parts.llava.image_token,
        video_token=parts.llava.video_token,
        num_feature_prefix_tokens=parts.num_feature_prefix_tokens,
        adapter=LlamaLike(llm, parts, config),
    )


def _block(layer: nn.Module) -> BlockParts:
    layer = without_wrapper(layer)
    return BlockParts(layer, layer.self_attn, layer.post_attention_layernorm, layer.mlp)


class LlamaLike:
    """The adapter of language models built like Llama; see `models.parts.LanguageModelAdapter`.

    Attributes:
        num_heads: heads of the queries and of the keys.
        tiling: how the model cuts images into tiles; None where an image is one tile.
    """

    def __init__(self, llm: nn.Module, parts: ModelParts, config: MergeConfig):
        """Keeps what token counts depend on; not the model, which can be freed while it merges."""
        self.config = config
        self.num_heads = (llm.config.num_attention_heads, llm.config.num_key_value_heads)
        self._patch_size, self._num_feature_layers = parts.patch_size, parts.num_feature_layers
        self._num_prefix = parts.num_feature_prefix_tokens
        self.tiling = parts.llava.tiling

    def tokens_per_image(self, inputs: dict[str, Any]) -> int | None:
        """Tokens of each image in a call of the multimodal module; None where it gets no pixels."""
        pixels = inputs.get("pixel_values")
        if pixels is None:
            return None
        patches = (pixels.shape[-2] // self._patch_size) * (pixels.shape[-1] // self._patch_size)
        return self.config.tokens_at(patches, self._num_feature_layers) + self._num_prefix

    def image_tokens(self, inputs: dict[str, Any]) -> list[list[int]]:
        """Tokens of each image, and of each video, in a call of a model that cuts images into tiles."""
        images, videos = inputs.get("pixel_values"), inputs.get("pixel_values_videos")
        layouts: list[list[ImageLayout]] = [[], []]
        if images is not None:
            layouts[0] = self.tiling.images(inputs["image_sizes"], inputs.get("batch_num_images"))
        if videos is not None:
            layouts[1] = [self.tiling.video(videos.shape[1])] * len(videos)
        return [[tokens_of_image(self.config, self._num_feature_layers, x) for x in own] for own in layouts]

    def language_model(self, multimodal: nn.Module) -> nn.Module:
        """The language model in the module around it, which for the original package is the whole model."""
        found = getattr(multimodal, "language_model", None)
        return multimodal.get_model() if found is None else found

    def projections(self, attention: nn.Module) -> tuple[nn.Module, nn.Module]:
        """The query and key projections of an attention module."""
        return attention.q_proj, attention.k_proj

    def cached_keys(self, cache: Any, layer: int, count: int) -> Tensor:
        """The first `count` keys (B, H, count, C) of a layer in the KV cache."""
        return cache.layers[layer].keys[:, :, :count]

    def check_inputs(self, inputs: dict[str, Any]) -> None:
        """Raises ValueError for a cache or mask with which tokens cannot merge."""
        cache, mask = cache_in(inputs), inputs.get("attention_mask")
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
        positions = inputs.get("position_ids") if inputs.get("pixel_values") is not None else None
        if mask is None and cache is None and positions is not None and bool((positions.diff() != 1).any()):
            raise ValueError(
                "position_ids without attention_mask start again within a row, as in packed sequences; "
                "merging inside the language model needs one prompt per row"
            )


def cache_in(values: Any) -> Any:
    """The KV cache among a call's keyword arguments or in a model's output; None where there is none.

    transformers 5.24 renames `past_key_values` to `cache`.
    """
    for name in ("cache", "past_key_values"):
        found = values.get(name) if isinstance(values, dict) else getattr(values, name, None)
        if found is not None:
            return found
    return None


def attention_implementation(config: Any) -> str:
    """The name of the attention implementation that a config chooses, or that merging wraps."""
    return (config._attn_implementation or "eager").removeprefix(WRAPPED)


def takes_masks(implementation: str) -> bool:
    """Whether an attention implementation takes additive masks; flash attention takes padding masks only."""
    return "flash" not in implementation


def check_model(model: nn.Module, llm: nn.Module) -> None:
    """Raises ValueError unless tokens can merge inside a model's language model."""
    if not {c.__name__ for c in type(llm).__mro__} & set(CLASSES):
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


def check_attention(llm: nn.Module) -> None:
    """Raises ValueError unless the attention implementation is one whose masks are known."""
    name = attention_implementation(llm.config)
    if name not in MASKED and takes_masks(name):
        raise ValueError(
            f"merging inside the language model cannot build masks for attn_implementation={name!r}; allowed "
            f"are {', '.join(map(repr, MASKED))} and flash attention"
        )
