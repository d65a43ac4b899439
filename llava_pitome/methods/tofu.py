"""ToFu: prune in the first layers, merge in the later ones (Kim et al., WACV 2024, arXiv:2312.01026)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava_pitome.merge.reduce import MergeResult
from llava_pitome.methods import tome
from llava_pitome.methods.registry import Method, parameter, register_method


@register_method("tofu")
@dataclass(frozen=True)
class ToFu(Method):
    """Tokens are paired as in ToMe. A removed token is dropped in early layers and averaged in later ones.

    Averages are scaled to the norm of the longer token (MLERP). Pruning is for layers that are far from
    linear: the paper measures which, per model and task; here they are those before the depth `prune_until`.
    """

    pairs_tokens = True

    prune_until: float = parameter(
        0.5, "depth from which removed tokens are averaged; before it they are dropped", least=0, most=1
    )

    def merge(self, metric: Tensor, remove: int, depth: float = 0.0) -> MergeResult:
        """Returns the pairs, with the weight 0 for dropped tokens."""
        parent = tome.match(metric, remove)
        weight = torch.ones(parent.shape, device=metric.device)
        if depth < self.prune_until:
            weight = (parent == torch.arange(parent.shape[1], device=metric.device)).to(weight)
        return MergeResult(parent, weight=weight, keeps_norm=True)
