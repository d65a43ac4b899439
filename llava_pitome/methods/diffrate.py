"""DiffRate: prune the least attended, merge the next (Chen et al., ICCV 2023, arXiv:2305.17997).

Tokens are sorted by the class token's attention. The last of them are dropped; those in front of these are
merged, each into the most similar of the tokens that remain. The paper learns how many of each, per layer;
here the layer's count is given and `prune` divides it.
"""

import torch
from torch import Tensor

from llava_pitome.methods._common import closest, share


def weighted(
    metric: Tensor, remove: int, *, depth: float = 0.0, class_attention: Tensor, prune: float = 0.5
) -> tuple[Tensor, Tensor]:
    """The token each token folds into (B, N), and how much of each token counts there (B, N).

    Ties go to the lower index. A dropped token has a parent too, for provenance: the most similar survivor.

    Args:
        metric: (B, N, D) what similarity is measured on.
        remove: tokens that go, at most N - 1.
        depth: not used by this method.
        class_attention: (B, N) the class token's attention.
        prune: share of those who go that is dropped; half, for want of learned rates.

    Raises:
        ValueError: `prune` that is no number from 0 to 1.
    """
    dropped = round(remove * share("prune", prune))
    count = metric.shape[1]
    down = class_attention.argsort(dim=1, descending=True, stable=True)
    parent = closest(metric, down[:, : count - remove].sort(1).values)
    weight = torch.ones(parent.shape, device=metric.device).scatter(1, down[:, count - dropped :], 0.0)
    return parent, weight
