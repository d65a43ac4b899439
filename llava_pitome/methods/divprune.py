"""DivPrune: keep tokens that are far from each other (Alvar et al., CVPR 2025, arXiv:2503.02175)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from llava_pitome.merge.plan import gather_tokens
from llava_pitome.merge.reduce import MergeResult
from llava_pitome.methods._common import prune
from llava_pitome.methods.registry import Method, register_method


@register_method("divprune")
class DivPrune(Method):
    """Pruning as a max-min diversity problem, solved greedily (algorithm 1).

    The first token kept is the farthest from its nearest neighbour; each next one is the farthest from its
    nearest kept token. The distance is 1 - cosine, in the paper of the projected features. Ties go to the
    lower index; kept tokens stay in raster order.
    """

    places = ("prefix", "decoder")

    def merge(self, metric: Tensor, remove: int, depth: float = 0.0) -> MergeResult:
        """Returns the kept tokens."""
        count = metric.shape[1]
        unit = F.normalize(metric, dim=-1)
        distance = 1 - unit @ unit.transpose(1, 2)  # (B, N, N)
        distance = torch.maximum(distance, distance.transpose(1, 2))  # the product may be asymmetric by a bit
        diagonal = torch.eye(count, dtype=torch.bool, device=metric.device)
        picked = distance.masked_fill(diagonal, torch.inf).amin(2).argmax(1, keepdim=True)  # (B, 1)
        kept, nearest = [picked], torch.full_like(distance[:, 0], torch.inf)
        for _ in range(count - remove - 1):
            nearest = torch.minimum(nearest, gather_tokens(distance, picked).squeeze(1))
            nearest = nearest.scatter(1, picked, -torch.inf)  # no token is picked twice
            picked = nearest.argmax(1, keepdim=True)
            kept.append(picked)
        return prune(torch.cat(kept, 1).sort(1).values, count)
