"""FLOPs of the prefill of a prompt with one image, counted and in closed form; a multiply-add is two FLOPs.

Merging shortens the prefill alone, so decoding is left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, get_args

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava_pitome.config import MergeConfig, Site
from llava_pitome.image_layout import ImageLayout
from llava_pitome.image_schedule import encoded_tiles, schedule
from llava_pitome.models import hf_llava as llava
from llava_pitome.models.hf_llava import Shapes

SITES = get_args(Site)
QUANTIZED = ("Linear4bit", "Linear8bitLt")  # of bitsandbytes, whose products torch's counter does not see


class Flops(NamedTuple):
    """FLOPs of one forward pass by part of the model; what merges after the projector is in its part."""

    tower: float
    projector: float
    llm: float

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return self.tower + self.projector + self.llm


def counted(model: nn.Module, inputs: Mapping[str, Any]) -> Flops:
    """Runs a prefill; returns the FLOPs of the matrix products and attentions that ran.

    Raises:
        ValueError: the original package's model, whose parts cannot be told apart.
    """
    parts = llava.find(model)
    if parts.llava is None or parts.llava.image_token is None:
        raise ValueError(
            f"FLOPs are counted of a LlavaForConditionalGeneration, not of a {type(parts.model).__name__}; "
            "load makes one of an original checkpoint"
        )
    quantized: list[int] = []  # all in the language model

    def count_quantized(module: nn.Module, args: tuple, _output: Any) -> None:
        quantized.append(2 * args[0].numel() * module.out_features)

    modules = [m for m in parts.model.modules() if type(m).__name__ in QUANTIZED]
    hooks = [module.register_forward_hook(count_quantized) for module in modules]
    try:
        # as matrix products, since torch's counter does not know the CPU's fused attention
        attention = sdpa_kernel(SDPBackend.MATH)
        with attention, FlopCounterMode(display=False) as counter, torch.no_grad():
            last = {"logits_to_keep": 1} if hasattr(parts.model, "lm_head") else {}
            parts.model(**inputs, use_cache=False, **last)
    finally:
        for hook in hooks:
            hook.remove()
    by_module = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    tower, llm, head = (
        max((n for name, n in by_module.items() if name.endswith(part)), default=0)
        for part in ("vision_tower", "language_model", "lm_head")
    )
    return Flops(tower, by_module["Global"] - tower - llm - head, llm + head + sum(quantized))


def closed_form(
    model: nn.Module | Shapes,
    lengths: Sequence[int],
    text: int,
    llm_lengths: Sequence[int] | None = None,
    site: str = "attention",
) -> Flops:
    """Returns the FLOPs of one image and `text` further tokens by formula, with attention counted in full.

    Not included: SigLIP's attention pooling, which LLaVA does not read, and the cost of matching and merging.

    Args:
        model: a LLaVA, or its shapes.
        lengths: patches before the first block of the tower and after each, as `MergeConfig.lengths` returns
            them; for a dense model, the same number throughout.
        text: tokens of the prompt that are no image tokens.
        llm_lengths: image tokens before the first block of the language model and after each, as
            `MergeConfig.llm_lengths` returns them; None: the tower's last length throughout.
        site: where in a block tokens merge, as in MergeConfig.

    Raises:
        ValueError: `llm_lengths` has not one number per block and one more, or the site is unknown.
    """
    s = model if isinstance(model, Shapes) else llava.shapes(model)
    if site not in SITES:
        raise ValueError(f"site={site!r} is unknown; allowed are {', '.join(map(repr, SITES))}")
    if llm_lengths is None:
        llm_lengths = (lengths[-1],) * (s.llm_layers + 1)
    if len(llm_lengths) != s.llm_layers + 1:
        raise ValueError(
            f"llm_lengths holds {len(llm_lengths)} numbers; {s.llm_layers} layers need {s.llm_layers + 1}"
        )
    blocks = list(_tokens_by_block(lengths, s.num_prefix_tokens, site))
    # after the feature layer, a merging tower runs on one token
    rest = lengths[-1] + s.num_prefix_tokens if lengths[-1] == lengths[0] else 1
    blocks += [(rest, rest)] * (s.tower_layers - len(blocks))
    tower = 2 * s.patch_inputs * s.tower_width * lengths[0]
    tower += sum(_block(n, m, s.tower_width, s.tower_width, s.tower_mlp, 2) for n, m in blocks)
    projector = 2 * lengths[-1] * (s.features * s.llm_width + s.llm_width**2)
    llm = 2 * s.llm_width * s.vocabulary
    for n, m in _tokens_by_block(llm_lengths, text, site):
        llm += _block(n, m, s.llm_width, s.llm_kv, s.llm_mlp, 3)
    return Flops(tower, projector, llm)


def closed_form_of_layouts(
    model: nn.Module, layouts: Sequence[ImageLayout], text: int, config: MergeConfig | None = None
) -> Flops:
    """Returns the FLOPs of a prompt whose images, or videos, a model cuts into tiles.

    As `closed_form`. The tower encodes whole tiles, whatever part of them shows the image.

    Args:
        model: a LLaVA that cuts images into tiles; its weights are not needed.
        layouts: of the images; none for a prompt of text.
        text: tokens of the prompt that are no image tokens.
        config: how it merges; None: not at all.

    Raises:
        ValueError: as for `image_schedule.schedule`.
    """
    parts, s = llava.find(model), llava.shapes(model)
    config = MergeConfig(ratio=1.0) if config is None else config
    tower = projector = 0.0
    llm_lengths = [0] * (s.llm_layers + 1)
    for layout in layouts:
        counts = schedule(config, layout, parts.num_feature_layers)
        tile, tiles = closed_form(s, counts.lengths, 0, site=config.site), encoded_tiles(layout, counts)
        is_pooled_before = layout.is_video and parts.llava.pooling is not None
        projected = sum(r.tokens for r in layout.regions) if is_pooled_before else tiles * counts.lengths[-1]
        tower += tile.tower * tiles
        projector += tile.projector / counts.lengths[-1] * projected
        lengths = config.llm_lengths(counts.tokens, s.llm_layers)
        llm_lengths = [total + length for total, length in zip(llm_lengths, lengths)]
    llm = closed_form(s, (parts.patches,), text, llm_lengths, config.site).llm
    return Flops(tower, projector, llm)


def literature(model: nn.Module | Shapes, tokens: int) -> float:
    """Returns the multiply-adds of FastV's formula T (4 n d^2 + 2 n^2 d + 2 n d m), where n is `tokens`.

    It leaves out the tower and one of the three MLP matrices; for comparison with papers, which use it.
    """
    s = model if isinstance(model, Shapes) else llava.shapes(model)
    layer = 4 * tokens * s.llm_width**2 + 2 * tokens**2 * s.llm_width + 2 * tokens * s.llm_width * s.llm_mlp
    return s.llm_layers * layer


def _tokens_by_block(lengths: Sequence[int], others: int, site: str) -> Iterator[tuple[int, int]]:
    """Yields each block's tokens in attention and in the MLP, including `others` that never merge."""
    for before, after in pairwise(lengths):
        yield before + others, (after if site == "attention" else before) + others


def _block(n: int, m: int, width: int, kv: int, mlp: int, matrices: int) -> int:
    """Returns the FLOPs of a block: attention over n tokens, and an MLP of `matrices` matrices over m."""
    return 2 * n * width * (2 * width + 2 * kv) + 4 * n * n * width + 2 * matrices * m * width * mlp
