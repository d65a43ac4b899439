"""What is benchmarked: models of the real shapes with random weights, also written down, or any checkpoint.

Nothing is downloaded for the former. Speed depends on shapes alone: schedules fix how many tokens merge,
whatever the weights are.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llava_pitome import embedded
from llava_pitome.models import checkpoints
from llava_pitome.models import hf_llava as llava

ANSWERING = ("llava-7b-2layer", "llava-7b")
NAMED = ("tower", *ANSWERING)
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
          "projection_dim": 768}  # fmt: skip
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32064}
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 128}
LAYERS = {"tower": 1, "llava-7b-2layer": 2, "llava-7b": 32}  # of the language model
PATCH, IMAGE_TOKEN = 14, 100
SCALE = 0.02  # of random weights


class Target(NamedTuple):
    """A model to be timed.

    Attributes:
        name: as it was asked for.
        model: a LLaVA, in inference mode.
        answers: whether its language model is part of what is timed, or only its tower.
        patches: patches of an image.
    """

    name: str
    model: nn.Module
    answers: bool
    patches: int


def build(name: str, dtype: torch.dtype, device: str, patches: int | None = None) -> Target:
    """The target of a name in NAMED, of "embedded", or of a folder or hub id.

    Args:
        name: "tower" is CLIP ViT-L/14; "llava-7b" LLaVA-1.5-7B (13.5 GB in bfloat16); "llava-7b-2layer" the
            same with two of its 32 language layers.
        dtype: of the weights.
        device: where they are.
        patches: patches of an image, a square number; 576 where not given. Named targets only.

    Raises:
        ValueError: patches that are no square, or given for a checkpoint; a checkpoint that is not there or
            no LLaVA.
    """
    if name not in NAMED:
        if patches is not None:
            raise ValueError(f"patches={patches} is for {', '.join(NAMED)}; {name!r} has its own image size")
        path = str(embedded.PATH) if name == "embedded" else name
        checkpoints.patches_and_layers(path)  # a clear error for a path that leads nowhere
        model, _ = checkpoints.load(path, None, dtype=dtype)
        return Target(name, model.to(device), True, llava.find(model).patches)
    side = math.isqrt(patches or 576)
    if side * side != (patches or 576):
        raise ValueError(f"patches={patches} is not allowed: it must be a square number, as 196, 576, 2304")
    model = _random(LAYERS[name], SMALL if name == "tower" else LLAMA_7B, side, dtype, device)
    return Target(name, model, name != "tower", side * side)


def inputs(target: Target, batch: int, tokens: int, text: int) -> dict[str, Tensor]:
    """A batch of prompts of one image and `text` further tokens; `tokens` image tokens are to arrive.

    Returns:
        pixel_values (B, 3, height, width), input_ids and attention_mask (B, tokens + text).
    """
    model = target.model
    generator = torch.Generator().manual_seed(0)
    side = math.isqrt(target.patches) * llava.find(model).patch_size
    image, vocabulary = model.config.image_token_id, model.config.text_config.vocab_size
    words = torch.randint(0, vocabulary - 1, (batch, text), generator=generator)
    words += words >= image  # any word but the image's
    images = torch.full((batch, tokens), image)
    ids = torch.cat([words[:, :1], images, words[:, 1:]], 1).to(model.device)
    pixels = torch.randn(batch, 3, side, side, generator=generator).to(model.device, model.dtype)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def write(name: str, into: Path) -> None:
    """Writes a target of a name in ANSWERING as a checkpoint in bfloat16, with a processor of its own.

    What it says means nothing: its words are the embedded model's.
    """
    model = build(name, torch.bfloat16, "cpu").model
    processor = fitting(model.config)
    model.config.image_token_id = processor.image_token_id
    model.save_pretrained(into)
    processor.save_pretrained(into)


def fitting(config: Any) -> Any:
    """The embedded model's processor, with pictures as large and patches as wide as a config says."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(embedded.PATH)
    side, processor.patch_size = config.vision_config.image_size, config.vision_config.patch_size
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    return processor


def _random(layers: int, text: dict[str, int], side: int, dtype: torch.dtype, device: str) -> nn.Module:
    """A LLaVA whose weights are one random block over and over: a 7B is there in seconds."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    from transformers.initialization import no_init_weights

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP_L, image_size=side * PATCH, patch_size=PATCH),
        text_config=LlamaConfig(**text, num_hidden_layers=layers),
        image_token_index=IMAGE_TOKEN,
    )
    with no_init_weights(), torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    block = (torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * SCALE).to(device, dtype)
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for start in range(0, len(flat), len(block)):
            part = flat[start : start + len(block)]
            part.copy_(block[: len(part)])
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm"):
            nn.init.ones_(module.weight)
    return model.eval()
