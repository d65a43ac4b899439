"""The LlavaConfig of an original checkpoint; anything but a LLaVA-1.5 is refused."""

from types import SimpleNamespace
from typing import Any

from llava_pitome.models import original_llava as original
from llava_pitome.saved_config import KEY

TOWERS = ("clip", "clip_vision_model")  # model types that mm_vision_tower may name
PROJECTOR = "mlp2x_gelu"
STRATEGIES = {
    "patch": "default",
    "cls_patch": "full",
}  # by mm_vision_select_feature
OLD_TEXT_KEYS = {"rope_theta", "rope_scaling"}  # which LlamaConfig still reads
NOT_TEXT_KEYS = {"architectures", "dtype", "model_type", "transformers_version", "_name_or_path"}
ALLOWED = f"allowed is LLaVA-1.5: {original.MODEL} with a CLIP tower and mm_projector_type={PROJECTOR!r}"


def is_original(raw: dict[str, Any]) -> bool:
    """Whether a config.json is that of an original checkpoint, supported or not."""
    return "mm_vision_tower" in raw or original.MODEL in (raw.get("architectures") or ())


def read_raw_config(key: str, path: str, hub: dict[str, Any]) -> dict[str, Any]:
    """The contents of a model's config.json.

    Args:
        key: the option that names the model, for the error message.
        path: a folder or hub id.
        hub: hub arguments: revision, token, cache_dir, ...

    Raises:
        ValueError: there is no such model.
    """
    from transformers import PreTrainedConfig

    try:
        return PreTrainedConfig.get_config_dict(path, **hub)[0]
    except OSError as error:
        raise ValueError(
            f"{key}={path!r} is neither a folder with a model nor a model on the hub: {error}"
        ) from error


def convert_config(raw: dict[str, Any], tower_hub: dict[str, Any]) -> Any:
    """The LlavaConfig of an original config.json, with the original's vocabulary size.

    Args:
        raw: the contents of config.json.
        tower_hub: hub arguments for the vision tower's config: token, cache_dir, ...

    Raises:
        ValueError: an unsupported kind of LLaVA, or a vision tower that does not exist or is not a CLIP.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    _check(raw)
    _check_tower(raw["mm_vision_tower"], tower_hub)
    vision = CLIPVisionConfig.from_pretrained(raw["mm_vision_tower"], **tower_hub)
    text_keys = (set(LlamaConfig().to_dict()) | OLD_TEXT_KEYS) - NOT_TEXT_KEYS
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**{k: v for k, v in raw.items() if k in text_keys}),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        projector_hidden_act="gelu",
        vision_feature_select_strategy=STRATEGIES[raw.get("mm_vision_select_feature", "patch")],
        vision_feature_layer=raw["mm_vision_select_layer"],
        dtype=raw.get("dtype") or raw.get("torch_dtype"),
    )
    if KEY in raw:
        setattr(config, KEY, raw[KEY])
    return config


def _check(raw: dict[str, Any]) -> None:
    """Raises ValueError for anything but a LLaVA-1.5."""
    classes = raw.get("architectures") or [raw.get("model_type")]
    if original.MODEL not in classes and classes != ["llava_llama"]:
        raise ValueError(f"architectures={classes!r} is not supported; {ALLOWED}")
    original.check_layout(SimpleNamespace(**raw))
    projector = raw.get("mm_projector_type", "linear")
    if projector != PROJECTOR:
        raise ValueError(f"mm_projector_type={projector!r} is not supported; {ALLOWED}")
    for name in ("mm_use_im_start_end", "s2"):
        if raw.get(name):
            raise ValueError(f"{name}={raw[name]!r} is not supported; {ALLOWED}, without {name}")
    feature = raw.get("mm_vision_select_feature", "patch")
    if feature not in STRATEGIES:
        allowed = ", ".join(map(repr, STRATEGIES))
        raise ValueError(f"mm_vision_select_feature={feature!r} is unknown; allowed are {allowed}")
    for name, kind in {"mm_vision_tower": str, "mm_vision_select_layer": int}.items():
        if not isinstance(raw.get(name), kind):
            raise ValueError(f"{name}={raw.get(name)!r} is not allowed: its type must be {kind.__name__}")


def _check_tower(name: str, hub: dict[str, Any]) -> None:
    """Raises ValueError where `mm_vision_tower` is not a CLIP."""
    kind = read_raw_config("mm_vision_tower", name, hub).get("model_type")
    if kind not in TOWERS:
        raise ValueError(
            f"mm_vision_tower={name!r} holds a model of type {kind!r}; allowed are "
            f"{', '.join(map(repr, TOWERS))}"
        )
