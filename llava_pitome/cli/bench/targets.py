"""Models to benchmark: real shapes with random weights, which need no download, or any checkpoint.

Speed depends on shapes alone: how many tokens merge follows from the config, whatever the weights are.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llava_pitome import embedded
from llava_pitome.models import checkpoints
from llava_pitome.models import hf_llava as llava

LLM_LAYERS = {"tower": 1, "llava-7b-2layer": 2, "llava-7b": 32}
NAMED_TARGETS = tuple(LLM_LAYERS)
LLAVA_TARGETS = NAMED_TARGETS[1:]  # those whose language model has real shapes too
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
          "projection_dim": 768}  # fmt: skip
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32064}
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 128}
PATCH, PATCHES, IMAGE_TOKEN = 14, 576, 100
STD = 0.02  # of random weights


class Target(NamedTuple):
    """A model to benchmark.

    Attributes:
        name: a name in NAMED_TARGETS, "embedded", a folder or a hub id.
        model: a LLaVA, in inference mode.
        generates: whether answers are timed; otherwise the vision tower alone is.
        patches: patches of an image.
    """

    name: str
    model: nn.Module
    generates: bool
    patches: int


def build(name: str, dtype: torch.dtype, device: str, patches: int | None = None) -> Target:
    """Returns the target of a name.

    Args:
        name: "tower" is CLIP ViT-L/14; "llava-7b" LLaVA-1.5-7B (13.5 GB in bfloat16); "llava-7b-2layer" the
            same with two of its 32 language layers; else "embedded", a folder or a hub id.
        dtype: of the weights.
        device: where they are.
        patches: patches of an image, a square number; None: 576. Named targets only.

    Raises:
        ValueError: `patches` is no square number, or is set for a checkpoint; the checkpoint does not exist
            or is no LLaVA.
    """
    if name not in NAMED_TARGETS:
        if patches is not None:
            allowed = ", ".join(NAMED_TARGETS)
            raise ValueError(f"patches={patches} is for {allowed}; {name!r} has its own image size")
        path = str(embedded.PATH) if name == "embedded" else name
        checkpoints.patches_and_layers(path)  # a clear error for a path without a model
        model, _ = checkpoints.load(path, None, dtype=dtype)
        return Target(name, model.to(device), True, llava.find(model).patches)
    patches = PATCHES if patches is None else patches
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"patches={patches} is not allowed: it must be a square number, as 196, 576, 2304")
    model = _random_model(LLM_LAYERS[name], SMALL if name == "tower" else LLAMA_7B, side, dtype, device)
    return Target(name, model, name in LLAVA_TARGETS, patches)


def make_inputs(target: Target, batch: int, tokens: int, text: int) -> dict[str, Tensor]:
    """Returns a batch of prompts with one image each: `tokens` placeholders and `text` further tokens.

    Returns:
        pixel_values (B, 3, height, width), input_ids and attention_mask (B, tokens + text).
    """
    model = target.model
    generator = torch.Generator("cpu").manual_seed(0)
    side = math.isqrt(target.patches) * llava.find(model).patch_size
    image, vocabulary = model.config.image_token_id, model.config.text_config.vocab_size
    words = torch.randint(0, vocabulary - 1, (batch, text), generator=generator, device="cpu")
    words += words >= image  # any token but the placeholder
    images = torch.full((batch, tokens), image, device="cpu")
    ids = torch.cat([words[:, :1], images, words[:, 1:]], 1).to(model.device)
    pixels = torch.randn(batch, 3, side, side, generator=generator, device="cpu").to(
        model.device, model.dtype
    )
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def save_checkpoint(name: str, folder: Path) -> None:
    """Saves a target of LLAVA_TARGETS in bfloat16, with a processor that uses the embedded tokenizer."""
    model = build(name, torch.bfloat16, "cpu").model
    processor = make_processor(model.config)
    model.config.image_token_id = processor.image_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def make_processor(config: Any) -> Any:
    """Returns the embedded model's processor with the image and patch size of a LlavaConfig."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(embedded.PATH)
    side, processor.patch_size = config.vision_config.image_size, config.vision_config.patch_size
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    return processor


def _random_model(layers: int, text: dict[str, int], side: int, dtype: torch.dtype, device: str) -> nn.Module:
    """Returns a LLaVA whose weights repeat one random block, so that building 7B parameters takes seconds."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    from transformers.initialization import no_init_weights

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP_L, image_size=side * PATCH, patch_size=PATCH),
        text_config=LlamaConfig(**text, num_hidden_layers=layers),
        image_token_index=IMAGE_TOKEN,
    )
    with no_init_weights(), torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    generator = torch.Generator("cpu").manual_seed(0)
    block = (torch.randn(2**20, generator=generator, device="cpu") * STD).to(device, dtype)
    for parameter in model.parameters():
        for chunk in parameter.data.view(-1).split(len(block)):
            chunk.copy_(block[: len(chunk)])
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm"):
            nn.init.ones_(module.weight)
    return model.eval()
