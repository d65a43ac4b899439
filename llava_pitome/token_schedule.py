"""How many tokens each layer keeps: the only place where tokens are counted.

Counts follow from the config and the image's size, before any image is encoded. A layer that keeps the share
r of N patches leaves N - floor(N - N r), the class token not counted (PiToMe, section 3.2).
"""

from collections.abc import Sequence
from math import fabs
from operator import index

from llava_pitome.plain_values import plain, whole

LIMIT = 2**31 - 1  # tokens of an image; their products with a denominator up to it fit into 64 bits
STEPS = 10**6  # of a common ratio


def kept_by_ratio(tokens: int, ratio: float) -> int:
    """Returns how many tokens the share `ratio` in (0, 1] keeps, at least one.

    Shares are read as the decimals they were written as, so that 0.9 of 10 is exactly 9. The arithmetic is of
    whole numbers alone, so that `tokens` may be a SymInt of torch.compile.

    Args:
        tokens: from 1 to LIMIT.
        ratio: the share.

    Raises:
        ValueError: `tokens` is no whole number.
    """
    return _kept(whole(tokens, "tokens"), *_removed_share(plain(ratio)))


def _kept(tokens: int, removed: int, of: int) -> int:
    """Returns the tokens that are left where the share removed / of, less than 1, is removed."""
    return tokens - tokens * removed // of


def _removed_share(ratio: float) -> tuple[int, int]:
    """Returns 1 - ratio as a fraction, the numerator and a denominator of at most LIMIT.

    Where the decimal needs a larger denominator, the result is the largest fraction below it. No fraction of
    such a denominator lies between the two, so that floor(N f) is the same for every N up to LIMIT.
    """
    digits, _, exponent = str(fabs(ratio)).partition("e")
    whole, _, decimals = digits.partition(".")
    places = len(decimals) - int(exponent or 0)
    of = 10 ** max(places, 0)
    rest, divisor = of - int(whole + decimals), of
    low, high = (0, 1), (1, 0)  # convergents of the continued fraction, the last one second
    while divisor:
        quotient, remainder = divmod(rest, divisor)
        following = low[0] + quotient * high[0], low[1] + quotient * high[1]
        if following[1] > LIMIT:
            steps = (LIMIT - low[1]) // high[1]
            other = low[0] + steps * high[0], low[1] + steps * high[1]
            return high if high[0] * other[1] < other[0] * high[1] else other
        low, high = high, following
        rest, divisor = divisor, remainder
    return high


def kept_tokens(tokens: int, amount: float | int, setting: str) -> int:
    """Returns how many tokens `amount` keeps: a share (float), or that many (int).

    Raises:
        ValueError: the amount exceeds the tokens, or is no number; `setting` names the field of the config.
    """
    tokens, amount = whole(tokens, "tokens"), plain(amount)
    if isinstance(amount, float):
        return kept_by_ratio(tokens, amount)
    amount = whole(amount, setting)
    if amount > tokens:
        raise ValueError(f"{setting}={amount} does not fit: {tokens} tokens remain, allowed is 1 to {tokens}")
    return amount


def is_reduction(amount: float | int) -> bool:
    """Returns whether an amount means a merge: the share 1.0 does not, a whole number does."""
    return isinstance(amount, int) or amount != 1


def lengths(patches: int, ratios: Sequence[float]) -> tuple[int, ...]:
    """Returns the patches before the first layer and after each one: len(ratios) + 1 numbers."""
    counts = [index(whole(patches, "patches"))]
    for ratio in ratios:
        counts.append(kept_by_ratio(counts[-1], ratio))
    return tuple(counts)


def lengths_for(patches: int, is_merging: tuple[bool, ...], tokens: int) -> tuple[int, ...]:
    """Returns lengths that end at exactly `tokens`, as close to one common ratio as whole tokens allow.

    They follow the largest ratio that does not end above `tokens`; where it ends below, the last layers merge
    less.

    Args:
        patches: before the first layer.
        is_merging: for each layer, whether it may merge.
        tokens: after the last layer.

    Raises:
        ValueError: `tokens` is not in [1, patches], no layer may merge, or a count is no whole number.
    """
    patches, tokens = index(whole(patches, "patches")), whole(tokens, "tokens")
    if not 1 <= tokens <= patches:
        raise ValueError(
            f"tokens={tokens} does not fit: this image has {patches} patches, allowed is 1 to {patches}"
        )
    if tokens == patches:
        return (patches,) * (len(is_merging) + 1)
    if not any(is_merging):
        raise ValueError(
            f"tokens={tokens} needs a layer before the feature layer that can merge; there is none"
        )
    ratio = common_ratio(patches, sum(is_merging), tokens)
    counts = lengths(patches, [ratio if merges else 1.0 for merges in is_merging])
    return tuple(max(count, tokens) for count in counts)


def common_ratio(patches: int, layers: int, tokens: int) -> float:
    """Returns the largest ratio, to six decimals, that leaves at most `tokens` after the layers.

    Raises:
        ValueError: a count is no whole number.
    """
    patches, layers, tokens = whole(patches, "patches"), whole(layers, "layers"), whole(tokens, "tokens")
    low, high = 0, STEPS
    while high - low > 1:
        middle = (low + high) // 2
        count = patches
        for _ in range(layers):
            count = _kept(count, STEPS - middle, STEPS)
        if count <= tokens:
            low = middle
        else:
            high = middle
    return low / STEPS


def tokens_between(patches: int, tokens: int, last_share: float) -> int:
    """Returns the tokens between two merges from `patches` to `tokens`.

    The second does `last_share` of the reduction, on a logarithmic scale: at 0.5 both keep the same ratio.
    """
    patches, tokens = index(whole(patches, "patches")), whole(tokens, "tokens")
    return max(min(round(patches * (tokens / patches) ** (1 - plain(last_share))), patches), tokens)


class TokenCounts:
    """The token counts that follow from the fields of a MergeConfig, which inherits this class."""

    ratio: float | tuple[float, ...] | None
    tokens: int | float | None
    tokens_per_tile: int | None
    tokens_per_frame: int | None
    tokens_per_video: int | None
    depths: tuple[float, float]
    prefix: float | int | None
    prefix_share: float
    decoder: dict[int, float | int]
    llm_proportional: bool
    positions: str
    resize: tuple[int, int] | None

    @property
    def merges_in_tower(self) -> bool:
        """Whether the config merges in the vision tower; how much depends on the image's size."""
        budgets = self.tokens, self.tokens_per_tile, self.tokens_per_frame, self.tokens_per_video
        has_budget = any(budget is not None for budget in budgets)
        return self.prefix_share < 1 and (has_budget or self.merges_by_ratio)

    @property
    def merges_by_ratio(self) -> bool:
        """Whether the ratio says that tokens merge."""
        ratios = self.ratio if isinstance(self.ratio, tuple) else (self.ratio or 1,)
        return any(ratio < 1 for ratio in ratios)

    @property
    def merges_in_prefix(self) -> bool:
        """Whether tokens merge after the projector."""
        has_share = self.prefix_share > 0 and self.ratio != 1
        return has_share or (self.prefix is not None and is_reduction(self.prefix))

    @property
    def reaches_llm(self) -> bool:
        """Whether anything changes inside the language model."""
        return bool(self.merging_layers) or self.llm_proportional or self.positions != "packed"

    @property
    def merging_layers(self) -> tuple[int, ...]:
        """The language model's layers that merge, in order."""
        return tuple(i for i, amount in self.decoder.items() if is_reduction(amount))

    def patches_at(self, patches: int) -> int:
        """Returns the patches that the vision tower encodes, after `resize`, of an image's `patches`.

        Raises:
            ValueError: `resize` exceeds the image, or `patches` is no whole number.
        """
        patches = index(whole(patches, "patches"))
        if self.resize is None:
            return patches
        resized, side = self.resize[0] * self.resize[1], round(patches**0.5)
        if (max(self.resize) > side) if side * side == patches else (resized > patches):
            raise ValueError(f"resize={self.resize} does not fit: this image has {patches} patches")
        return resized

    def lengths(self, patches: int, layers: int) -> tuple[int, ...]:
        """Returns the patches before the first and after each of the tower's layers that may merge.

        Args:
            patches: that the tower encodes.
            layers: up to the feature layer.

        Raises:
            ValueError: more tokens than patches, not one ratio per layer, or an argument is no whole number.
        """
        patches, layers = whole(patches, "patches"), whole(layers, "layers")
        tokens = self._budget(patches, layers)
        if tokens is not None and tokens > patches:
            raise ValueError(
                f"tokens={tokens} does not fit: this image has {patches} patches, allowed is 1 to {patches}"
            )
        if tokens is not None:
            after_tower = tokens_between(patches, tokens, self.prefix_share)
            return lengths_for(patches, self.is_merging_layer(layers), after_tower)
        return self.ratio_lengths(patches, layers)

    def ratio_lengths(self, patches: int, layers: int) -> tuple[int, ...]:
        """Returns `lengths` as the ratio alone says, without budgets.

        Raises:
            ValueError: not one ratio per layer.
        """
        if isinstance(self.ratio, tuple) and len(self.ratio) != layers:
            raise ValueError(
                f"ratio holds {len(self.ratio)} shares; the tower has {layers} layers that can merge"
            )
        return lengths(patches, self._ratios(layers))

    def prefix_length(self, tokens: int, patches: int, layers: int) -> int:
        """Returns how many of the projector's `tokens` are kept before the language model.

        Args:
            tokens: of an image, after the tower.
            patches: that the tower encoded.
            layers: as for `lengths`.

        Raises:
            ValueError: `prefix` exceeds the tokens, or an argument is no whole number.
        """
        tokens, patches, layers = whole(tokens, "tokens"), whole(patches, "patches"), whole(layers, "layers")
        if self.prefix is not None:
            return kept_tokens(tokens, self.prefix, "prefix")
        return min(self._budget(patches, layers), tokens) if self.prefix_share else tokens

    def tokens_at(self, patches: int, layers: int) -> int:
        """Returns the image tokens before the language model's first layer, of an image's `patches`."""
        return self.tokens_of(self.patches_at(patches), layers)

    def tokens_of(self, encoded: int, layers: int) -> int:
        """Returns the image tokens before the language model's first layer, of patches after `resize`."""
        return self.prefix_length(self.lengths(encoded, layers)[-1], encoded, layers)

    def llm_lengths(self, tokens: int, layers: int) -> tuple[int, ...]:
        """Returns the image tokens before the first and after each of the language model's layers.

        Raises:
            ValueError: `decoder` names a layer that the model lacks, or its last one, or exceeds the tokens,
                or an argument is no whole number.
        """
        tokens, layers = whole(tokens, "tokens"), whole(layers, "layers")
        if wrong := [i for i in self.decoder if i > layers - 2]:
            raise ValueError(
                f"decoder names layer {wrong[0]}; the language model has {layers} layers, and a layer that "
                f"merges needs one after it: allowed are 0 to {layers - 2}"
            )
        counts = [tokens]
        for i in range(layers):
            counts.append(kept_tokens(counts[-1], self.decoder.get(i, 1.0), f"decoder[{i}]"))
        return tuple(counts)

    def _budget(self, patches: int, layers: int) -> int | None:
        """Returns the tokens left by tower and prefix together; None where the ratio alone decides."""
        tokens = self.tokens if self.tokens is not None else self.tokens_per_tile  # the image is one tile
        if isinstance(tokens, float):
            return kept_by_ratio(patches, tokens)
        if tokens is not None or not self.prefix_share:
            return tokens
        return lengths(patches, self._ratios(layers))[-1]

    def is_merging_layer(self, layers: int) -> tuple[bool, ...]:
        """Returns which tower layers lie within `depths`."""
        return tuple(self.depths[0] <= i / layers < self.depths[1] for i in range(layers))

    def _ratios(self, layers: int) -> tuple[float, ...]:
        """Returns the ratio of each tower layer."""
        if isinstance(self.ratio, tuple):
            return self.ratio
        is_merging = self.is_merging_layer(layers)
        if self.ratio not in (None, 1) and not any(is_merging):
            raise ValueError(f"depths={self.depths} holds none of the {layers} layers that can merge")
        return tuple(self.ratio if merges and self.ratio else 1.0 for merges in is_merging)
