"""How many tokens each tile and each region of an image keeps, for models that cut images into tiles.

Like token_schedule.py, from numbers alone. A budget for a whole image is divided among its regions; the
vision tower merges every tile by one schedule, and a merge after the projector leaves exactly the budget. A
tile that shows padding keeps tokens in proportion to its patches that show the image.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from llava_pitome.image_layout import ImageLayout, Region
from llava_pitome.token_schedule import kept_by_ratio, lengths_for, tokens_between


class ImageSchedule(NamedTuple):
    """The token counts of one image or video.

    Attributes:
        lengths: tokens of a whole tile before the tower's first layer and after each that may merge.
        arrived: tokens of each region after the projector: those of its tiles that show the image.
        regions: tokens that each region keeps, newlines not counted.
        newlines: newline tokens that each region keeps.
        ends_with_newline: whether one more newline token follows all regions.
    """

    lengths: tuple[int, ...]
    arrived: tuple[int, ...]
    regions: tuple[int, ...]
    newlines: tuple[int, ...]
    ends_with_newline: bool

    @property
    def tokens(self) -> int:
        """Tokens of the image at the input of the language model, newlines among them."""
        return sum(self.regions) + sum(self.newlines) + self.ends_with_newline


def merges(config: Any, is_video: bool = False) -> bool:
    """Whether a config changes the tokens of images, or of videos, before the language model."""
    if is_video:
        budgets, others = (config.tokens_per_frame, config.tokens_per_video), config.newlines == "none"
    else:
        budgets = config.tokens_per_tile, config.tokens
        others = config.newlines != "rows" or config.tile_shares == "thumbnail"
    others = others or config.resize is not None
    by_share = others or config.merges_by_ratio or config.merges_in_prefix
    return by_share or any(budget is not None for budget in budgets)


@lru_cache(maxsize=4096)
def schedule(config: Any, layout: ImageLayout, layers: int) -> ImageSchedule:
    """The token counts of an image or video.

    Args:
        config: a MergeConfig.
        layout: of the image.
        layers: of the tower, up to the feature layer.

    Raises:
        ValueError: a budget is below one token a tile or above what there is, or a video has no frames or
            the config does not say how far it merges.
    """
    return _Scheduler(config, layout, layers).schedule()


def resized(config: Any, layout: ImageLayout) -> ImageLayout:
    """The layout of an image as the tower encodes it, after `resize`.

    Raises:
        ValueError: `resize` is not square, or not smaller than a tile or than what the model pools.
    """
    if config.resize is None:
        return layout
    side = config.resize[0]
    pooled = [region.height for region in layout.regions if region.is_pooled]
    most = min([layout.side, *pooled])
    if config.resize != (side, side) or side > most:
        raise ValueError(
            f"resize={config.resize} does not fit: it is the size of each tile, a square; allowed "
            f"is 1 x 1 to {most} x {most}"
        )
    return layout.resized(side)


def tokens_of_image(config: Any, layers: int, layout: ImageLayout) -> int:
    """The tokens of an image or video at the input of the language model; arguments as for `schedule`."""
    return schedule(config, layout, layers).tokens


def encoded_tiles(layout: ImageLayout, counts: ImageSchedule) -> int:
    """The tiles that are encoded, from the first on: those after them do not reach the language model."""
    used = [r for r, kept in zip(layout.regions, counts.regions) if kept or not r.tokens]
    return layout.tiles if len(used) == len(layout.regions) else used[-1].first + used[-1].tiles


def tokens_of_tile(patches: int, of: int, tokens: int) -> int:
    """Tokens of a tile of which `patches` of `of` show the image, where a whole tile has `tokens`."""
    return -(-patches * tokens // of)


class _Scheduler:
    """Counts the tokens of one image.

    Attributes:
        field: of the config, that says how many tokens are kept.
        of_image: the value of the field, where it is the budget of the whole image or video.
        used: the regions that reach the language model.
    """

    def __init__(self, config: Any, layout: ImageLayout, layers: int):
        """Finds which field decides."""
        if not layout.regions:
            raise ValueError("a video has 0 frames; at least 1 is needed")
        self.config, self.layout, self.layers = config, resized(config, layout), layers
        self.stock_tokens, layout = layout.tokens, self.layout
        self.patches = layout.side**2
        thumbnail_alone = config.tile_shares == "thumbnail" and not layout.is_video
        self.used = layout.regions[:1] if thumbnail_alone else layout.regions
        names = ("tokens_per_video", "tokens_per_frame") if layout.is_video else ("tokens", "tokens_per_tile")
        given = [name for name in names if getattr(config, name) is not None]
        if isinstance(config.prefix, int):
            given.append("prefix")
        if layout.is_video and not given:
            for name in ("tokens", "tokens_per_tile"):
                if getattr(config, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(config, name)} is the budget of an image; give tokens_per_frame or "
                        "tokens_per_video for videos"
                    )
        self.field = given[0] if given else "ratio"
        is_whole = self.field in ("tokens", "tokens_per_video", "prefix")
        self.of_image: int | float | None = getattr(config, self.field) if is_whole else None

    def schedule(self) -> ImageSchedule:
        """See `schedule`."""
        layout = self.layout
        if not merges(self.config, layout.is_video):
            return ImageSchedule(
                (self.patches,) * (self.layers + 1),
                tuple(self._arrived(r, self.patches) for r in layout.regions),
                tuple(r.tokens for r in layout.regions),
                tuple(r.num_newlines for r in layout.regions),
                layout.ends_with_newline,
            )
        if self.of_image is not None:
            regions, newlines, of_tile = *self._divided(self.of_image), None
        else:
            of_tile = self._of_tile()
            regions = tuple(self._scaled(region, of_tile) for region in self.used)
            shares = (n / r.tokens if r.tokens else 1.0 for n, r in zip(regions, self.used))
            newlines = tuple(map(self._newlines, self.used, shares))
        is_frame = self.field == "tokens_per_frame"  # of whose tokens, not patches, there are so many
        lengths = self._lengths(regions, None if is_frame else of_tile)
        arrived = tuple(self._arrived(r, lengths[-1]) for r in self.used)
        for region, kept, most in zip(self.used, regions, arrived):
            if kept > (region.tokens if region.is_pooled else most):
                raise ValueError(
                    f"{self.field}={getattr(self.config, self.field)} does not fit: a region was to keep "
                    f"{kept} tokens, and the vision tower leaves {most}"
                )
        unused = (0,) * (len(layout.regions) - len(self.used))
        return ImageSchedule(
            lengths, arrived + unused, regions + unused, newlines + unused, self._ends_with_newline
        )

    @property
    def _ends_with_newline(self) -> bool:
        return self.layout.ends_with_newline and self.config.newlines != "none"

    def _tiles(self, region: Region) -> tuple[int, ...]:
        """The patches that show the image of each of a region's tiles."""
        return self.layout.tile_patches[region.first : region.first + region.tiles]

    def _arrived(self, region: Region, of_tile: int) -> int:
        """Tokens of a region's tiles after the projector, where a whole tile has `of_tile`."""
        return sum(tokens_of_tile(n, self.patches, of_tile) for n in self._tiles(region))

    def _of_tile(self) -> int:
        """The tokens that a whole tile, or a frame, keeps.

        Raises:
            ValueError: it has fewer.
        """
        if self.field == "ratio":
            return self.config.ratio_lengths(self.patches, self.layers)[-1]
        given = getattr(self.config, self.field)
        is_frame = self.field == "tokens_per_frame"
        most = self.layout.regions[0].tokens if is_frame else self.patches
        if given > most:
            what = f"a frame has {most} tokens" if is_frame else f"a tile has {most} patches"
            raise ValueError(f"{self.field}={given} does not fit: {what}, allowed is 1 to {most}")
        return given

    def _scaled(self, region: Region, of_tile: int) -> int:
        """Tokens that a region keeps where a whole tile keeps `of_tile`."""
        if self.field == "tokens_per_frame":
            return of_tile
        kept = self._arrived(region, of_tile)
        if region.is_pooled and region.window.area:  # in proportion
            kept = max(region.tokens * kept // region.window.area, min(region.tokens, 1))
        return (
            kept_by_ratio(kept, self.config.prefix)
            if kept and isinstance(self.config.prefix, float)
            else kept
        )

    def _divided(self, budget: int | float) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tokens and newlines that each region keeps under a budget for all of them.

        Raises:
            ValueError: the budget is below one token a tile or above what there is.
        """
        ends = self._ends_with_newline
        capacity = [r.tokens for r in self.used]
        most = sum(capacity) + sum(r.num_newlines for r in self.used) + self.layout.ends_with_newline
        tiles = [min(sum(n > 0 for n in self._tiles(r)), r.tokens) for r in self.used]

        def newlines_at(budget: int) -> list[int]:
            return [self._newlines(r, min(budget / max(most, 1), 1.0)) for r in self.used]

        least = 0
        while (found := sum(tiles) + sum(newlines_at(least)) + ends) > least:  # newlines grow with a budget
            least = found
        highest = sum(capacity) if self.config.newlines == "none" else most
        if isinstance(budget, float):  # a share is met as far as it can be
            budget = min(max(kept_by_ratio(self.stock_tokens, budget), least), highest)
        if not least <= budget <= highest:
            what, of = ("video", "frames") if self.layout.is_video else ("image", "tiles")
            stay = f", {sum(newlines_at(least)) + ends} newlines stay" if least > sum(tiles) else ""
            raise ValueError(
                f"{self.field}={budget} does not fit: this {what} has {highest} tokens of {sum(tiles)} {of}"
                f"{stay}; allowed is {least} to {highest}"
            )
        newlines = newlines_at(budget)
        left = budget - sum(newlines) - ends
        for i, region in enumerate(self.used):  # newlines take what no other token can
            more = min(max(left - sum(capacity), 0), region.num_newlines - newlines[i])
            newlines[i], left = newlines[i] + more, left - more
        weights = tiles if self.config.tile_shares == "equal" else capacity
        return tuple(divide(left, weights, tiles, capacity)), tuple(newlines)

    def _newlines(self, region: Region, share: float) -> int:
        """Newline tokens that a region keeps where it keeps a share of its tokens."""
        if self.config.newlines == "none":
            return 0
        if self.config.newlines == "scaled" and region.num_newlines:
            return min(max(round(region.num_newlines * share**0.5), 1), region.num_newlines)
        return region.num_newlines

    def _lengths(self, regions: Sequence[int], of_tile: int | None) -> tuple[int, ...]:
        """Tokens of a whole tile before the tower's first layer and after each.

        Args:
            regions: tokens that each region is to keep.
            of_tile: tokens that a whole tile is to keep; None: as many as the regions need.
        """
        config = self.config
        if self.field in ("ratio", "prefix") and not config.prefix_share:
            return config.ratio_lengths(self.patches, self.layers)
        if of_tile is None:
            of_tile = self._least_tile(regions)
        else:
            of_tile = tokens_between(self.patches, of_tile, config.prefix_share)
        return lengths_for(self.patches, config.is_merging_layer(self.layers), of_tile)

    def _least_tile(self, regions: Sequence[int]) -> int:
        """The fewest tokens of a whole tile that leave every region enough before its last merge."""
        targets = [self._target(region, kept, sum(regions)) for region, kept in zip(self.used, regions)]
        low, high = 0, self.patches
        while high - low > 1:
            middle = (low + high) // 2
            is_enough = all(self._arrived(r, middle) >= n for r, n in zip(self.used, targets))
            low, high = (low, middle) if is_enough else (middle, high)
        return high

    def _target(self, region: Region, kept: int, total: int) -> int:
        """Tokens of a region's tiles that the tower is to leave.

        Args:
            region: where it is.
            kept: tokens that it keeps.
            total: tokens that all regions keep.
        """
        if not kept:
            return 0
        if self.config.temporal and self.layout.is_video:  # in a still video one frame keeps them all
            kept = min(total, region.tokens)
        area = region.window.area
        return tokens_between(area, -(-area * kept // region.tokens), self.config.prefix_share)


def divide(total: int, weights: Sequence[float], least: Sequence[int], most: Sequence[int]) -> list[int]:
    """Whole numbers that sum to `total`, in proportion to weights as far as limits allow.

    What is left by rounding goes to those that are furthest below their share, the first ones on ties.

    Args:
        total: from sum(least) to sum(most).
        weights: of each number.
        least: of each.
        most: of each.
    """
    whole = sum(weights) or 1
    wanted = [total * weight / whole for weight in weights]
    found = [min(max(int(want), low), high) for want, low, high in zip(wanted, least, most)]
    while (left := total - sum(found)) != 0:
        step = 1 if left > 0 else -1
        limits = most if step > 0 else least
        movable = [i for i, n in enumerate(found) if n != limits[i]]
        found[max(movable, key=lambda i: (step * (wanted[i] - found[i]), -i))] += step
    return found
