"""LLaVA in transformers: where the parts of its models are, and which configs they support."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from llava_pitome.models import (
    llava_next,
    llava_next_video,
    llava_onevision,
    original_llava,
)
from llava_pitome.models.parts import BlockParts, LlavaParts, ModelParts, trained_copies, without_wrapper

SUPPORTED = (
    "LlavaForConditionalGeneration (LLaVA-1.5 and kin), VipLlavaForConditionalGeneration, "
    "LlavaNextForConditionalGeneration, LlavaNextVideoForConditionalGeneration or "
    "LlavaOnevisionForConditionalGeneration, or one of these without its head (LlavaModel, ...), with a "
    "CLIPVisionModel or SiglipVisionModel tower and features of one or several of its layers; the original "
    "package's LlavaLlamaForCausalLM; also wrapped by peft, torch.compile, DataParallel or "
    "DistributedDataParallel; or such a tower alone or in a "
    "CLIPVisionModelWithProjection, CLIPModel or SiglipModel"
)
# By a tower's class: its class tokens, and whether its attention passes keyword arguments on.
TOWERS = {"CLIPVisionModel": (1, True), "SiglipVisionModel": (0, False)}
LLAVA = ("LlavaForConditionalGeneration", "LlavaModel")
VIP_LLAVAS = ("VipLlavaForConditionalGeneration", "VipLlavaModel")  # never read the first token
FAMILIES = (llava_next, llava_next_video, llava_onevision)  # that cut images into tiles
TILED = {name: family for family in FAMILIES for name in family.CLASSES}
LLAVAS = (*LLAVA, *VIP_LLAVAS, *TILED)
HEADLESS = tuple(name for name in LLAVAS if name.endswith("Model"))  # without a language modeling head
AROUND_TOWER = ("CLIPVisionModelWithProjection", "CLIPModel", "SiglipModel")  # their tower is `vision_model`


class UnsupportedModelError(ValueError):
    """The model is of a kind whose tokens this package cannot merge."""


def find(model: nn.Module) -> ModelParts:
    """The parts of a LLaVA, or of a vision tower without a LLaVA, without any wrappers.

    Raises:
        UnsupportedModelError: the model is not supported.
        ValueError: it reads features from a layer that its tower does not have.
    """
    model = unwrap(model)
    llava = _llava(model)
    tower = _tower_alone(model) if llava is None else unwrap(llava.tower)
    parts = _parts(model, llava, tower)
    if llava is None:
        return parts
    others = [unwrap(copied) for copied in trained_copies(llava.tower)]
    return parts._replace(
        other_towers=tuple(_parts(model, llava, other) for other in others if other is not tower)
    )


def _parts(model: nn.Module, llava: LlavaParts | None, tower: nn.Module) -> ModelParts:
    """The parts of a model with one of the copies of its vision tower."""
    kind = next((c.__name__ for c in type(tower).__mro__ if c.__name__ in TOWERS), None)
    if kind is None:
        found = type(model).__name__ + (f" with a {type(tower).__name__} tower" if tower is not model else "")
        raise UnsupportedModelError(f"{found} is not supported. Supported: {SUPPORTED}.")
    layers = [without_wrapper(x) for x in getattr(tower, "vision_model", tower).encoder.layers]
    num_prefix, passes_kwargs = TOWERS[kind]
    size, patch = tower.config.image_size, tower.config.patch_size
    return ModelParts(
        model=model,
        tower=tower,
        blocks=tuple(BlockParts(x, x.self_attn, x.layer_norm2, x.mlp) for x in layers),
        feature_layers=feature_layers(-1 if llava is None else llava.feature_layer, len(layers)),
        num_prefix_tokens=num_prefix,
        num_feature_prefix_tokens=num_prefix if llava is not None and llava.reads_first_token else 0,
        patch_size=patch,
        patches=(size // patch) ** 2,
        passes_kwargs=passes_kwargs,
        llava=llava,
    )


def _tower_alone(model: nn.Module) -> nn.Module:
    """The vision tower of a model that is no LLaVA: the model itself, or its `vision_model`."""
    is_around = any(c.__name__ in AROUND_TOWER for c in type(model).__mro__)
    return unwrap(model.vision_model) if is_around else model


def _llava(model: nn.Module) -> LlavaParts | None:
    """The parts of a LLaVA around its tower; None for other models."""
    names = [c.__name__ for c in type(model).__mro__]
    if original_llava.MODEL in names:
        return original_llava.llava_parts(model)
    if not set(LLAVAS) & set(names):
        return None
    inner, config, is_vip = getattr(model, "model", model), model.config, bool(set(VIP_LLAVAS) & set(names))
    family = next((TILED[name] for name in names if name in TILED), None)
    return LlavaParts(
        tower=inner.vision_tower,
        feature_layer=feature_layer(config),
        reads_first_token=not is_vip and config.vision_feature_select_strategy == "full",
        projector=inner.multi_modal_projector,
        llm=inner.language_model,
        multimodal=inner,
        image_token=config.image_token_id,
        video_token=getattr(config, "video_token_id", None),
        tiling=None if family is None else family.tiling(config),
        pooling=getattr(inner, "vision_resampler", None),
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DistributedDataParallel, DataParallel and peft wrappers."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(model, parallel):
            model = model.module
        elif isinstance(getattr(model, "modules_to_save", None), nn.ModuleDict):  # peft's trained copies
            active = model.active_adapters
            model = model.modules_to_save[active[0]] if active else model.original_module
        else:
            return model


def is_supported(module: nn.Module) -> bool:
    """Whether `find` knows the class of a module without wrappers."""
    names = {c.__name__ for c in type(module).__mro__}
    return bool(names & {original_llava.MODEL, *LLAVAS, *AROUND_TOWER, *TOWERS})


def vision_tower(model: nn.Module) -> nn.Module | None:
    """The vision tower of a model, whether its tokens can merge or not; None where `find` knows no tower."""
    model = unwrap(model)
    if not is_supported(model):
        return None
    names = {c.__name__ for c in type(model).__mro__}
    if original_llava.MODEL in names:
        around = model.get_vision_tower()
        return None if around is None or not around.is_loaded else around.vision_tower
    inner = getattr(model, "model", model)
    return unwrap(inner.vision_tower) if names & set(LLAVAS) else _tower_alone(model)


def feature_layer(config: Any) -> int | Sequence[int]:
    """The index, or indices, of the hidden states that a LLaVA's config names as features."""
    old = "vision_feature_layers"  # VipLlavaConfig's name in transformers before 5.23
    is_old = config.model_type == "vipllava" and hasattr(config, old)
    return getattr(config, old) if is_old else config.vision_feature_layer


def feature_layers(index: int | Sequence[int], count: int) -> tuple[int, ...]:
    """Blocks before each hidden_states[index], of which the first is the embeddings.

    Raises:
        ValueError: no layer, one that the tower does not have, or the embeddings alone.
    """
    several = isinstance(index, list | tuple)
    given = tuple(index) if several else (index,)
    if not given or not all(isinstance(i, int) for i in given):
        raise ValueError(
            f"vision_feature_layer={index!r} is not allowed: it must be a layer's index, or a list of them"
        )
    found = tuple(i if i >= 0 else count + 1 + i for i in given)
    if several and not all(0 <= i <= count for i in found):
        raise ValueError(
            f"vision_feature_layer={index!r} is not allowed: the tower has {count} layers, so each must be "
            f"in 0 (the embeddings) to {count} or in {-count - 1} to -1"
        )
    if not 1 <= max(found) <= count:
        raise ValueError(
            f"vision_feature_layer={index!r} is not allowed: the tower has {count} layers, "
            f"so it must be in 1 to {count} or in {-count} to -1"
        )
    return found


def stages(model: nn.Module) -> dict[str, nn.Module]:
    """The vision tower, projector and language model of a LLaVA, in the order in which data passes them."""
    parts = find(model)
    return {"tower": parts.tower, "projector": parts.llava.projector, "llm": parts.llava.llm}


def encode(model: nn.Module, pixels: Tensor, **sizes: Any) -> None:
    """Sends images (I, 3, H, W) through tower and projector; tiles (I, T, 3, H, W) with `image_sizes`."""
    model = unwrap(model)
    inner, pixels = getattr(model, "model", model), pixels.to(model.device, model.dtype)
    inner.get_image_features(pixel_values=pixels, **sizes)


def encode_video(model: nn.Module, pixels: Tensor) -> None:
    """Sends videos (V, F, 3, H, W) through tower and projector."""
    model = unwrap(model)
    inner = getattr(model, "model", model)
    inner.get_video_features(pixels.to(model.device, model.dtype))


def cached(cache: Any) -> list[Tensor]:
    """The keys and values (B, H, T, C) that a KV cache holds, layer by layer."""
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


class Shapes(NamedTuple):
    """The sizes that decide what a LLaVA costs.

    Attributes:
        num_prefix_tokens: tokens before the patches.
        patch_inputs: values in one patch: channels x pixels.
        tower_layers: blocks of the tower, those after the feature layer included.
        tower_width: channels of the tower.
        tower_mlp: channels inside its MLPs.
        features: channels that the projector is given, those of all feature layers.
        llm_layers: blocks of the language model.
        llm_width: its channels.
        llm_kv: channels of its keys, over all heads.
        llm_mlp: channels inside its MLPs.
        vocabulary: size of its vocabulary; 0 where the model has no head.
    """

    num_prefix_tokens: int
    patch_inputs: int
    tower_layers: int
    tower_width: int
    tower_mlp: int
    features: int
    llm_layers: int
    llm_width: int
    llm_kv: int
    llm_mlp: int
    vocabulary: int


def shapes(model: nn.Module) -> Shapes:
    """The sizes of a LLaVA, from its config."""
    parts = find(model)
    vision, text = parts.tower.config, parts.llava.llm.config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shapes(
        parts.num_prefix_tokens, 3 * parts.patch_size**2, vision.num_hidden_layers, vision.hidden_size,
        vision.intermediate_size, len(parts.feature_layers) * vision.hidden_size,
        text.num_hidden_layers, text.hidden_size, head * text.num_key_value_heads,
        text.intermediate_size, text.vocab_size if hasattr(parts.model, "lm_head") else 0,
    )  # fmt: skip
