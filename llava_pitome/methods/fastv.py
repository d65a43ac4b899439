"""FastV: image tokens that get little attention in the LLM go (Chen et al., ECCV 2024, arXiv:2403.06764).

The paper ranks the image's tokens, behind the LLM's second layer, by "the average attention-score one token
received from all other tokens" (section 4.1) and drops the lowest; `kept` does that. The authors' code looks
at the attention of the prompt's last token instead (their issues 14, 44 and 48); `kept_by_last` does that.
"""

from torch import Tensor

from llava_pitome.methods._common import best


def kept(metric: Tensor, remove: int, *, depth: float = 0.0, received_attention: Tensor) -> Tensor:
    """Who stays (B, N - remove), ascending: those that get most attention. Ties go to the lower index.

    Args:
        metric: (B, N, D); only its shape counts.
        remove: tokens that go, at most N - 1.
        depth: not used by this method.
        received_attention: (B, N) the attention that each gets, the mean over all queries.
    """
    return best(received_attention, metric.shape[1] - remove)


def kept_by_last(metric: Tensor, remove: int, *, depth: float = 0.0, last_attention: Tensor) -> Tensor:
    """`kept`, by the attention (B, N) of the prompt's last token."""
    return best(last_attention, metric.shape[1] - remove)
