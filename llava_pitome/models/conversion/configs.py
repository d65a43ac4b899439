"""The config of an original checkpoint as the Hugging Face class has it; what is no LLaVA-1.5 is refused."""

from types import SimpleNamespace
from typing import Any

from llava_pitome.models import original_llava as original

TOWERS = ("clip", "clip_vision_model")  # model types of what mm_vision_tower may name
PROJECTOR = "mlp2x_gelu"
STRATEGIES = {"patch": "default", "cls_patch": "full"}  # by mm_vision_select_feature
OLD = {"rope_theta", "rope_scaling"}  # which transformers reads beside the fields of its own
NOT_TEXT = {"architectures", "dtype", "model_type", "transformers_version", "_name_or_path"}
ALLOWED = f"allowed is LLaVA-1.5: {original.MODEL} with a CLIP tower and mm_projector_type={PROJECTOR!r}"


def is_original(raw: dict[str, Any]) -> bool:
    """Whether a config.json is of the original package, of any kind."""
    return "mm_vision_tower" in raw or original.MODEL in (raw.get("architectures") or ())


def config(raw: dict[str, Any], hub: dict[str, Any]) -> Any:
    """The LlavaConfig of an original config.json; its vocabulary is the original's.

    Args:
        raw: what config.json holds.
        hub: where the tower's config comes from: token, ...

    Raises:
        ValueError: a kind that is not supported, or a tower that is not there.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    _check(raw)
    vision = CLIPVisionConfig.from_pretrained(_tower(raw["mm_vision_tower"], hub), **hub)
    known = (set(LlamaConfig().to_dict()) | OLD) - NOT_TEXT
    text = LlamaConfig(**{k: v for k, v in raw.items() if k in known})
    made = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        projector_hidden_act="gelu",
        vision_feature_select_strategy=STRATEGIES[raw.get("mm_vision_select_feature", "patch")],
        vision_feature_layer=raw["mm_vision_select_layer"],
        dtype=raw.get("dtype") or raw.get("torch_dtype"),
    )
    if "token_merging" in raw:
        made.token_merging = raw["token_merging"]
    return made


def _check(raw: dict[str, Any]) -> None:
    """Raises ValueError for what is no LLaVA-1.5."""
    kinds = raw.get("architectures") or [raw.get("model_type")]
    if original.MODEL not in kinds and kinds != ["llava_llama"]:
        raise ValueError(f"architectures={kinds!r} is not supported; {ALLOWED}")
    original.check_layout(SimpleNamespace(**raw))
    projector = raw.get("mm_projector_type", "linear")
    if projector != PROJECTOR:
        raise ValueError(f"mm_projector_type={projector!r} is not supported; {ALLOWED}")
    for name in ("mm_use_im_start_end", "s2"):
        if raw.get(name):
            raise ValueError(f"{name}={raw[name]!r} is not supported; {ALLOWED}, without {name}")
    feature = raw.get("mm_vision_select_feature", "patch")
    if feature not in STRATEGIES:
        raise ValueError(
            f"mm_vision_select_feature={feature!r} is unknown; allowed are {', '.join(map(repr, STRATEGIES))}"
        )
    for name, kind in {"mm_vision_tower": str, "mm_vision_select_layer": int}.items():
        if not isinstance(raw.get(name), kind):
            raise ValueError(f"{name}={raw.get(name)!r} is not allowed: it must be a {kind.__name__}")


def _tower(name: str, hub: dict[str, Any]) -> str:
    """The same name, if it is a CLIP's."""
    from transformers import PreTrainedConfig

    try:
        found, _ = PreTrainedConfig.get_config_dict(name, **hub)
    except OSError as error:
        raise ValueError(
            f"mm_vision_tower={name!r} is neither a folder with a model nor a model on the hub: {error}"
        ) from error
    if found.get("model_type") not in TOWERS:
        raise ValueError(
            f"mm_vision_tower={name!r} holds a model of type {found.get('model_type')!r}; allowed are "
            f"{', '.join(map(repr, TOWERS))}"
        )
    return name
