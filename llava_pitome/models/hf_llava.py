"""Where the parts of a LLaVA are: the only file that knows transformers' attribute names.

Those of the original package are in `original`.
"""

from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from llava_pitome.config import MergeConfig
from llava_pitome.models import hf_language_model as language
from llava_pitome.models import original_llava as original
from llava_pitome.models.parts import BlockParts, LlavaParts, ModelParts

SUPPORTED = (
    "LlavaForConditionalGeneration with a CLIPVisionModel or SiglipVisionModel tower (LLaVA-1.5 and kin), "
    "or the original package's LlavaLlamaForCausalLM; also wrapped by peft, torch.compile or "
    "DistributedDataParallel, or such a tower alone"
)
CLASS_TOKENS = {"CLIPVisionModel": 1, "SiglipVisionModel": 0}  # by the tower's class
MASKED = ("sdpa", "eager")  # attention kernels that take an additive mask


def find(model: nn.Module) -> ModelParts:
    """The parts of a LLaVA, or of a vision tower alone, under any wrappers.

    Raises:
        ValueError: the model is not supported, or it reads features from several layers.
    """
    model = unwrap(model)
    whole = _whole(model)
    tower = model if whole is None else unwrap(whole.tower)
    kind = next((c.__name__ for c in type(tower).__mro__ if c.__name__ in CLASS_TOKENS), None)
    if kind is None:
        found = type(model).__name__ + (f" with a {type(tower).__name__} tower" if tower is not model else "")
        raise ValueError(f"{found} is not supported. Supported: {SUPPORTED}.")
    layers = getattr(tower, "vision_model", tower).encoder.layers
    blocks = tuple(_block(layer) for layer in layers)
    feature = len(blocks)
    if whole is not None:
        feature = feature_layers(whole.feature_layer, len(blocks))
    sdpa = partial(_is_sdpa, tower.config)
    size, patch = tower.config.image_size, tower.config.patch_size
    patches, class_tokens = (size // patch) ** 2, CLASS_TOKENS[kind]
    front = class_tokens if whole is not None and whole.first_read else 0
    return ModelParts(model, tower, blocks, feature, class_tokens, patch, patches, sdpa, front, whole)


def _whole(model: nn.Module) -> LlavaParts | None:
    """What a LLaVA has around its tower; None for other models."""
    names = [c.__name__ for c in type(model).__mro__]
    if original.MODEL in names:
        return original.llava_parts(model)
    if "LlavaForConditionalGeneration" not in names:
        return None
    inner, config = model.model, model.config
    return LlavaParts(
        tower=inner.vision_tower,
        feature_layer=config.vision_feature_layer,
        first_read=config.vision_feature_select_strategy == "full",
        projector=inner.multi_modal_projector,
        llm=inner.language_model,
        outer=inner,
        image_token=config.image_token_id,
    )


def _is_sdpa(config: Any) -> bool:
    return config._attn_implementation == "sdpa"


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DistributedDataParallel and peft wrappers.

    Raises:
        ValueError: DataParallel, whose threads would share what the hooks remember.
    """
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, nn.DataParallel):
            raise ValueError(
                "DataParallel is not supported: its threads share one set of hooks; use one process a GPU"
            )
        else:
            return model


def check(parts: ModelParts, config: MergeConfig) -> None:
    """Raises ValueError where the model cannot do what the config asks."""
    tokens = config.tokens_at(parts.patches, parts.feature)
    kernel = parts.tower.config._attn_implementation
    if config.proportional and config.merges_in_tower and kernel not in MASKED:
        raise ValueError(
            f"proportional attention adds a bias to the scores, which attn_implementation={kernel!r} cannot "
            f"take; load the model with {' or '.join(map(repr, MASKED))}, or set proportional=False"
        )
    inside = config.decoder or config.reaches_llm
    if parts.whole is None:
        if inside or config.merges_in_prefix:
            raise ValueError("a vision tower alone has no projector and no language model to merge in")
        return
    check_front(config, parts.whole.first_read, parts.class_tokens)
    if not inside:
        return
    llm = parts.whole.llm
    config.llm_lengths(tokens, llm.config.num_hidden_layers)
    language.check_kernel(llm)
    language.check_model(parts.model, llm)


def check_front(config: MergeConfig, first_read: bool, class_tokens: int) -> None:
    """Raises ValueError where a model that drops a tower's first token drops one that is to merge."""
    behind = config.decoder or config.reaches_llm or config.merges_in_prefix
    if behind and not first_read and not class_tokens:
        raise ValueError(
            "vision_feature_select_strategy='default' drops the first patch of a tower without class token; "
            "set it to 'full', in the processor too, to merge behind the tower"
        )


def _block(layer: nn.Module) -> BlockParts:
    a = layer.self_attn
    heads = a.num_heads
    return BlockParts(
        layer, a, a.q_proj, a.k_proj, a.v_proj, a.out_proj, heads, heads, layer.layer_norm2, layer.mlp
    )


def feature_layers(index: int | list[int], count: int) -> int:
    """Blocks in front of hidden_states[index], of which the first is the embeddings."""
    if not isinstance(index, int):
        raise ValueError(
            f"vision_feature_layer={index!r} joins several layers, whose lengths differ once tokens merge; "
            "allowed is a single layer"
        )
    feature = index if index >= 0 else count + 1 + index
    if not 1 <= feature <= count:
        raise ValueError(
            f"vision_feature_layer={index} is not allowed: the tower has {count} layers, "
            f"so it must be in 1 to {count} or in {-count} to -1"
        )
    return feature


def stages(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a LLaVA that an answer passes through, one after the other."""
    parts = find(model)
    return {"tower": parts.tower, "projector": parts.whole.projector, "llm": parts.whole.llm}


def encode(model: nn.Module, pixels: Tensor) -> None:
    """Sends pictures (I, 3, H, W) through tower and projector, for what hooks see of it."""
    model = unwrap(model)
    model.model.get_image_features(pixel_values=pixels.to(model.device, model.dtype))


def cached(cache: Any) -> list[Tensor]:
    """The keys and values (B, H, T, C) that a KV cache holds, layer by layer."""
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


class Shapes(NamedTuple):
    """The sizes that decide what a LLaVA costs.

    Attributes:
        class_tokens: tokens in front of the patches.
        patch_inputs: numbers in one patch: colours x pixels.
        tower_layers: blocks of the tower, those behind the feature layer included.
        tower_width: channels of the tower.
        tower_mlp: channels inside its MLPs.
        llm_layers: blocks of the language model.
        llm_width: its channels.
        llm_kv: channels of its keys, over all heads.
        llm_mlp: channels inside its MLPs.
        vocabulary: tokens it can say.
    """

    class_tokens: int
    patch_inputs: int
    tower_layers: int
    tower_width: int
    tower_mlp: int
    llm_layers: int
    llm_width: int
    llm_kv: int
    llm_mlp: int
    vocabulary: int


def shapes(model: nn.Module) -> Shapes:
    """The sizes of a LLaVA, from its config."""
    parts = find(model)
    vision, text = parts.tower.config, parts.whole.llm.config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shapes(
        parts.class_tokens, 3 * parts.patch_size**2, vision.num_hidden_layers, vision.hidden_size,
        vision.intermediate_size, text.num_hidden_layers, text.hidden_size, head * text.num_key_value_heads,
        text.intermediate_size, text.vocab_size,
    )  # fmt: skip
