"""VisionZip: keep attended tokens, merge the rest into a few (Yang et al., CVPR 2025, arXiv:2412.04467)."""

from dataclasses import dataclass

from torch import Tensor

from llava_pitome.merge.plan import gather_tokens
from llava_pitome.merge.reduce import MergeResult
from llava_pitome.methods._common import complement, evenly_spaced, highest, most_similar
from llava_pitome.methods.registry import Method, parameter, register_method
from llava_pitome.plain_values import plain


@register_method("visionzip")
@dataclass(frozen=True)
class VisionZip(Method):
    """Dominant tokens, which the class token attends to most, are kept unchanged; the others merge.

    Of the others, contextual tokens are sampled uniformly, and the rest merge into the most similar of them
    by keys. At least one contextual token is kept, so that no token is dropped. Groups are plain averages and
    kept tokens stay in raster order.
    """

    needs = ("class_attention",)
    places = ("prefix",)
    prefix_metric = "keys"

    contextual: float = parameter(
        10 / 64, "share of the kept tokens that others merge into; 10 of 64 in the paper", least=0, most=1
    )

    def merge(
        self, metric: Tensor, remove: int, depth: float = 0.0, *, class_attention: Tensor
    ) -> MergeResult:
        """Returns the decision by the class token's attention (B, N)."""
        count = plain(metric.shape[1])
        length = count - remove
        num_contextual = max(round(length * self.contextual), 1)
        dominant = highest(class_attention, length - num_contextual)
        rest = complement(dominant, count)  # (B, N - dominant)
        contextual = evenly_spaced(rest.shape[1], num_contextual, metric.device)  # positions within the rest
        closest = most_similar(gather_tokens(metric, rest), contextual.expand(len(rest), -1))
        parent = rest.new_empty(len(rest), count).scatter(1, dominant, dominant)
        return MergeResult(parent.scatter(1, rest, rest.gather(1, closest)))
