"""SparseVLM: text tokens rate the image's tokens (Zhang et al., ICML 2025, arXiv:2410.04417)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_pitome.merge.plan import gather_tokens
from llava_pitome.merge.reduce import MergeResult
from llava_pitome.methods._common import complement, highest, most_similar
from llava_pitome.methods.registry import Method, parameter, register_method
from llava_pitome.plain_values import plain

TOLERANCE = 1 - 1e-5  # of the mean, so that text tokens of equal relevance are all raters despite rounding


@register_method("sparsevlm")
@dataclass(frozen=True)
class SparseVLM(Method):
    """Raters are the text tokens whose relevance to the image is at least the mean; they score its tokens.

    A token's score is the raters' mean attention to it. The highest scores are kept. Of the others, the share
    tau (`recycled`) with the highest scores is recycled: grouped around density peaks, theta (`peaks`) groups
    a token, each averaged into one token at its peak.

    The paper removes as many tokens as the attention's rank suggests and adds the recycled groups; here the
    count is given and includes them, at most half of it. Groups are averaged, not summed. Relevance is
    measured on the layer's metric, not on embeddings. Ties go to the lower index. The
    parent of a dropped token, for provenance, is the most similar kept token.
    """

    needs = ("text", "text_attention", "text_mask")
    places = ("decoder",)

    recycled: float = parameter(
        0.3, "tau, the share of the lower scores that is recycled; 0.3 in the authors' code", least=0, most=1
    )
    peaks: float = parameter(
        0.1, "theta, groups per recycled token; 0.1 in the authors' code", least=0, most=1
    )
    neighbours: int | None = parameter(
        None, "tokens that density is measured on; None: as many as groups, as in the authors' code", least=1
    )

    def merge(
        self,
        metric: Tensor,
        remove: int,
        depth: float = 0.0,
        *,
        text: Tensor,
        text_attention: Tensor,
        text_mask: Tensor,
    ) -> MergeResult:
        """Returns the decision by text tokens (B, Q, D), their attention (B, Q, N) and their mask (B, Q)."""
        count = plain(metric.shape[1])
        pooled, groups = recycled_counts(count, remove, self.recycled, self.peaks)
        score = ratings(metric, text, text_attention, text_mask)
        kept = highest(score, count - remove - groups)
        weight = torch.zeros(score.shape, device=metric.device).scatter(1, kept, 1.0)
        if not groups:
            return MergeResult(most_similar(metric, kept), weight=weight)
        rest = complement(kept, count)
        pool = rest.gather(1, highest(score.gather(1, rest), pooled))  # (B, P)
        tokens = gather_tokens(metric, pool)
        centres = density_peaks(tokens, groups, self.neighbours or groups)  # (B, C) positions within the pool
        kept = torch.cat([kept, pool.gather(1, centres)], 1).sort(1).values
        parent = most_similar(metric, kept).scatter(1, pool, pool.gather(1, most_similar(tokens, centres)))
        return MergeResult(parent, weight=weight.scatter(1, pool, 1.0))


def recycled_counts(count: int, remove: int, recycled: float, peaks: float) -> tuple[int, int]:
    """Returns how many of `count` tokens are recycled when `remove` go, and the groups they become.

    K tokens are kept for their scores and C groups, K + C of them given, with C = theta tau (count - K).
    """
    both = recycled * peaks
    length = count - remove
    groups = length // 2 if both == 1 else min(math.ceil(remove * both / (1 - both)), length // 2)
    return max(round(recycled * (remove + groups)), groups), groups


def ratings(metric: Tensor, text: Tensor, text_attention: Tensor, text_mask: Tensor) -> Tensor:
    """Returns the mean attention (B, N) of the raters among the text tokens (equations 3 to 6)."""
    wide = torch.promote_types(metric.dtype, torch.float32)
    product = metric.to(wide) @ text.to(wide).transpose(1, 2)  # (B, N, Q)
    product = product.masked_fill(~text_mask.unsqueeze(1), torch.finfo(wide).min)
    relevance = product.softmax(2).mean(1).masked_fill(~text_mask, 0)  # (B, Q)
    mean = relevance.sum(1, keepdim=True) / text_mask.sum(1, keepdim=True).clamp(min=1)
    is_rater = text_mask & (relevance >= TOLERANCE * mean)
    attention = text_attention.to(wide).masked_fill(~is_rater.unsqueeze(2), 0)
    return attention.sum(1) / is_rater.sum(1, keepdim=True).clamp(min=1)


def density_peaks(x: Tensor, count: int, neighbours: int) -> Tensor:
    """Returns `count` of the tokens (B, P, D), ascending (B, count): dense ones far from denser ones.

    Distances are divided by the root of D, as in the authors' code: otherwise the density, the exponential of
    minus the mean square distance to the nearest `neighbours`, would vanish for wide tokens.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # not by products, which lose the digits of small distances
    distance = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[2] ** 0.5
    near = distance.sort(2).values[..., 1 : neighbours + 1]  # the nearest is the token itself
    density = (-near.square().sum(2) / max(near.shape[2], 1)).exp()  # (B, P)
    is_denser = density.unsqueeze(1) > density.unsqueeze(2)  # (B, P, P) whether the second is
    separation = distance.masked_fill(~is_denser, torch.inf).amin(2)
    separation = torch.where(is_denser.any(2), separation, distance.amax(2))
    return highest(density * separation, count)
