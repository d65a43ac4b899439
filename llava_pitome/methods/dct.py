"""DCT: cut off high frequencies of the token sequence (He et al., Findings of ACL 2023, arXiv:2305.15099)."""

import math

import torch
from torch import Tensor

from llava_pitome.merge.reduce import MergeResult
from llava_pitome.methods._common import segment_middle, segment_of
from llava_pitome.methods.registry import Method, register_method


@register_method("dct")
class DCT(Method):
    """The Fourier Transformer's reduction: M tokens by the inverse transform of the lowest M frequencies.

    The discrete cosine transform runs along the sequence. The result is scaled so that a sequence of equal
    tokens stays the same. No token is kept unchanged: parents only name the segment of the raster that an
    output token covers. Only the metric's shape counts.
    """

    def merge(self, metric: Tensor, remove: int, depth: float = 0.0) -> MergeResult:
        """Returns the segments' middles and the coefficients (1, M, N)."""
        count = metric.shape[1]
        length = count - remove
        dtype = torch.promote_types(metric.dtype, torch.float32)
        forward = cosines(length, count, metric.device, dtype)  # (M, N)
        inverse = cosines(length, length, metric.device, dtype).T  # (M, M)
        mixing = math.sqrt(length / count) * inverse @ forward  # rows add up to 1
        position = torch.arange(count, device=metric.device)
        parent = segment_middle(segment_of(position, count, length), count, length)
        return MergeResult(parent.repeat(len(metric), 1), mixing=mixing.unsqueeze(0))


def cosines(rows: int, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns the first rows (rows, length) of the orthonormal DCT-II."""
    frequency = torch.arange(rows, device=device).unsqueeze(1)
    position = torch.arange(length, device=device)
    angle = (2 * position + 1) * frequency % (4 * length)  # in whole numbers, exact for large angles
    wave = (angle.to(dtype) * (math.pi / (2 * length))).cos() * math.sqrt(2 / length)
    return wave.masked_fill(frequency == 0, math.sqrt(1 / length))
