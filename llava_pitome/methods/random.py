"""The control: who goes is drawn by lot. Whatever a method claims has to be claimed against this."""

import torch
from torch import Tensor
from torch.nn import functional as F


def parents(metric: Tensor, remove: int, *, depth: float = 0.0, seed: int = 0) -> Tensor:
    """The token each token folds into: (B, N), itself for the N - remove that survive.

    The draw is the same for every image, so that an answer does not depend on who else is in the batch; those
    who go join the most similar of those who stay.

    Args:
        metric: (B, N, D) what similarity is measured on.
        remove: tokens that go, at most N // 2.
        depth: with `seed`, what the draw depends on, so that layers differ.
        seed: number of the draw.

    Raises:
        ValueError: a seed that is no whole number from 0.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed={seed!r} is not allowed: it must be a whole number from 0")
    count = metric.shape[1]
    generator = torch.Generator("cpu").manual_seed((seed * 1000 + round(depth * 999)) * 100_000 + count)
    drawn = torch.randperm(count, generator=generator, device="cpu").to(metric.device)
    gone, kept = drawn[:remove].sort().values, drawn[remove:].sort().values
    unit = F.normalize(metric, dim=-1)
    closest = kept[(unit[:, gone] @ unit[:, kept].transpose(1, 2)).argmax(-1)]  # (B, remove)
    parent = torch.arange(count, device=metric.device).repeat(metric.shape[0], 1)
    return parent.scatter(1, gone.expand(metric.shape[0], -1), closest)
