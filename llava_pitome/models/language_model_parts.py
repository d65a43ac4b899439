"""The parts of a language model in a LLaVA that merging touches."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from llava_pitome.models.parts import BlockParts


class LanguageModelParts(NamedTuple):
    """The parts of a language model in a LLaVA that merging touches.

    Attributes:
        outer: the module around it, called with input_ids and the pictures.
        model: it itself, called with inputs_embeds, attention_mask and past_key_values.
        blocks: its layers.
        norm: the norm behind the last one.
        rotary: from hidden states and position_ids (B or 1, T) to the angles that turn queries and keys.
        image_token: the id of the image placeholder; None where prompts reach the model without: images are
            then found by what they hold.
        front: tokens in front of each image's patches that never merge.
        image_tokens: from what `outer` is called with, and the patches of the pictures encoded last, to the
            tokens of each image; None: no picture.
        cached_keys: from a cache, a layer and a number of tokens to their keys (B, H, P, C).
        plain: whether its attention kernel is causal by itself where it is given no mask.
        check: raises ValueError for a cache, mask or kernel that cannot work in a call of either module.
    """

    outer: nn.Module
    model: nn.Module
    blocks: tuple[BlockParts, ...]
    norm: nn.Module
    rotary: nn.Module
    image_token: int | None
    front: int
    image_tokens: Callable[[dict, int], int | None]
    cached_keys: Callable[[Any, int, int], Tensor]
    plain: Callable[[], bool]
    check: Callable[[dict], None]
