"""ToMe: alternating bipartite soft matching (Bolya et al., ICLR 2023, arXiv:2210.09461)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def parents(metric: Tensor, remove: int, *, depth: float = 0.0) -> Tensor:
    """The token each token folds into: (B, N), itself for the N - remove that survive.

    Even positions are A, odd positions B; the `remove` tokens of A that are most similar to their closest b
    join it. Ties go to the lower index. The method is the same at every `depth`.

    Args:
        metric: (B, N, D) what similarity is measured on; the attention keys, in the paper.
        remove: tokens that go, at most N // 2.
        depth: not used by this method.
    """
    unit = F.normalize(metric, dim=-1)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # (B, A, B)
    best, closest = scores.max(-1)  # max takes the first of equals
    gone = best.argsort(dim=1, descending=True, stable=True)[:, :remove]
    parent = torch.arange(metric.shape[1], device=metric.device).repeat(metric.shape[0], 1)
    return parent.scatter(1, 2 * gone, 2 * closest.gather(1, gone) + 1)
