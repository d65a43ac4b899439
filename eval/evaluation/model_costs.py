"""Tokens and FLOPs of a model from its config alone: no weights, and no hub for the models in BUILT_IN."""

import os
import socket
from collections.abc import Sequence
from functools import cache, partial
from typing import NamedTuple
from urllib.parse import urlparse

import torch

from llava_pitome.cli.bench.targets import LLAMA_7B, QWEN2_7B, llava_config, next_config, onevision_config
from llava_pitome.config import MergeConfig
from llava_pitome.flops import Flops, closed_form, closed_form_of_layouts
from llava_pitome.image_layout import ImageLayout
from llava_pitome.image_schedule import tokens_of_image
from llava_pitome.models import checkpoints, config_checks
from llava_pitome.models import hf_llava as llava
from llava_pitome.models.parts import ModelParts

LLAMA_13B = LLAMA_7B | {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40}
MISTRAL_7B = LLAMA_7B | {"model_type": "mistral", "intermediate_size": 14336, "num_key_value_heads": 8,
                         "sliding_window": None}  # fmt: skip
BUILT_IN = {  # what makes a config, by hub id
    "llava-hf/llava-1.5-7b-hf": partial(llava_config, LLAMA_7B, 32),
    "llava-hf/llava-1.5-13b-hf": partial(llava_config, LLAMA_13B, 40),
    "llava-hf/llava-v1.6-vicuna-7b-hf": partial(next_config, LLAMA_7B, 32),
    "llava-hf/llava-v1.6-vicuna-13b-hf": partial(next_config, LLAMA_13B, 40),
    "llava-hf/llava-v1.6-mistral-7b-hf": partial(next_config, MISTRAL_7B, 32),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": partial(onevision_config, QWEN2_7B, 28),
}
HUB, TIMEOUT = "https://huggingface.co", 3  # seconds


class Cost(NamedTuple):
    """The cost of a prompt with one image, or one video.

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

    def layout(self, frames: int | None = None) -> ImageLayout | None:
        """The layout of a video of `frames`, or of an image of the nominal size; None: an image is one tile.

        Raises:
            ValueError: `frames` is given for a model that takes no videos.
        """
        tiling = self.parts.llava.tiling
        if frames is not None and (tiling is None or tiling.frame_side is None):
            raise ValueError(
                f"frames={frames} is not allowed: a {type(self.parts.model).__name__} takes no videos"
            )
        if tiling is None:
            return None
        return tiling.image(*tiling.nominal_size) if frames is None else tiling.video(frames)

    def describe_input(self, frames: int | None = None) -> str:
        """What `cost` is the cost of, besides text."""
        layout = self.layout(frames)
        if layout is None:
            return "one image"
        if frames is not None:
            return f"one video of {frames} frames"
        height, width = self.parts.llava.tiling.nominal_size
        return f"one image of {height} x {width} pixels ({layout.tiles} tiles; runs report means over images)"

    def cost(self, config: MergeConfig | None, text: int, frames: int | None = None) -> Cost:
        """The cost of a prompt with one image, or video, and `text` text tokens; unmerged without a config.

        Args:
            config: how the model merges.
            text: tokens.
            frames: of a video; None: the prompt has an image, as `layout` says.

        Raises:
            ValueError: the model cannot merge as the config says, or takes no videos.
        """
        patches, layers = self.parts.patches, self.parts.num_feature_layers
        config = MergeConfig(ratio=1.0) if config is None else config
        config_checks.check(self.parts, config)
        layout = self.layout(frames)
        if layout is not None:
            return layouts_cost(self.parts, [layout], text, config)
        tower = config.lengths(config.patches_at(patches), layers)
        llm = config.llm_lengths(config.tokens_at(patches, layers), self.shapes.llm_layers)
        flops = closed_form(self.shapes, tower, text, llm, config.site)
        return Cost(llm[0], sum(llm[:-1]) / self.shapes.llm_layers, flops)


def layouts_cost(
    parts: ModelParts, layouts: Sequence[ImageLayout], text: int, config: MergeConfig | None
) -> Cost:
    """The cost of a prompt with images, or videos, that a model cuts into tiles; arguments as for `cost`."""
    config = MergeConfig(ratio=1.0) if config is None else config
    layers = parts.llava.llm.config.num_hidden_layers
    counts = [tokens_of_image(config, parts.num_feature_layers, layout) for layout in layouts]
    in_llm = sum(sum(config.llm_lengths(n, layers)[:-1]) for n in counts) / layers
    return Cost(sum(counts), in_llm, closed_form_of_layouts(parts.model, layouts, text, config))


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
        return _without_weights(BUILT_IN[path](), attention, True)
    return _without_weights(config, attention, False)


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
