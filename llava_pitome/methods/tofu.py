"""ToFu: prune in the first layers, merge in the later ones (Kim et al., WACV 2024, arXiv:2312.01026).

Tokens are matched as in ToMe. Where the layers behind are far from linear, which early ones are, a token that
goes is dropped and its partner stays as it is; later they are averaged, and the average is stretched to the
norm of the longer (MLERP). The paper finds by measurement where one turns into the other, per model and task;
here it is half of the encoder, unless `prune_until` says otherwise. The norms are the caller's part: see
`Method.keeps_norm`.
"""

import torch
from torch import Tensor

from llava_pitome.methods import tome
from llava_pitome.methods._common import share


def weighted(
    metric: Tensor, remove: int, *, depth: float = 0.0, prune_until: float = 0.5
) -> tuple[Tensor, Tensor]:
    """The token each token folds into (B, N), and how much of each token counts there (B, N).

    Args:
        metric: (B, N, D) what similarity is measured on; the attention keys, in the paper.
        remove: tokens that go, at most N // 2.
        depth: how far up the encoder this is, 0 to 1.
        prune_until: depth from which those who go are merged; before it they are dropped.

    Raises:
        ValueError: `prune_until` that is no number from 0 to 1.
    """
    share("prune_until", prune_until)
    parent = tome.parents(metric, remove)
    weight = torch.ones(parent.shape, device=metric.device)
    if depth < prune_until:
        weight = (parent == torch.arange(parent.shape[1], device=metric.device)).to(weight)
    return parent, weight
