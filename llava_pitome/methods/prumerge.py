"""LLaVA-PruMerge+: kept tokens average their neighbours (Shang et al., ICCV 2025, arXiv:2403.15388)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from llava_pitome.merge.plan import gather_tokens
from llava_pitome.merge.reduce import MergeResult
from llava_pitome.methods._common import complement, evenly_spaced, highest, most_similar
from llava_pitome.methods.registry import Method, parameter, register_method
from llava_pitome.plain_values import plain


@register_method("prumerge")
@dataclass(frozen=True)
class PruMerge(Method):
    """Keeps the most attended tokens and uniformly spaced others, each averaged with its neighbours.

    The average over a kept token and the tokens most similar to it by keys is weighted by the class token's
    attention. The paper keeps outliers of the attention, about 32 an image, and about 144 with the uniform
    ones; here both are shares of a given count. Neighbours are any other tokens, as in the authors' code, so
    that groups may overlap; parents only name the most similar kept token. Ties go to the lower index.
    """

    needs = ("class_attention",)
    places = ("prefix",)
    prefix_metric = "keys"

    attended: float = parameter(
        32 / 144,
        "share of the kept tokens that attention chooses; the others are evenly spaced",
        least=0,
        most=1,
    )
    neighbours: int = parameter(32, "tokens averaged with each kept token; 32 in the authors' code", least=0)

    def merge(
        self, metric: Tensor, remove: int, depth: float = 0.0, *, class_attention: Tensor
    ) -> MergeResult:
        """Returns the decision by the class token's attention (B, N), with the coefficients (B, M, N)."""
        count = plain(metric.shape[1])
        length = count - remove
        attended = highest(class_attention, round(length * self.attended))
        rest = complement(attended, count)
        even = rest[:, evenly_spaced(rest.shape[1], length - attended.shape[1], metric.device)]
        kept = torch.cat([attended, even], 1).sort(1).values  # (B, M)
        unit = F.normalize(metric, dim=-1)
        scores = gather_tokens(unit, kept) @ unit.transpose(1, 2)  # (B, M, N)
        scores = scores.scatter(2, kept.unsqueeze(2), torch.inf)  # the kept token itself is in its group
        group = scores.argsort(dim=2, descending=True, stable=True)[..., : self.neighbours + 1]
        attention = class_attention.to(torch.promote_types(metric.dtype, torch.float32))
        weight = attention.unsqueeze(1).expand(scores.shape).gather(2, group)
        weight = weight + torch.finfo(attention.dtype).tiny  # not all 0
        mixing = torch.zeros_like(scores, dtype=attention.dtype)
        mixing = mixing.scatter(2, group, weight / weight.sum(2, keepdim=True))
        return MergeResult(most_similar(metric, kept), mixing=mixing)
