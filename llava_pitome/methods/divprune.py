"""DivPrune: keep tokens that are far from each other (Alvar et al., CVPR 2025, arXiv:2503.02175).

Pruning as a max-min diversity problem, solved greedily (algorithm 1): first the token farthest from its
nearest neighbour, then again and again the one farthest from its nearest among those chosen. Nothing here
deviates, but that survivors keep raster order.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from llava_pitome.methods._common import tokens_at


def kept(metric: Tensor, remove: int, *, depth: float = 0.0) -> Tensor:
    """Who stays (B, N - remove), ascending. Ties go to the lower index.

    Args:
        metric: (B, N, D) what distance, 1 - cosine, is measured on; the projected features, in the paper.
        remove: tokens that go, at most N - 1.
        depth: not used by this method.
    """
    unit = F.normalize(metric, dim=-1)
    distance = 1 - unit @ unit.transpose(1, 2)  # (B, N, N)
    distance = torch.maximum(distance, distance.transpose(1, 2))  # a product need not be symmetric to the bit
    itself = torch.eye(metric.shape[1], dtype=torch.bool, device=metric.device)
    picked = distance.masked_fill(itself, torch.inf).amin(2).argmax(1, keepdim=True)  # (B, 1)
    chosen, nearest = [picked], torch.full_like(distance[:, 0], torch.inf)
    for _ in range(metric.shape[1] - remove - 1):
        nearest = torch.minimum(nearest, tokens_at(distance, picked).squeeze(1))
        nearest = nearest.scatter(1, picked, -torch.inf)  # nobody is chosen twice
        picked = nearest.argmax(1, keepdim=True)
        chosen.append(picked)
    return torch.cat(chosen, 1).sort(1).values
