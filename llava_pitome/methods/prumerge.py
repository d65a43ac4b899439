"""LLaVA-PruMerge+: survivors gather their neighbours (Shang et al., ICCV 2025, arXiv:2403.15388).

Tokens with outstanding class attention stay, and spatially uniform ones beside them; each then becomes the
mean of itself and the tokens nearest by their keys, weighted by class attention. The paper takes outliers of
the attention, about 32 an image, and about 144 with the uniform ones; here both are shares of a given count.
Neighbours are looked for among all other tokens, as in the authors' code, so that groups may overlap; parents
only say which survivor is most similar.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from llava_pitome.methods._common import best, closest, others, share, spread, tokens_at, whole


def mixed(
    metric: Tensor,
    remove: int,
    *,
    depth: float = 0.0,
    class_attention: Tensor,
    attended: float = 32 / 144,
    neighbours: int = 32,
) -> tuple[Tensor, Tensor]:
    """The most similar survivor of each token (B, N), and what survivors are made of (B, M, N).

    Ties go to the lower index.

    Args:
        metric: (B, N, D) what similarity is measured on; the attention keys, in the paper.
        remove: tokens that go, at most N - 1.
        depth: not used by this method.
        class_attention: (B, N) the class token's attention.
        attended: share of the survivors chosen by attention; the others are spread evenly over the rest.
        neighbours: tokens that each survivor gathers; the authors' code has 32.

    Raises:
        ValueError: `attended` that is no number from 0 to 1, `neighbours` that is no whole number from 0.
    """
    count = metric.shape[1]
    length = count - remove
    near = whole("neighbours", neighbours, 0) + 1
    top = best(class_attention, round(length * share("attended", attended)))
    rest = others(top, count)
    even = rest[:, spread(rest.shape[1], length - top.shape[1], metric.device)]
    kept = torch.cat([top, even], 1).sort(1).values  # (B, M)
    unit = F.normalize(metric, dim=-1)
    scores = tokens_at(unit, kept) @ unit.transpose(1, 2)  # (B, M, N)
    scores = scores.scatter(2, kept.unsqueeze(2), torch.inf)  # itself comes first
    group = scores.argsort(dim=2, descending=True, stable=True)[..., :near]
    wide = class_attention.to(torch.promote_types(metric.dtype, torch.float32))
    seen = wide.unsqueeze(1).expand(scores.shape).gather(2, group) + torch.finfo(wide.dtype).tiny  # not all 0
    mixing = torch.zeros_like(scores, dtype=wide.dtype).scatter(2, group, seen / seen.sum(2, keepdim=True))
    return closest(metric, kept), mixing
