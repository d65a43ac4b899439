"""What a prompt with pictures costs: floating-point operations, counted and by formula.

Units: FLOPs, a multiply-add being two. Prefill only, which is what merging shortens.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, get_args

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from llava_pitome.config import Site
from llava_pitome.models import hf_llava as llava
from llava_pitome.models.hf_llava import Shapes

SITES = get_args(Site)
QUANTIZED = ("Linear4bit", "Linear8bitLt")  # bitsandbytes layers, whose products torch's counter does not see


class Flops(NamedTuple):
    """FLOPs of one forward pass by part of the model."""

    tower: float
    projector: float
    llm: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.tower + self.projector + self.llm


def counted(model: nn.Module, inputs: Mapping[str, Any]) -> Flops:
    """Runs the prompt once and counts the matrix products and attentions that really ran.

    Raises:
        ValueError: the original package's model, which is not told apart by part.
    """
    parts = llava.find(model)
    if parts.whole is None or parts.whole.image_token is None:
        raise ValueError(
            f"FLOPs are counted of a LlavaForConditionalGeneration, not of a {type(parts.model).__name__}; "
            "load makes one of an original checkpoint"
        )
    quantized: list[int] = []  # matrix products inside bitsandbytes, all in the language model
    hooks = [
        module.register_forward_hook(
            lambda m, args, _out: quantized.append(2 * args[0].numel() * m.out_features)
        )
        for module in parts.model.modules()
        if type(module).__name__ in QUANTIZED
    ]
    with FlopCounterMode(display=False, depth=None, custom_mapping=EXTRA) as counter, torch.no_grad():
        parts.model(**inputs, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    by_name = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    total = by_name["Global"]
    tower = max((n for name, n in by_name.items() if name.endswith("vision_tower")), default=0)
    projector = max((n for name, n in by_name.items() if name.endswith("multi_modal_projector")), default=0)
    return Flops(tower, projector, total - tower - projector + sum(quantized))


def closed_form(
    model: nn.Module | Shapes,
    lengths: Sequence[int],
    text: int,
    llm_lengths: Sequence[int] | None = None,
    site: str = "attention",
) -> Flops:
    """FLOPs of one picture and `text` further tokens by formula, with attention counted in full.

    Left out is what a SigLIP tower pools at its end, which LLaVA does not read, and what choosing and merging
    cost.

    Args:
        model: a LLaVA, or its sizes.
        lengths: patches before the first block of the tower and after each, as `MergeConfig.lengths` gives
            them; for a plain model, the same number throughout.
        text: tokens of the prompt that are no image tokens.
        llm_lengths: image tokens before the first block of the language model and after each, as
            `MergeConfig.llm_lengths` gives them; None: what the tower leaves, throughout.
        site: where in a block tokens merge, as in MergeConfig.

    Raises:
        ValueError: not one length per block of the language model, or an unknown site.
    """
    s = _sizes(model)
    if site not in SITES:
        raise ValueError(f"site={site!r} is unknown; allowed are {', '.join(map(repr, SITES))}")
    if llm_lengths is None:
        llm_lengths = (lengths[-1],) * (s.llm_layers + 1)
    if len(llm_lengths) != s.llm_layers + 1:
        raise ValueError(
            f"llm_lengths holds {len(llm_lengths)} numbers; {s.llm_layers} layers need {s.llm_layers + 1}"
        )
    tower = 2 * s.patch_inputs * s.tower_width * lengths[0]
    for n, m in _passed(lengths, s.class_tokens, site):
        tower += _block(n, m, s.tower_width, s.tower_width, s.tower_mlp, 2)
    idle = s.tower_layers - (len(lengths) - 1)
    rest = lengths[-1] + s.class_tokens if lengths[-1] == lengths[0] else 1
    tower += idle * _block(rest, rest, s.tower_width, s.tower_width, s.tower_mlp, 2)
    projector = 2 * lengths[-1] * (s.tower_width * s.llm_width + s.llm_width**2)
    llm = 2 * s.llm_width * s.vocabulary
    for n, m in _passed(llm_lengths, text, site):
        llm += _block(n, m, s.llm_width, s.llm_kv, s.llm_mlp, 3)
    return Flops(tower, projector, llm)


def literature(model: nn.Module | Shapes, tokens: int) -> float:
    """The formula in common use, T (4 n d^2 + 2 n^2 d + 2 n d m), n being `tokens`: multiply-adds.

    It leaves out the tower and one of the three MLP matrices; given for comparison with papers.
    """
    s = _sizes(model)
    layer = 4 * tokens * s.llm_width**2 + 2 * tokens**2 * s.llm_width + 2 * tokens * s.llm_width * s.llm_mlp
    return s.llm_layers * layer


def _sizes(model: nn.Module | Shapes) -> Shapes:
    return model if isinstance(model, Shapes) else llava.shapes(model)


def _passed(lengths: Sequence[int], others: int, site: str) -> Iterator[tuple[int, int]]:
    """For each block, tokens in its attention and in its MLP, with the `others` that never merge."""
    for before, after in pairwise(lengths):
        yield before + others, (after if site == "attention" else before) + others


def _block(n: int, m: int, width: int, kv: int, mlp: int, matrices: int) -> int:
    """FLOPs of a block: attention over n tokens, an MLP of `matrices` matrices over the m that are left."""
    return 2 * n * width * (2 * width + 2 * kv) + 4 * n * n * width + 2 * matrices * m * width * mlp


def _attention(query: tuple, key: tuple, value: tuple, *_args: Any, **_kwargs: Any) -> int:
    """FLOPs of an attention from the shapes of its inputs."""
    return sdpa_flop_count(query, key, value)


EXTRA = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}  # torch's counter lacks it
