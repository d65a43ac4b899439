"""Proportional attention on CPUs in bfloat16: two batched matrix products and a softmax, in blocks.

torch's own CPU kernel multiplies bfloat16 at a sixth of the speed of the same processor's plain matrix
product (docs/performance.md has the measurement). Scores are rounded to bfloat16 before the softmax, as
transformers' eager attention does; torch's kernel keeps them in float32.
Shapes: B images, T tokens, H heads, C channels a head.
"""

from functools import cache

import torch
from torch import Tensor

SCORES = 2_600_000  # scores at a time: 5 MB, which stays in the last-level cache of two cores
LEAST = (
    2**23
)  # multiplications an image below which calls cost more than they save: 91 tokens of 1,024 channels


def is_faster(query: Tensor) -> bool:
    """Whether this kernel was measured to be faster than SDPA for queries (B, H, T, C).

    It was for many tokens in bfloat16 on a processor with AVX-512's bfloat16 products; one with AMX tiles,
    which torch's own kernel uses, was not measured. The number of images does not matter, so that the
    answer to one does not depend on the others.
    """
    _, heads, tokens, channels = query.shape
    return (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and tokens**2 * heads * channels >= LEAST
        and _has_bfloat16_products()
    )


@cache
def _has_bfloat16_products() -> bool:
    """Whether the processor has AVX-512's bfloat16 products and no AMX tiles; False where it is unknown."""
    found = getattr(torch.cpu, "get_capabilities", dict)()
    if found:
        return bool(found.get("avx512_bf16")) and not found.get("amx_tile")
    # older versions of torch have two private functions instead
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    products, tiles = (getattr(torch.cpu, name, None) for name in names)
    return products is not None and tiles is not None and products() and not tiles()


def attention(query: Tensor, key: Tensor, value: Tensor, log_sizes: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(C) + log s) V for every head (the paper, section 3.2), without gradients.

    Args:
        query: (B, H, T, C).
        key: as `query`.
        value: as `query`.
        log_sizes: (B, T) of the tokens, float32 at least; None is plain attention.

    Returns:
        (B, T, H, C).
    """
    batch, heads, count, _ = query.shape
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    bias = q.new_zeros(())
    if log_sizes is not None:
        bias = log_sizes.to(q.dtype).repeat_interleave(heads, 0).unsqueeze(1)  # (B H, 1, T)
    bias = bias.expand(len(q), 1, count)
    out = torch.empty_like(q)  # (B H, T, C)
    step = -(-len(q) // -(-len(q) * count**2 // SCORES))  # as many heads, the same number in every block
    scores = q.new_empty(step, count, count)
    beta, scale = int(log_sizes is not None), q.shape[2] ** -0.5
    for start in range(0, len(q), step):
        part = slice(start, start + step)
        block = scores[: len(q[part])]
        torch.baddbmm(bias[part], q[part], k[part].transpose(1, 2), beta=beta, alpha=scale, out=block)
        torch.softmax(block, -1, out=block)
        torch.bmm(block, v[part], out=out[part])
    return out.view(batch, heads, count, -1).transpose(1, 2)
