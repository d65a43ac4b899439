"""Tokens and FLOPs of a model from its config alone: no weights, and no hub for LLaVA-1.5."""

import os
import socket
from functools import cache
from typing import NamedTuple
from urllib.parse import urlparse

import torch

from llava_pitome.cli.bench.targets import CLIP_L, LLAMA_7B, PATCH
from llava_pitome.config import MergeConfig
from llava_pitome.flops import Flops, closed_form
from llava_pitome.models import checkpoints
from llava_pitome.models import hf_llava as llava
from llava_pitome.models.parts import ModelParts

LLAMA_13B = LLAMA_7B | {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40}
BUILT_IN = {  # language model and number of its layers, by hub id
    "llava-hf/llava-1.5-7b-hf": (LLAMA_7B, 32),
    "llava-hf/llava-1.5-13b-hf": (LLAMA_13B, 40),
}
IMAGE_SIDE = 336  # pixels, LLaVA-1.5
HUB, TIMEOUT = "https://huggingface.co", 3  # seconds


class Cost(NamedTuple):
    """The cost of a prompt with one image.

    Attributes:
        tokens: image tokens at the input of the language model.
        llm_tokens: image tokens at the input of each of its layers, the mean.
        flops: of the prompt, by formula.
    """

    tokens: int
    llm_tokens: float
    flops: Flops

    def describe(self) -> str:
        """Tokens and FLOPs in words."""
        f = self.flops
        parts = {"tower": f.tower, "projector": f.projector, "LLM": f.llm, "total": f.total}
        flops = ", ".join(f"{name} {n / 1e9:.4g}" for name, n in parts.items())
        return f"{self.tokens} image tokens, {self.llm_tokens:.4g} per LLM layer on average; GFLOPs: {flops}"


class ModelShapes(NamedTuple):
    """A model without weights.

    Attributes:
        parts: its modules, with weights on torch's meta device.
        shapes: its sizes.
        built_in: whether they are those in this file, because the hub could not be reached.
    """

    parts: ModelParts
    shapes: llava.Shapes
    built_in: bool

    def cost(self, config: MergeConfig | None, text: int) -> Cost:
        """The cost of a prompt with one image and `text` text tokens; unmerged without a config.

        Raises:
            ValueError: the model cannot merge as the config says.
        """
        patches, layers = self.parts.patches, self.parts.num_feature_layers
        config = MergeConfig(ratio=1.0) if config is None else config
        llava.check(self.parts, config)
        tower = config.lengths(config.patches_at(patches), layers)
        llm = config.llm_lengths(config.tokens_at(patches, layers), self.shapes.llm_layers)
        flops = closed_form(self.shapes, tower, text, llm, config.site)
        return Cost(llm[0], sum(llm[:-1]) / self.shapes.llm_layers, flops)


@cache
def model_shapes(path: str, attention: str, built_in: bool) -> ModelShapes:
    """The shapes of the model in a folder or on the hub.

    Args:
        path: a folder or a hub id.
        attention: its attention kernel.
        built_in: use the shapes in this file where the hub cannot be reached.

    Raises:
        ValueError: the path holds no LLaVA, or cannot be reached.
    """
    try:
        checkpoints.patches_and_layers(path)
        config = checkpoints.read_config(path)
    except ValueError:
        if not built_in or path not in BUILT_IN:
            raise
        return _without_weights(_llava_config(*BUILT_IN[path]), attention, True)
    return _without_weights(config, attention, False)


def _llava_config(text: dict[str, int], layers: int):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(**CLIP_L, image_size=IMAGE_SIDE, patch_size=PATCH)
    return LlavaConfig(vision_config=vision, text_config=LlamaConfig(**text, num_hidden_layers=layers))


def _without_weights(config, attention: str, built_in: bool) -> ModelShapes:
    from transformers import AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
    return ModelShapes(llava.find(model), llava.shapes(model), built_in)


def set_offline_without_network() -> None:
    """Sets HF_HUB_OFFLINE where the hub cannot be reached: huggingface_hub would retry for half a minute.

    To be called before huggingface_hub is imported.
    """
    hub = urlparse(os.environ.get("HF_ENDPOINT", HUB))
    if any(name.lower() in ("http_proxy", "https_proxy", "all_proxy") for name in os.environ):
        return  # a connection would only test the proxy
    try:
        socket.create_connection((hub.hostname, hub.port or 443), TIMEOUT).close()
    except OSError:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
