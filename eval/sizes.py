"""What a model would cost, from its config alone: no weights, and for LLaVA-1.5 no hub either."""

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
BUILT_IN = {  # language model and its layers, by hub id
    "llava-hf/llava-1.5-7b-hf": (LLAMA_7B, 32),
    "llava-hf/llava-1.5-13b-hf": (LLAMA_13B, 40),
}
SIDE = 336  # pixels across LLaVA-1.5's pictures
HUB, PATIENCE = "https://huggingface.co", 3  # seconds to wait for the hub


class Cost(NamedTuple):
    """What one picture costs in a prompt.

    Attributes:
        tokens: image tokens that reach the language model.
        llm_tokens: image tokens in front of each of its layers, the mean.
        flops: of the prompt, by formula.
    """

    tokens: int
    llm_tokens: float
    flops: Flops


class Sizes(NamedTuple):
    """A model without weights.

    Attributes:
        parts: its parts; their weights are on torch's meta device.
        shapes: its sizes.
        built_in: whether they are from this file, because the hub could not be reached.
    """

    parts: ModelParts
    shapes: llava.Shapes
    built_in: bool

    def cost(self, config: MergeConfig | None, text: int) -> Cost:
        """What a prompt of one picture and `text` further tokens costs, merging as `config` says.

        Raises:
            ValueError: the model cannot do what the config asks.
        """
        patches, blocks = self.parts.patches, self.parts.feature
        if config is None:
            tower, llm, site = (
                (patches,) * (blocks + 1),
                (patches,) * (self.shapes.llm_layers + 1),
                "attention",
            )
        else:
            llava.check(self.parts, config)
            tower, site = config.lengths(config.patches_at(patches), blocks), config.site
            llm = config.llm_lengths(config.tokens_at(patches, blocks), self.shapes.llm_layers)
        flops = closed_form(self.shapes, tower, text, llm, site)
        return Cost(llm[0], sum(llm[:-1]) / self.shapes.llm_layers, flops)


@cache
def sizes(path: str, attention: str, built_in: bool) -> Sizes:
    """The sizes of a folder's or hub id's model.

    Args:
        path: where its config is.
        attention: its attention kernel.
        built_in: whether sizes that this file knows may stand for those of a hub that cannot be reached.

    Raises:
        ValueError: the path is no LLaVA, or cannot be reached.
    """
    try:
        checkpoints.patches_and_layers(path)
        config = checkpoints.read_config(path)
    except ValueError:
        if not built_in or path not in BUILT_IN:
            raise
        return _bare(_llava(*BUILT_IN[path]), attention, True)
    return _bare(config, attention, False)


def _llava(text: dict[str, int], layers: int):
    """The config of LLaVA-1.5 with one of its language models."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(**CLIP_L, image_size=SIDE, patch_size=PATCH)
    return LlavaConfig(vision_config=vision, text_config=LlamaConfig(**text, num_hidden_layers=layers))


def _bare(config, attention: str, built_in: bool) -> Sizes:
    """A model of a config, without weights."""
    from transformers import LlavaForConditionalGeneration
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device("meta"):
        model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention)
    return Sizes(llava.find(model), llava.shapes(model), built_in)


def stay_offline() -> None:
    """Where the hub's name leads nowhere, tells its library, which would try again for half a minute.

    To be called before that library is imported.
    """
    hub = urlparse(os.environ.get("HF_ENDPOINT", HUB))
    if any(name.lower() in ("http_proxy", "https_proxy", "all_proxy") for name in os.environ):
        return  # what answers is the proxy
    try:
        socket.create_connection((hub.hostname, hub.port or 443), PATIENCE).close()
    except OSError:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
