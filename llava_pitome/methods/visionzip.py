"""VisionZip: keep what is attended, pool the rest around a few (Yang et al., CVPR 2025, arXiv:2412.04467).

Tokens that the class token attends to most stay as they are (dominant). Of the others, targets are sampled
uniformly, and all that are left merge into the most similar target by their keys (contextual). At least one
target is kept here, so that nobody is dropped; groups are plain averages, and survivors keep raster order.
"""

from torch import Tensor

from llava_pitome.methods._common import best, closest, others, share, spread, tokens_at


def parents(
    metric: Tensor, remove: int, *, depth: float = 0.0, class_attention: Tensor, contextual: float = 10 / 64
) -> Tensor:
    """The token each token folds into: (B, N), itself for the N - remove that survive.

    Args:
        metric: (B, N, D) what similarity is measured on; the attention keys, in the paper.
        remove: tokens that go, at most N - 1.
        depth: not used by this method.
        class_attention: (B, N) the class token's attention.
        contextual: share of the survivors that others merge into; of 64 the paper has 54 + 10.

    Raises:
        ValueError: `contextual` that is no number from 0 to 1.
    """
    count = metric.shape[1]
    length = count - remove
    targets = max(round(length * share("contextual", contextual)), 1)
    dominant = best(class_attention, length - targets)
    rest = others(dominant, count)  # (B, N - dominant)
    even = spread(rest.shape[1], targets, metric.device).expand(len(rest), -1)  # (B, targets) within the rest
    joined = rest.gather(1, closest(tokens_at(metric, rest), even))
    return rest.new_empty(len(rest), count).scatter(1, dominant, dominant).scatter(1, rest, joined)
