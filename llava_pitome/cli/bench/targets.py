"""Models to benchmark: real shapes with random weights, which need no download, or any checkpoint.

Speed depends on shapes alone: how many tokens merge follows from the config, whatever the weights are.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llava_pitome import embedded
from llava_pitome.image_layout import ImageLayout
from llava_pitome.models import checkpoints
from llava_pitome.models import hf_llava as llava

LLM_LAYERS = {
    "tower": 1, "llava-7b-2layer": 2, "llava-7b": 32, "next-7b-2layer": 2, "next-7b": 32,
    "onevision-7b-2layer": 2, "onevision-7b": 28,
}  # fmt: skip
NAMED_TARGETS = tuple(LLM_LAYERS)
LLAVA_TARGETS = NAMED_TARGETS[1:3]  # LLaVA-1.5 with a language model of real shapes
TILED_TARGETS = NAMED_TARGETS[3:]  # models that cut images into tiles
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
          "projection_dim": 768}  # fmt: skip
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32064}
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16,
          "image_size": 384, "vision_use_head": False}  # fmt: skip
QWEN2_7B = {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152000}  # fmt: skip
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 128}
PATCH, PATCHES, IMAGE_TOKEN, VIDEO_TOKEN = 14, 576, 100, 101
CLIP_SIDE = 336  # pixels of an image, or a tile
SIZE = (672, 672)  # height and width of an image that is cut into tiles
STD = 0.02  # of random weights


class Target(NamedTuple):
    """A model to benchmark.

    Attributes:
        name: a name in NAMED_TARGETS, "embedded", a folder or a hub id.
        model: a LLaVA, in inference mode.
        generates: whether answers are timed; otherwise the vision tower alone is.
        patches: patches of an image, those of all its tiles together.
        size: height and width of an image in pixels, where the model cuts images into tiles.
        layout: of such an image.
    """

    name: str
    model: nn.Module
    generates: bool
    patches: int
    size: tuple[int, int] | None = None
    layout: ImageLayout | None = None


def build(
    name: str,
    dtype: torch.dtype,
    device: str,
    patches: int | None = None,
    size: tuple[int, int] | None = None,
    shares_layers: bool = False,
) -> Target:
    """Returns the target of a name.

    Args:
        name: "tower" is CLIP ViT-L/14; "llava-7b" LLaVA-1.5-7B (13.5 GB in bfloat16), "next-7b" LLaVA-NeXT-7B
            with Vicuna (13.5 GB), "onevision-7b" LLaVA-OneVision-7B (16 GB); "-2layer" the same with two of
            their language layers; else "embedded", a folder or a hub id.
        dtype: of the weights.
        device: where they are.
        patches: patches of an image, a square number; None: 576. Named targets of one tile only.
        size: height and width of an image in pixels, for models that cut images into tiles; None: 672 x 672,
            for a checkpoint the nominal size of its tiling.
        shares_layers: whether the language model's layers share one layer's weights, which then take little
            memory. Named targets only.

    Raises:
        ValueError: `patches` is no square number, or an argument is set for a target that it is not for; the
            checkpoint does not exist or is no LLaVA.
    """
    one_tile = [other for other in NAMED_TARGETS if other not in TILED_TARGETS]
    if patches is not None and name not in one_tile:
        raise ValueError(f"patches={patches} is for {', '.join(one_tile)}; {name!r} has its own image size")
    if name not in NAMED_TARGETS:
        if shares_layers:
            raise ValueError(
                f"shared layers are for {', '.join(NAMED_TARGETS)}; {name!r} has its own weights"
            )
        checkpoints.patches_and_layers(name)  # a clear error for a path without a model
        model, _ = checkpoints.load(name, None, dtype=dtype)
        return target_of(name, model.to(device), size)
    patches = PATCHES if patches is None else patches
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"patches={patches} is not allowed: it must be a square number, as 196, 576, 2304")
    model = _random_model(_config(name, side * PATCH), dtype, device, shares_layers)
    size = SIZE if size is None and name in TILED_TARGETS else size
    return target_of(name, model, size)._replace(generates=name != "tower")


def target_of(name: str, model: nn.Module, size: tuple[int, int] | None = None) -> Target:
    """Returns a model as a target that generates; `size` as for `build`.

    Raises:
        ValueError: `size` is set for a model whose images are one tile, or an image of it does not fit.
    """
    parts = llava.find(model)
    tiling = parts.llava.tiling
    if tiling is None:
        if size is not None:
            raise ValueError(
                f"an image size of {size[0]}x{size[1]} is for models that cut images into tiles "
                f"({', '.join(TILED_TARGETS)}); {name!r} takes images of one size"
            )
        return Target(name, model, True, parts.patches)
    size = tiling.nominal_size if size is None else size
    layout = tiling.image(*size)
    return Target(name, model, True, layout.tiles * parts.patches, size, layout)


def make_inputs(target: Target, batch: int, tokens: int, text: int) -> dict[str, Tensor]:
    """Returns a batch of prompts with one image each: `tokens` placeholders and `text` further tokens.

    Returns:
        pixel_values (B, 3, height, width), or (B, tiles, 3, height, width) and image_sizes (B, 2) where the
        model cuts images into tiles, input_ids and attention_mask (B, tokens + text).
    """
    model, layout = target.model, target.layout
    generator = torch.Generator("cpu").manual_seed(0)
    parts = llava.find(model)
    is_tiled = layout is not None
    side = parts.llava.tiling.tile if is_tiled else math.isqrt(target.patches) * parts.patch_size
    image, vocabulary = model.config.image_token_id, model.config.text_config.vocab_size
    words = torch.arange(vocabulary, device="cpu")
    words = words[(words != image) & (words != (getattr(model.config, "video_token_id", None) or image))]
    words = words[torch.randint(0, len(words), (batch, text), generator=generator, device="cpu")]
    images = torch.full((batch, tokens), image, device="cpu")
    ids = torch.cat([words[:, :1], images, words[:, 1:]], 1).to(model.device)
    tiles = (layout.tiles,) if is_tiled else ()
    pixels = torch.randn(batch, *tiles, 3, side, side, generator=generator, device="cpu")
    inputs = {
        "pixel_values": pixels.to(model.device, model.dtype),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }
    return inputs | {"image_sizes": image_sizes(target, batch)} if is_tiled else inputs


def image_sizes(target: Target, batch: int) -> Tensor:
    """Returns the sizes (B, 2) of a batch of images that the model cuts into tiles."""
    return torch.tensor([target.size] * batch, device=target.model.device)


def save_checkpoint(name: str, folder: Path) -> None:
    """Saves a LLaVA-1.5 or LLaVA-NeXT target in bfloat16, with a processor of the embedded tokenizer."""
    model = build(name, torch.bfloat16, "cpu").model
    processor = make_processor(model.config)
    model.config.image_token_id = processor.image_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def make_processor(config: Any) -> Any:
    """Returns the embedded model's processor with image size, patch size and tiles of a LLaVA's config."""
    from transformers import AutoProcessor, LlavaNextImageProcessorPil, LlavaNextProcessor

    processor = AutoProcessor.from_pretrained(embedded.PATH)
    if checkpoints.cuts_into_tiles(config):
        images = LlavaNextImageProcessorPil(image_grid_pinpoints=config.image_grid_pinpoints)
        processor = LlavaNextProcessor(
            images,
            processor.tokenizer,
            chat_template=processor.chat_template,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_additional_image_tokens=1,
        )
    side, processor.patch_size = config.vision_config.image_size, config.vision_config.patch_size
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    return processor


def llava_config(text: dict[str, Any], layers: int, side: int = CLIP_SIDE) -> Any:
    """Returns the LlavaConfig of CLIP ViT-L/14 for images of `side` pixels and a language model's sizes."""
    from transformers import LlavaConfig

    return LlavaConfig(**_clip_and(text, layers, side), image_token_index=IMAGE_TOKEN)


def next_config(text: dict[str, Any], layers: int) -> Any:
    """Returns the LlavaNextConfig of CLIP ViT-L/14-336 and a language model's sizes."""
    from transformers import LlavaNextConfig

    return LlavaNextConfig(**_clip_and(text, layers, CLIP_SIDE), image_token_index=IMAGE_TOKEN)


def onevision_config(text: dict[str, Any], layers: int) -> Any:
    """Returns the LlavaOnevisionConfig of SigLIP-so400m/14-384 and a language model's sizes."""
    from transformers import LlavaOnevisionConfig, SiglipVisionConfig

    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**SIGLIP, patch_size=PATCH),
        text_config=_text_config(text, layers),
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
    )


def _config(name: str, side: int) -> Any:
    """Returns the config of a named target; `side` of images in pixels is for those of one tile."""
    layers = LLM_LAYERS[name]
    if name in TILED_TARGETS:
        is_next = name.startswith("next")
        return next_config(LLAMA_7B, layers) if is_next else onevision_config(QWEN2_7B, layers)
    return llava_config(SMALL if name == "tower" else LLAMA_7B, layers, side)


def _clip_and(text: dict[str, Any], layers: int, side: int) -> dict[str, Any]:
    from transformers import CLIPVisionConfig

    vision = CLIPVisionConfig(**CLIP_L, image_size=side, patch_size=PATCH)
    return {"vision_config": vision, "text_config": _text_config(text, layers)}


def _text_config(text: dict[str, Any], layers: int) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**{"model_type": "llama"} | text, num_hidden_layers=layers)


def _random_model(config: Any, dtype: torch.dtype, device: str, shares_layers: bool) -> nn.Module:
    """Returns a model whose weights repeat one random block, so that building 7B parameters takes seconds."""
    from transformers import AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if shares_layers:
        _share_layers(model.model.language_model.layers)
    generator = torch.Generator("cpu").manual_seed(0)
    block = (torch.randn(2**20, generator=generator, device="cpu") * STD).to(device, dtype)
    for parameter in model.parameters():
        for chunk in parameter.data.view(-1).split(len(block)):
            chunk.copy_(block[: len(chunk)])
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm"):
            nn.init.ones_(module.weight)
    return model.eval()


def _share_layers(layers: nn.ModuleList) -> None:
    """Gives all layers the parameters of the first."""
    first = dict(layers[0].named_modules())
    for layer in layers[1:]:
        for name, module in layer.named_modules():
            for key, _ in list(module.named_parameters(recurse=False)):
                setattr(module, key, getattr(first[name], key))
