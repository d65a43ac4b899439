"""The averages of a merge on CUDA: a Triton kernel that writes every kept token once; no gradients.

Equal to `merge.reduce._average` up to the order of float32 sums. The first call compiles. No call waits
for the GPU, so that CUDA graphs can capture it.
Shapes: B images, N tokens before, M after, R = N - M that are gone, D channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHANNELS = 512  # at most, in a program: four for each of its 128 threads


def average(x: Tensor, share: Tensor, plan: tuple[Tensor, int, Tensor, Tensor]) -> Tensor:
    """Returns the sum over each slot of share times token: (B, M, D) in the dtype of `x`, summed in float32.

    A slot's kept token is added first, then those that merge into it by ascending position, independent of
    the batch: two runs agree in every bit, and a token alone in its slot is copied.

    Args:
        x: (B, N, D) tokens.
        share: (B, N) float32, exactly 1 for a token alone in its slot.
        plan: a MergePlan, whose module imports this package.

    Raises:
        ValueError: tokens or shares of another dtype.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"x has dtype {x.dtype}; allowed are {', '.join(map(str, DTYPES))}")
    if share.dtype != torch.float32:
        raise ValueError(f"share has dtype {share.dtype}; it must be torch.float32")
    slot, length, kept, gone = plan
    batch, count, width = x.shape
    target, order = slot.gather(1, gone).sort(dim=1, stable=True)  # (B, R), grouped by slot
    gone = gone.gather(1, order)
    slots = torch.arange(length + 1, device=x.device).repeat(batch, 1)
    starts = torch.searchsorted(target, slots)  # (B, M + 1), where each slot begins in `gone`
    x, share, kept = x.contiguous(), share.contiguous(), kept.contiguous()
    out = x.new_empty(batch, length, width)
    block = min(CHANNELS, triton.next_power_of_2(width))
    with torch.cuda.device_of(x):
        grid = (length, batch, triton.cdiv(width, block))
        _average[grid](x, share, kept, gone, starts, out, count, length, width, CHANNELS=block)
    return out


@triton.jit(do_not_specialize=["count", "length"])  # they differ between layers
def _average(x, share, kept, gone, starts, out, count, length, width, CHANNELS: tl.constexpr):
    """Writes CHANNELS channels of one slot of one image; grid (M, B, blocks of channels)."""
    slot, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < width
    x += image * count * width
    share += image * count
    gone += image * (count - length)
    starts += image * (length + 1) + slot
    row = image * length + slot
    token = tl.load(kept + row)
    total = tl.load(share + token) * tl.load(x + token * width + channel, mask=is_channel).to(tl.float32)
    for i in range(tl.load(starts), tl.load(starts + 1)):
        token = tl.load(gone + i)
        total += tl.load(share + token) * tl.load(x + token * width + channel, mask=is_channel).to(tl.float32)
    tl.store(out + row * width + channel, total, mask=is_channel)
