"""How many tokens each layer keeps: numbers in, numbers out, known before any image is seen.

The only place where tokens are counted. A layer that keeps the share r of N patches leaves N - floor(N - N
r), the class token not counted (the paper, section 3.2).
"""

from collections.abc import Sequence
from fractions import Fraction
from math import floor


def lengths(patches: int, keep: Sequence[float]) -> tuple[int, ...]:
    """Patches before the first layer and after each one: len(keep) + 1 numbers, `patches` first.

    Shares are read as the decimals they were written as, so that 0.9 of 10 is 9 and not a rounding error away
    from it.
    """
    counts = [patches]
    for share in keep:
        remove = floor(counts[-1] * (1 - Fraction(str(share))))
        counts.append(max(counts[-1] - remove, 1))
    return tuple(counts)


def lengths_for(patches: int, layers: int, tokens: int) -> tuple[int, ...]:
    """Lengths that end at exactly `tokens`, as close to one common share per layer as whole tokens allow.

    The largest share that does not end above `tokens` is found first; where it ends below, the surplus is
    given back from the last layer on, so that earlier layers keep the common share.

    Raises:
        ValueError: `tokens` is not in [1, patches], or there is no layer that could merge.
    """
    if not 1 <= tokens <= patches:
        raise ValueError(
            f"tokens={tokens} does not fit: this image has {patches} patches, allowed is 1 to {patches}"
        )
    if tokens == patches:
        return (patches,) * (layers + 1)
    if layers < 1:
        raise ValueError(
            f"tokens={tokens} needs a layer that can merge, and none lies before the feature layer"
        )
    counts = list(lengths(patches, (solve(patches, layers, tokens),) * layers))
    for layer in range(layers, 0, -1):  # no layer may end below what is wanted at the end
        counts[layer] = max(counts[layer], tokens)
    return tuple(counts)


def solve(patches: int, layers: int, tokens: int) -> float:
    """The largest share, to six decimals, that leaves at most `tokens` of `patches` after `layers` layers."""
    low, high = 0, 10**6
    while high - low > 1:
        middle = (low + high) // 2
        if lengths(patches, (middle / 10**6,) * layers)[-1] <= tokens:
            low = middle
        else:
            high = middle
    return low / 10**6
