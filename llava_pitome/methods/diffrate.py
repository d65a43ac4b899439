"""DiffRate: prune the least attended tokens, merge the next (Chen et al., ICCV 2023, arXiv:2305.17997)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava_pitome.merge.reduce import MergeResult
from llava_pitome.methods._common import most_similar
from llava_pitome.methods.registry import Method, parameter, register_method


@register_method("diffrate")
@dataclass(frozen=True)
class DiffRate(Method):
    """Tokens are ranked by the class token's attention: the last are dropped, those before them merge.

    A merged token joins the most similar kept token. The paper learns both counts for each layer; here the
    layer's count is given and `prune` divides it. Ties go to the lower index. The parent of a dropped token,
    for provenance, is the most similar kept token.
    """

    needs = ("class_attention",)
    places = ("tower", "prefix")

    prune: float = parameter(0.5, "share of the removed tokens that is dropped", least=0, most=1)

    def merge(
        self, metric: Tensor, remove: int, depth: float = 0.0, *, class_attention: Tensor
    ) -> MergeResult:
        """Returns the decision by the class token's attention (B, N)."""
        dropped = round(remove * self.prune)
        count = metric.shape[1]
        ranking = class_attention.argsort(dim=1, descending=True, stable=True)
        parent = most_similar(metric, ranking[:, : count - remove].sort(1).values)
        weight = torch.ones(parent.shape, device=metric.device).scatter(1, ranking[:, count - dropped :], 0.0)
        return MergeResult(parent, weight=weight)
