"""The averages of a merge on CUDA: a Triton kernel that writes every surviving token once; no gradients.

The same as `merging._average` apart from the order of float32 sums. The first call compiles. Nothing waits
for the GPU, so that CUDA graphs can capture the calls behind it.
Shapes: B images, N tokens before, M after, R = N - M that go, D channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHANNELS = 512  # a program's, at most: four for each of its 128 threads


def average(x: Tensor, share: Tensor, plan: tuple[Tensor, int, Tensor, Tensor]) -> Tensor:
    """The sum over each slot of share times token: (B, M, D) in the dtype of `x`, summed in float32.

    A slot's survivor is added first, then those that fold into it by rising position, whatever else is in the
    batch: two runs agree to the bit, and a token that stays alone comes out as it went in.

    Args:
        x: (B, N, D) tokens.
        share: (B, N) float32, exactly 1 for a token that stays alone.
        plan: a `merging.Plan`; no type of this package, since `merging` may call this.

    Raises:
        ValueError: tokens or shares in another dtype.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"x has dtype {x.dtype}; allowed are {', '.join(map(str, DTYPES))}")
    if share.dtype != torch.float32:
        raise ValueError(f"share has dtype {share.dtype}; it must be torch.float32")
    slot, length, kept, gone = plan
    batch, count, width = x.shape
    target, order = slot.gather(1, gone).sort(dim=1, stable=True)  # those of one slot together: (B, R)
    gone = gone.gather(1, order)
    slots = torch.arange(length + 1, device=x.device).repeat(batch, 1)
    starts = torch.searchsorted(target, slots)  # (B, M + 1), where each slot's begin in `gone`
    x, share, kept = x.contiguous(), share.contiguous(), kept.contiguous()
    out = x.new_empty(batch, length, width)
    block = min(CHANNELS, triton.next_power_of_2(width))
    with torch.cuda.device_of(x):
        grid = (length, batch, triton.cdiv(width, block))
        _average[grid](x, share, kept, gone, starts, out, count, length, width, CHANNELS=block)
    return out


@triton.jit(do_not_specialize=["count", "length"])  # which differ from layer to layer
def _average(x, share, kept, gone, starts, out, count, length, width, CHANNELS: tl.constexpr):
    """Writes CHANNELS channels of one slot of one image; grid (M, B, blocks of channels)."""
    slot, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < width
    x += image * count * width
    share += image * count
    gone += image * (count - length)
    starts += image * (length + 1) + slot
    place = image * length + slot
    token = tl.load(kept + place)
    total = tl.load(share + token) * tl.load(x + token * width + channel, mask=inside).to(tl.float32)
    for i in range(tl.load(starts), tl.load(starts + 1)):
        token = tl.load(gone + i)
        total += tl.load(share + token) * tl.load(x + token * width + channel, mask=inside).to(tl.float32)
    tl.store(out + place * width + channel, total, mask=inside)
