"""How many tokens each layer keeps: numbers in, numbers out, known before any image is seen.

The only place where tokens are counted. A layer that keeps the share r of N patches leaves N - floor(N - N
r), the class token not counted (the paper, section 3.2).
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import floor, isqrt


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


class TokenCounts:
    """What follows for token counts from a MergeConfig's fields; see there."""

    ratio: float | tuple[float, ...] | None
    tokens: int | None
    depths: tuple[float, float]
    prefix: float | int | None
    prefix_share: float
    decoder: dict[int, float | int]
    llm_proportional: bool
    positions: str
    resize: tuple[int, int] | None

    @property
    def merges_in_tower(self) -> bool:
        """Whether the tower is asked to merge; how much depends on the image's size."""
        shares = self.ratio if isinstance(self.ratio, tuple) else (self.ratio or 1,)
        return self.prefix_share < 1 and (self.tokens is not None or any(share < 1 for share in shares))

    @property
    def merges_in_prefix(self) -> bool:
        """Whether tokens merge behind the projector."""
        divided = self.prefix_share > 0 and self.ratio != 1
        return divided or (self.prefix is not None and shortens(self.prefix))

    @property
    def reaches_llm(self) -> bool:
        """Whether anything changes inside the language model."""
        return bool(self.merging_layers) or self.llm_proportional or self.positions != "packed"

    @property
    def merging_layers(self) -> tuple[int, ...]:
        """The language model's layers that merge, in order."""
        return tuple(i for i, keep in self.decoder.items() if shortens(keep))

    def patches_at(self, patches: int) -> int:
        """Patches that the tower sees, of an image's `patches`.

        Raises:
            ValueError: `resize` asks for more than there are.
        """
        seen = patches if self.resize is None else self.resize[0] * self.resize[1]
        side = isqrt(patches)
        if self.resize is not None and (
            max(self.resize) > side if side * side == patches else seen > patches
        ):
            raise ValueError(f"resize={self.resize} does not fit: this image has {patches} patches")
        return seen

    def lengths(self, patches: int, layers: int) -> tuple[int, ...]:
        """Patches before the first and after each of the `layers` tower layers that may merge.

        Args:
            patches: what the tower sees.
            layers: up to the feature layer.

        Raises:
            ValueError: more tokens than patches, or not one ratio per layer.
        """
        tokens = self._budget(patches, layers)
        if tokens is not None and tokens > patches:
            raise ValueError(
                f"tokens={tokens} does not fit: this image has {patches} patches, allowed is 1 to {patches}"
            )
        if tokens is not None:
            left = divided(patches, tokens, self.prefix_share)
            return lengths_for(patches, self._may(layers), left)
        if isinstance(self.ratio, tuple) and len(self.ratio) != layers:
            raise ValueError(
                f"ratio holds {len(self.ratio)} shares; the tower has {layers} layers that can merge"
            )
        return lengths(patches, self._shares(layers))

    def prefix_length(self, tokens: int, patches: int, layers: int) -> int:
        """Tokens that the prefix leaves of `tokens` that the projector makes.

        Args:
            tokens: of an image, what the tower has left.
            patches: what the tower saw.
            layers: as for `lengths`.

        Raises:
            ValueError: `prefix` asks for more than there are.
        """
        if self.prefix is not None:
            return left(tokens, self.prefix, "prefix")
        return min(self._budget(patches, layers), tokens) if self.prefix_share else tokens

    def tokens_at(self, patches: int, layers: int) -> int:
        """Image tokens that reach the language model, of an image's `patches`."""
        seen = self.patches_at(patches)
        return self.prefix_length(self.lengths(seen, layers)[-1], seen, layers)

    def _budget(self, patches: int, layers: int) -> int | None:
        """What tower and prefix are to leave together; None where the tower's ratio alone says."""
        if self.tokens is not None or not self.prefix_share:
            return self.tokens
        return lengths(patches, self._shares(layers))[-1]

    def _may(self, layers: int) -> tuple[bool, ...]:
        """Which tower layers `tokens` or a single `ratio` is for."""
        return tuple(self.depths[0] <= i / layers < self.depths[1] for i in range(layers))

    def _shares(self, layers: int) -> tuple[float, ...]:
        """The share that each tower layer keeps."""
        if isinstance(self.ratio, tuple):
            return self.ratio
        may = self._may(layers)
        if self.ratio not in (None, 1) and not any(may):
            raise ValueError(f"depths={self.depths} holds none of the {layers} layers that can merge")
        return tuple(self.ratio if m and self.ratio else 1.0 for m in may)

    def llm_lengths(self, tokens: int, layers: int) -> tuple[int, ...]:
        """Image tokens in front of the first and behind each of the language model's `layers` layers.

        Raises:
            ValueError: `decoder` names a layer that is not there, or that has none behind it, or asks for
                more tokens than there are.
        """
        if wrong := [i for i in self.decoder if i > layers - 2]:
            raise ValueError(
                f"decoder names layer {wrong[0]}; the language model has {layers} layers, and a layer that "
                f"merges needs one behind it: allowed are 0 to {layers - 2}"
            )
        counts = [tokens]
        for i in range(layers):
            keep = self.decoder.get(i, 1.0)
            counts.append(left(counts[-1], keep, f"decoder[{i}]"))
        return tuple(counts)
