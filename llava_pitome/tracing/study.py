"""One picture, one way to merge: what the tower saw, and what became of every patch."""

from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn

from llava_pitome.api import merge_tokens
from llava_pitome.config import MergeConfig
from llava_pitome.hooks.handle import MergeHandle
from llava_pitome.models import hf_llava as llava
from llava_pitome.tracing.history import History, watching
from llava_pitome.tracing.view import pixels, visible


class Study(NamedTuple):
    """What is drawn.

    Attributes:
        config: how it merged.
        view: the picture as the tower saw it.
        grid: rows and columns of its patches.
        history: what became of them.
    """

    config: MergeConfig
    view: Image.Image
    grid: tuple[int, int]
    history: History


@torch.no_grad()
def study(
    model: nn.Module, processor: Any, picture: Image.Image, config: MergeConfig, question: str | None = None
) -> Study:
    """Runs a model once on a picture, merging as `config` says, and keeps what became of the patches.

    What the model merged before, and its processor, are as they were afterwards.

    Args:
        model: see `llava.SUPPORTED`.
        processor: its processor.
        picture: RGB, of any size.
        config: how to merge.
        question: what is asked about the picture, where the language model merges; elsewhere it never runs.
            A text that holds the processor's image token is the whole prompt.

    Raises:
        ValueError: the model cannot do what the config asks, or a question is missing.
    """
    inside = bool(config.merging_layers)
    if inside and not question:
        raise ValueError(
            f"method {config.method!r} merges in the language model, where a question is read: give one"
        )
    with merge_tokens(model, config, processor) as merging, watching(merging) as seen:
        given = pixels(processor, picture)
        if inside:
            inputs = processor(images=picture, text=_prompt(processor, question), return_tensors="pt")
            model(**inputs.to(model.device, model.dtype), logits_to_keep=1)
        else:
            llava.encode(model, given)
        return Study(config, *looked(processor, merging, given), seen.history())


def looked(processor: Any, merging: MergeHandle, given: torch.Tensor) -> tuple[Image.Image, tuple[int, int]]:
    """The picture (1, 3, H, W) as a merging tower sees it, and the rows and columns of its patches."""
    if merging.shrinking is not None:
        given = merging.shrinking.smaller(given)
    high, wide = given.shape[-2:]
    return visible(processor, given[0]), (high // processor.patch_size, wide // processor.patch_size)


def _prompt(processor: Any, question: str) -> str:
    """The prompt of a question about one picture."""
    if processor.image_token in question:
        return question
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
