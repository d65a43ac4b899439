"""SparseVLM: words about the image rate its tokens (Zhang et al., ICML 2025, arXiv:2410.04417).

Text tokens whose relevance to the image is not below the mean are raters, and a token's score is their mean
attention to it. The highest scores stay. Of the others, the share tau with the highest scores is recycled:
they are grouped around density peaks, theta times as many as they are, and a group becomes one token.

The paper removes as many tokens as the attention's rank suggests, and the recycled come on top; here the
count is given and holds both, divided as tau and theta say, at most half of it recycled. A group is averaged,
not added up, and stands where its peak stood. Relevance is measured where tokens merge, not on embeddings.
"""

import math

import torch
from torch import Tensor

from llava_pitome.methods._common import best, closest, others, share, tokens_at, whole

ALMOST = 1 - 1e-5  # of the mean: words of equal relevance, which rounding tells apart, all rate


def weighted(
    metric: Tensor,
    remove: int,
    *,
    depth: float = 0.0,
    text: Tensor,
    text_attention: Tensor,
    asks: Tensor,
    recycled: float = 0.3,
    peaks: float = 0.1,
    neighbours: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The token each token folds into (B, N), and how much of each token counts there (B, N).

    Ties go to the lower index. A dropped token has a parent too, for provenance: the most similar survivor.

    Args:
        metric: (B, N, D) what similarity is measured on.
        remove: tokens that go, at most N - 1.
        depth: not used by this method.
        text: (B, Q, D) the text tokens.
        text_attention: (B, Q, N) the attention of each text token.
        asks: (B, Q) False where a text token is padding.
        recycled: tau, the share of the lower scores that is recycled; the authors' code has 0.3.
        peaks: theta, the groups per token that these become; the authors' code has 0.1.
        neighbours: tokens that density is measured by; None: as many as groups, as the authors' code does.

    Raises:
        ValueError: a share that is no number from 0 to 1, `neighbours` that is no whole number from 1.
    """
    if neighbours is not None:
        whole("neighbours", neighbours, 1)
    count = metric.shape[1]
    pooled, groups = recycling(count, remove, share("recycled", recycled), share("peaks", peaks))
    score = ratings(metric, text, text_attention, asks)
    kept = best(score, count - remove - groups)
    weight = torch.zeros(score.shape, device=metric.device).scatter(1, kept, 1.0)
    if not groups:
        return closest(metric, kept), weight
    rest = others(kept, count)
    pool = rest.gather(1, best(score.gather(1, rest), pooled))  # (B, P)
    tokens = tokens_at(metric, pool)
    found = density_peaks(tokens, groups, neighbours or groups)  # (B, C) within the pool
    kept = torch.cat([kept, pool.gather(1, found)], 1).sort(1).values
    parent = closest(metric, kept).scatter(1, pool, pool.gather(1, closest(tokens, found)))
    return parent, weight.scatter(1, pool, 1.0)


def recycling(count: int, remove: int, recycled: float, peaks: float) -> tuple[int, int]:
    """Tokens that are recycled, and the groups they become, of `count` tokens of which `remove` go.

    K tokens stay for their scores and C groups, K + C of them given, with C = theta tau (count - K).
    """
    both = recycled * peaks
    length = count - remove
    groups = length // 2 if both == 1 else min(math.ceil(remove * both / (1 - both)), length // 2)
    return max(round(recycled * (remove + groups)), groups), groups


def ratings(metric: Tensor, text: Tensor, text_attention: Tensor, asks: Tensor) -> Tensor:
    """The mean attention (B, N) of the raters among the text tokens (equations 3 to 6)."""
    wide = torch.promote_types(metric.dtype, torch.float32)
    product = metric.to(wide) @ text.to(wide).transpose(1, 2)  # (B, N, Q)
    padding = ~asks.unsqueeze(1)
    relevance = product.masked_fill(padding, torch.finfo(wide).min).softmax(2).mean(1)  # (B, Q)
    relevance = relevance.masked_fill(~asks, 0)
    mean = relevance.sum(1, keepdim=True) / asks.sum(1, keepdim=True).clamp(min=1)
    rates = asks & (relevance >= ALMOST * mean)
    seen = text_attention.to(wide).masked_fill(~rates.unsqueeze(2), 0)
    return seen.sum(1) / rates.sum(1, keepdim=True).clamp(min=1)


def density_peaks(x: Tensor, count: int, neighbours: int) -> Tensor:
    """`count` of the tokens (B, P, D), ascending: (B, count); dense ones that are far from denser ones.

    Distances are divided by the root of D, as in the authors' code: the density, the exponential of minus the
    mean square distance to the nearest `neighbours`, would vanish for wide tokens.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # without products, which would blur small distances
    distance = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[2] ** 0.5
    near = distance.sort(2).values[..., 1 : neighbours + 1]  # the nearest is the token itself
    density = (-near.square().sum(2) / max(near.shape[2], 1)).exp()  # (B, P)
    denser = density.unsqueeze(1) > density.unsqueeze(2)  # (B, P, P) whether the second is
    apart = distance.masked_fill(~denser, torch.inf).amin(2)
    apart = torch.where(denser.any(2), apart, distance.amax(2))
    return best(density * apart, count)
