"""LLaVA checkpoints: loading them, and what their configs say without reading weights.

A path is "embedded" or "embedded-next" (the models in this package), or a folder or hub id of a LLaVA, of an
adapter of one, or of an original checkpoint.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from llava_pitome import embedded
from llava_pitome.config import MergeConfig
from llava_pitome.models import adapters, conversion
from llava_pitome.models import hf_llava as llava
from llava_pitome.saved_config import KEY

PREFIX_TOKENS = {
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
}  # of supported vision towers
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("4bit", "8bit")
MODELS = {  # by model type
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_next_video": "LlavaNextVideoForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "vipllava": "VipLlavaForConditionalGeneration",
}
SHARED = ("token", "cache_dir", "local_files_only", "force_download")  # hub arguments for every repository
HUB = ("revision", "subfolder", *SHARED)


class VisionCounts(NamedTuple):
    """What a LLaVA's config says about its image tokens.

    Attributes:
        patches: of an image, or of one of its tiles.
        layers: of the vision tower, up to the feature layer, the last one where there are several.
        num_prefix_tokens: before the patches, 0 or 1.
    """

    patches: int
    layers: int
    num_prefix_tokens: int


def load(path: str, quantization: str | None, **options: Any) -> tuple[nn.Module, Any]:
    """The model and processor of a path, ready for batched generation, not merging.

    How it was saved to merge is left out; see `saved_merge_config`.

    Raises:
        ValueError: an unknown quantization, or a path that does not exist, holds no LLaVA, or one without
            its language model head.
    """
    check_quantization(quantization)
    hub = model_hub = _hub(options)
    options = {k: v for k, v in options.items() if k not in HUB} | hub
    base = model_path(path, **hub)
    is_adapter = path not in (base, *embedded.PATHS)
    if is_adapter:
        from peft import PeftModel  # a missing peft raises before weights are read

        model_hub = _shared(hub)  # revision and subfolder are the adapter's
        options = {k: v for k, v in options.items() if k not in HUB} | model_hub
    config, raw = _read_config(base, model_hub)
    headless = MODELS[config.model_type].removesuffix("ForConditionalGeneration") + "Model"
    if headless in (config.architectures or ()):
        raise ValueError(
            f"{base} holds a {headless}, which has no language model head and cannot generate; load it "
            "with AutoModel.from_pretrained, then call apply"
        )
    options["dtype"] = _dtype(options.get("dtype"), config)
    if quantization is not None:
        options |= _quantized(quantization, options)
    if raw is None:
        import transformers

        from llava_pitome.models.video_processor import load_processor

        model = getattr(transformers, MODELS[config.model_type]).from_pretrained(base, **options)
        processor = load_processor(base, config.model_type, **model_hub)
    else:
        options = {k: v for k, v in options.items() if k not in HUB}
        model, processor = conversion.load(base, raw, model_hub, _shared(model_hub), **options)
    processor.tokenizer.padding_side = "left"  # generate appends at the right end of every row
    vars(model.config).pop(KEY, None)
    if is_adapter:
        model = PeftModel.from_pretrained(model, path, **hub)
    return model.eval(), processor


def check_quantization(quantization: str | None) -> None:
    """Raises ValueError for an unknown one."""
    if quantization not in (None, *QUANTIZATIONS):
        raise ValueError(
            f"quantization={quantization!r} is unknown; allowed are {', '.join(QUANTIZATIONS)}, or None"
        )


def convert(path: str, dtype: str) -> tuple[nn.Module, Any]:
    """The model and processor of an original checkpoint.

    Args:
        path: its folder or hub id.
        dtype: of the weights, a name in DTYPES; "auto" is the saved one, on CPUs too.

    Raises:
        ValueError: the path does not exist, or holds no original checkpoint.
    """
    config, raw = _read_config(path, {})
    if raw is None:
        raise ValueError(f"{path} holds a model of type {config.model_type!r}, not of the original package")
    return conversion.load(path, raw, {}, {}, dtype=dtype if dtype == "auto" else getattr(torch, dtype))


def model_path(path: str, **hub: Any) -> str:
    """The folder or hub id of the full model: an embedded one, an adapter's base model, or the path.

    Raises:
        ValueError: it is embedded, and its weights are missing.
    """
    if path not in embedded.PATHS:
        path = adapters.base_model(path, **hub) or path
    return embedded.folder(path) if path in embedded.PATHS else path


def read_config(path: str) -> Any:
    """The config of the full model, a LlavaConfig also for an original checkpoint.

    Raises:
        ValueError: the path does not exist, or holds no LLaVA.
    """
    return _read_config(model_path(path), {})[0]


def is_original(path: str) -> bool:
    """Whether a path holds an original checkpoint."""
    return _read_config(model_path(path), {})[1] is not None


def saved_merge_config(path: str, **options: Any) -> MergeConfig | None:
    """How a checkpoint or adapter was saved to merge; None for a checkpoint that was not.

    Args:
        path: as for `load`.
        **options: as for `load`; of these the hub arguments are used.

    Raises:
        ValueError: an adapter that does not say how it merged, a path that does not exist or holds no LLaVA,
            or a config that cannot be read.
    """
    hub = _hub(options)
    base = model_path(path, **hub)
    if path not in (base, *embedded.PATHS):
        return adapters.merge_config(path, **hub)
    _read_config(base, hub)
    return adapters.merge_config(base, **hub)


def vision_counts(config: Any) -> VisionCounts:
    """The numbers of patches, vision tower layers and class tokens of a LLaVA's config.

    Raises:
        ValueError: the vision tower is not supported, or has no such feature layer.
    """
    vision = config.vision_config
    if vision.model_type not in PREFIX_TOKENS:
        raise ValueError(
            f"a model of type {config.model_type!r} with a {vision.model_type!r} is not supported. "
            f"Supported: {llava.SUPPORTED}."
        )
    layers = max(llava.feature_layers(llava.feature_layer(config), vision.num_hidden_layers))
    return VisionCounts(
        (vision.image_size // vision.patch_size) ** 2, layers, PREFIX_TOKENS[vision.model_type]
    )


def cuts_into_tiles(config: Any) -> bool:
    """Whether a LLaVA's config is of a model that cuts images into tiles."""
    return MODELS[config.model_type] in llava.TILED


def patches_and_layers(path: str) -> tuple[int, int]:
    """Patches of an image or tile, and vision tower layers that may merge, from a checkpoint's config.

    Raises:
        ValueError: as for `read_config` and `vision_counts`.
    """
    return vision_counts(read_config(path))[:2]


def _read_config(path: str, hub: dict[str, Any]) -> tuple[Any, dict[str, Any] | None]:
    """The config of a full model and, of an original checkpoint, its config.json."""
    from transformers import AutoConfig

    raw = conversion.read_raw_config("model", path, hub)
    if conversion.is_original(raw):
        return conversion.convert_config(raw, _shared(hub)), raw
    config = AutoConfig.from_pretrained(path, **hub)
    if config.model_type not in MODELS:
        raise ValueError(f"{path} holds a model of type {config.model_type!r}. Supported: {llava.SUPPORTED}.")
    return config, None


def _hub(options: dict[str, Any]) -> dict[str, Any]:
    """The hub arguments among the options; None stands for one that is not given."""
    return {k: v for k, v in options.items() if k in HUB and v is not None}


def _shared(hub: dict[str, Any]) -> dict[str, Any]:
    """The hub arguments that also hold for another repository: a base model's, a vision tower's."""
    return {k: v for k, v in hub.items() if k in SHARED}


def _dtype(dtype: Any, config: Any) -> Any:
    """The dtype to load in: the saved one by default, but on CPUs, where float16 is slow, bfloat16 for it."""
    if dtype not in (None, "auto"):
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype
    saved_half = str(config.dtype) in ("float16", "torch.float16")
    return torch.bfloat16 if saved_half and not torch.cuda.is_available() else "auto"


def _quantized(quantization: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options that load the language model in 4 or 8 bits, but not vision tower, projector and head."""
    from transformers import BitsAndBytesConfig

    skipped = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    if quantization == "8bit":
        scheme = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    else:
        scheme = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16 if options["dtype"] == "auto" else options["dtype"],
            llm_int8_skip_modules=skipped,
        )
    device_map = options.get("device_map") or ("auto" if torch.cuda.is_available() else "cpu")
    return {"quantization_config": scheme, "device_map": device_map}
