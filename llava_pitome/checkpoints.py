"""LLaVA checkpoints: loading them, and what their configs say without their weights."""

from typing import Any

from torch import nn

from llava_pitome import adapters, embedded, llava

TOWERS = ("clip_vision_model", "siglip_vision_model")  # model types of the towers that are supported
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("4bit", "8bit")
HUB = (
    "revision",
    "token",
    "cache_dir",
    "subfolder",
    "local_files_only",
    "force_download",
)  # where files come from
SHARED = ("token", "cache_dir", "local_files_only", "force_download")  # by an adapter and its model


def load(path: str, quantization: str | None, **options: Any) -> tuple[nn.Module, Any]:
    """The model and processor of a checkpoint or hub id, ready for batched generation, not merging.

    Raises:
        ValueError: an unknown quantization, or a checkpoint that is no LLaVA.
    """
    from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration

    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ValueError(
            f"quantization={quantization!r} is unknown; allowed are {', '.join(QUANTIZATIONS)}, or none"
        )
    hub = {k: v for k, v in options.items() if k in HUB}
    given, path = path, whole(path, hub)
    adapted = given not in (path, embedded.NAME)
    own = hub
    if adapted:  # a revision is the adapter's
        hub = {k: v for k, v in hub.items() if k in SHARED}
        options = {k: v for k, v in options.items() if k not in HUB} | hub
    config = AutoConfig.from_pretrained(path, **hub)
    if config.model_type != "llava":
        raise ValueError(f"{path} holds a model of type {config.model_type!r}. Supported: {llava.SUPPORTED}.")
    options["dtype"] = _dtype(options.get("dtype"), config)
    if quantization is not None:
        options |= _quantized(quantization, options)
    model = LlavaForConditionalGeneration.from_pretrained(path, **options)
    processor = AutoProcessor.from_pretrained(path, **hub)
    processor.tokenizer.padding_side = "left"  # generate continues at the right end of every row
    if adapted:
        model = _adapted(model, given, own)
    return model.eval(), processor


def whole(path: str, hub: dict[str, Any] | None = None) -> str:
    """The folder or hub id of the whole model that a path means: "embedded", an adapter, or itself."""
    if path != embedded.NAME:
        path = adapters.base(path, **hub or {}) or path
    return str(embedded.PATH) if path == embedded.NAME else path


def _adapted(model: nn.Module, adapter: str, hub: dict[str, Any]) -> nn.Module:
    """A model with an adapter on it, and how that merges in its config."""
    from peft import PeftModel

    merging = adapters.merging(adapter, **hub)
    if merging is not None:
        model.config.token_merging = merging
    return PeftModel.from_pretrained(model, adapter, **hub)


def counts(path: str) -> tuple[int, int]:
    """Patches of an image, and layers that may merge, from a checkpoint's config alone.

    Raises:
        ValueError: the path is no LLaVA.
    """
    config = configuration(path)
    vision = config.vision_config if config.model_type == "llava" else config
    if config.model_type != "llava" or vision.model_type not in TOWERS:
        what = f"a model of type {config.model_type!r}" + (
            f" with a {vision.model_type!r}" if vision is not config else ""
        )
        raise ValueError(f"{whole(path)} holds {what}. Supported: {llava.SUPPORTED}.")
    layers = llava.feature_layers(config.vision_feature_layer, vision.num_hidden_layers)
    return (vision.image_size // vision.patch_size) ** 2, layers


def configuration(path: str) -> Any:
    """The transformers config of the whole model that a path means.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoConfig

    path = whole(path)
    try:
        return AutoConfig.from_pretrained(path)
    except OSError as error:
        raise ValueError(
            f"model={path!r} is neither a folder with a model nor a model on the hub: {error}"
        ) from error


def _dtype(wanted: Any, config: Any) -> Any:
    """As saved where nothing is asked for; but float16 becomes bfloat16 on CPUs, which are too slow at it."""
    import torch

    if wanted not in (None, "auto"):
        return getattr(torch, wanted) if isinstance(wanted, str) else wanted
    half = str(config.dtype).endswith("float16") and not str(config.dtype).endswith("bfloat16")
    return torch.bfloat16 if half and not torch.cuda.is_available() else "auto"


def _quantized(quantization: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options that load the language model in 4 or 8 bits; tower, projector and head stay as they are."""
    import torch
    from transformers import BitsAndBytesConfig

    keep = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    if quantization == "8bit":
        scheme = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)
    else:
        compute = options["dtype"] if options["dtype"] != "auto" else torch.bfloat16
        scheme = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=compute,
            llm_int8_skip_modules=keep,
        )
    place = options.get("device_map") or ("auto" if torch.cuda.is_available() else "cpu")
    return {"quantization_config": scheme, "device_map": place}
