"""ToMe: alternating bipartite soft matching (Bolya et al., ICLR 2023, arXiv:2210.09461)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from llava_pitome.merge.reduce import MergeResult
from llava_pitome.methods.registry import Method, register_method


def match(metric: Tensor, remove: int) -> Tensor:
    """Returns the parents (B, N) of bipartite matching on the metric (B, N, D)."""
    unit = F.normalize(metric, dim=-1)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # (B, |A|, |B|)
    best, closest = scores.max(-1)  # max takes the first of equals
    gone = best.argsort(dim=1, descending=True, stable=True)[:, :remove]
    parent = torch.arange(metric.shape[1], device=metric.device).repeat(metric.shape[0], 1)
    return parent.scatter(1, 2 * gone, 2 * closest.gather(1, gone) + 1)


@register_method("tome")
class ToMe(Method):
    """Tokens at even positions (A) merge into their most similar token at an odd position (B).

    The `remove` most similar pairs merge; ties go to the lower index. The paper measures similarity on the
    attention keys.
    """

    pairs_tokens = True

    def merge(self, metric: Tensor, remove: int, depth: float = 0.0) -> MergeResult:
        """Returns the pairs; the method is the same at every depth."""
        return MergeResult(match(metric, remove))
