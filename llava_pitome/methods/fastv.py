"""FastV: drop image tokens of little attention in the LLM (Chen et al., ECCV 2024, arXiv:2403.06764).

The paper ranks image tokens, after the LLM's second layer, by "the average attention-score one token received
from all other tokens" (section 4.1): `fastv`. The authors' code ranks them by the attention of the prompt's
last token (its issues 14, 44 and 48): `fastv-last`. Ties go to the lower index.
"""

from torch import Tensor

from llava_pitome.merge.reduce import MergeResult
from llava_pitome.methods._common import highest, prune
from llava_pitome.methods.registry import Method, register_method


@register_method("fastv")
class FastV(Method):
    """Keeps the tokens that receive most attention from all tokens. Only the metric's shape counts."""

    needs = ("received_attention",)
    places = ("decoder",)

    def merge(
        self, metric: Tensor, remove: int, depth: float = 0.0, *, received_attention: Tensor
    ) -> MergeResult:
        """Returns the decision by the attention (B, N) that tokens receive."""
        return prune(highest(received_attention, metric.shape[1] - remove), metric.shape[1])


@register_method("fastv-last")
class FastVLast(Method):
    """Keeps the tokens that the prompt's last token attends to most. Only the metric's shape counts."""

    needs = ("last_attention",)
    places = ("decoder",)

    def merge(
        self, metric: Tensor, remove: int, depth: float = 0.0, *, last_attention: Tensor
    ) -> MergeResult:
        """Returns the decision by the last token's attention (B, N)."""
        return prune(highest(last_attention, metric.shape[1] - remove), metric.shape[1])
