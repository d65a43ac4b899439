"""LLaVA checkpoints: loading them, and what their configs say without their weights."""

from typing import Any

from torch import nn

from llava_pitome import embedded
from llava_pitome.models import adapters, conversion
from llava_pitome.models import hf_llava as llava

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
SHARED = ("token", "cache_dir", "local_files_only", "force_download")  # by an adapter, its model, its tower


def load(path: str, quantization: str | None, **options: Any) -> tuple[nn.Module, Any]:
    """The model and processor of a checkpoint or hub id, ready for batched generation, not merging.

    Raises:
        ValueError: an unknown quantization, or a checkpoint that is no LLaVA.
    """
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ValueError(
            f"quantization={quantization!r} is unknown; allowed are {', '.join(QUANTIZATIONS)}, or none"
        )
    hub = {k: v for k, v in options.items() if k in HUB}
    given, path = path, whole(path, hub)
    adapted = given not in (path, embedded.NAME)
    own = hub
    if adapted:  # a revision is the adapter's
        import peft  # noqa: F401  # that it is missing is known before weights are read

        hub = _shared(hub)
        options = {k: v for k, v in options.items() if k not in HUB} | hub
    config, raw = _read(path, hub)
    options["dtype"] = _dtype(options.get("dtype"), config)
    if quantization is not None:
        options |= _quantized(quantization, options)
    model, processor = _whole_model(path, raw, hub, options)
    processor.tokenizer.padding_side = "left"  # generate continues at the right end of every row
    if adapted:
        model = _adapted(model, given, own)
    return model.eval(), processor


def _whole_model(
    path: str, raw: dict[str, Any] | None, hub: dict[str, Any], options: dict[str, Any]
) -> tuple[nn.Module, Any]:
    """A model and its processor; `raw` is the config.json of an original checkpoint."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    if raw is not None:
        options = {k: v for k, v in options.items() if k not in HUB}
        return conversion.load(path, raw, hub, _shared(hub), **options)
    model = LlavaForConditionalGeneration.from_pretrained(path, **options)
    return model, AutoProcessor.from_pretrained(path, **hub)


def convert(path: str, dtype: str) -> tuple[nn.Module, Any]:
    """The model and processor of an original checkpoint.

    Args:
        path: its folder or hub id.
        dtype: of the weights, a name in DTYPES; "auto" is the one that they were saved in, on CPUs too.

    Raises:
        ValueError: the path is not there, or holds no checkpoint of the original package.
    """
    config, raw = _reached(path)
    if raw is None:
        raise ValueError(f"{path} holds a model of type {config.model_type!r}, not of the original package")
    return conversion.load(path, raw, {}, {}, dtype=dtype if dtype == "auto" else _dtype(dtype, config))


def config_of(path: str, **hub: Any) -> Any:
    """The LlavaConfig of a folder or hub id, also of the original package.

    Raises:
        ValueError: a checkpoint that is no LLaVA, or of a kind that is not supported.
    """
    return _read(path, hub)[0]


def _read(path: str, hub: dict[str, Any]) -> tuple[Any, dict[str, Any] | None]:
    """The LlavaConfig of a checkpoint and, where it is of the original package, its config.json."""
    from transformers import AutoConfig, PreTrainedConfig

    raw, _ = PreTrainedConfig.get_config_dict(path, **hub)
    if conversion.is_original(raw):
        return conversion.config(raw, _shared(hub)), raw
    config = AutoConfig.from_pretrained(path, **hub)
    if config.model_type != "llava":
        raise ValueError(f"{path} holds a model of type {config.model_type!r}. Supported: {llava.SUPPORTED}.")
    return config, None


def _shared(hub: dict[str, Any]) -> dict[str, Any]:
    """Where files of another model come from than the one that was asked for."""
    return {k: v for k, v in hub.items() if k in SHARED}


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
    vision = config.vision_config
    if vision.model_type not in TOWERS:
        raise ValueError(
            f"{whole(path)} holds a model of type {config.model_type!r} with a {vision.model_type!r}. "
            f"Supported: {llava.SUPPORTED}."
        )
    layers = llava.feature_layers(config.vision_feature_layer, vision.num_hidden_layers)
    return (vision.image_size // vision.patch_size) ** 2, layers


def configuration(path: str) -> Any:
    """The LlavaConfig of the whole model that a path means, also of the original package.

    Raises:
        ValueError: there is none, or it is no LLaVA.
    """
    return _reached(whole(path))[0]


def is_original(path: str) -> bool:
    """Whether a checkpoint is one of the original package."""
    return _reached(whole(path))[1] is not None


def merging(path: str) -> dict[str, Any] | None:
    """How a checkpoint or adapter was saved to merge, as a config's dict; None where it was not."""
    found = None if path == embedded.NAME else adapters.merging(path)
    return found or getattr(configuration(path), "token_merging", None)


def _reached(path: str) -> tuple[Any, dict[str, Any] | None]:
    """As `_read`, with a ValueError where the path leads nowhere."""
    try:
        return _read(path, {})
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
