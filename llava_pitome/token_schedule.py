"""How many tokens each layer keeps: numbers in, numbers out, known before any image is seen.

The only place where tokens are counted. A layer that keeps the share r of N patches leaves N - floor(N - N
r), the class token not counted (the paper, section 3.2).
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import floor


def after(tokens: int, keep: float) -> int:
    """Tokens that are left of some when the share `keep` stays; at least one.

    Shares are read as the decimals they were written as, so that 0.9 of 10 is 9 and not a rounding error away
    from it.
    """
    return max(tokens - floor(tokens * (1 - Fraction(str(keep)))), 1)


def left(tokens: int, keep: float | int, what: str) -> int:
    """Tokens that are left of some: the share `keep`, or, where it is a whole number, that many.

    Raises:
        ValueError: more are to be left than there are; `what` names the setting that says so.
    """
    if isinstance(keep, float):
        return after(tokens, keep)
    if keep > tokens:
        raise ValueError(
            f"{what}={keep} does not fit: {tokens} tokens arrive there, allowed is 1 to {tokens}"
        )
    return keep


def shortens(keep: float | int) -> bool:
    """Whether this asks for a merge: the share 1.0 does not, the whole number 1 does."""
    return isinstance(keep, int) or keep != 1


@lru_cache(maxsize=256)
def lengths(patches: int, keep: tuple[float, ...]) -> tuple[int, ...]:
    """Patches before the first layer and after each one: len(keep) + 1 numbers, `patches` first."""
    return _lengths(patches, keep)


def _lengths(patches: int, keep: Sequence[float]) -> tuple[int, ...]:
    counts = [patches]
    for share in keep:
        counts.append(after(counts[-1], share))
    return tuple(counts)


@lru_cache(maxsize=256)  # asked once an image by the processor
def lengths_for(patches: int, merging: tuple[bool, ...], tokens: int) -> tuple[int, ...]:
    """Lengths that end at exactly `tokens`, as close to one common share per layer as whole tokens allow.

    The largest share that does not end above `tokens` is found first; where it ends below, the surplus is
    given back from the last layer on, so that earlier layers keep the common share.

    Args:
        patches: tokens in front of the first layer.
        merging: for each layer, whether it may merge.
        tokens: how many are to be left.

    Raises:
        ValueError: `tokens` is not in [1, patches], or there is no layer that could merge.
    """
    if not 1 <= tokens <= patches:
        raise ValueError(
            f"tokens={tokens} does not fit: this image has {patches} patches, allowed is 1 to {patches}"
        )
    if tokens == patches:
        return (patches,) * (len(merging) + 1)
    if not any(merging):
        raise ValueError(
            f"tokens={tokens} needs a layer that can merge, and none lies before the feature layer"
        )
    share = solve(patches, sum(merging), tokens)
    counts = _lengths(patches, [share if may else 1.0 for may in merging])
    return tuple(max(count, tokens) for count in counts)  # no layer may end below what is wanted at the end


def solve(patches: int, layers: int, tokens: int) -> float:
    """The largest share, to six decimals, that leaves at most `tokens` of `patches` after `layers` layers."""
    low, high = 0, 10**6
    while high - low > 1:
        middle = (low + high) // 2
        if _lengths(patches, (middle / 10**6,) * layers)[-1] <= tokens:
            low = middle
        else:
            high = middle
    return low / 10**6


def divided(patches: int, tokens: int, last: float) -> int:
    """Tokens between two steps that lead from `patches` to `tokens`, the second with the share `last` of it.

    Shares are of the logarithm: with 0.5 both steps keep the same share of what they are given.
    """
    return max(min(round(patches * (tokens / patches) ** (1 - last)), patches), tokens)
