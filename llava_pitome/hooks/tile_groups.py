"""Merging tiles in the vision tower of which some show padding: patches of the image and padding never merge.

All tiles of a call follow one schedule. A tile that shows padding keeps fewer tokens of the image, and tokens
of padding in the places that are left, so that all tiles have equally many. Padding merges by position alone.
Shapes: B tiles, N tokens without prefix tokens, M after the merge, R tokens of the image in a tile, S after.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava_pitome.image_layout import ImageLayout
from llava_pitome.image_schedule import tokens_of_tile
from llava_pitome.merge.plan import gather_tokens, make_plan
from llava_pitome.merge.reduce import MergeResult


class TileGroup(NamedTuple):
    """Tiles of a call whose patches of the image fill windows of one shape.

    Attributes:
        tiles: their indices in the call.
        grid: rows and columns of the window.
        lengths: tokens of the image before the tower's first layer and after each.
    """

    tiles: tuple[int, ...]
    grid: tuple[int, int]
    lengths: tuple[int, ...]


def groups_of(layout: ImageLayout, images: int, lengths: tuple[int, ...]) -> tuple[TileGroup, ...]:
    """The groups of the tiles of `images` images of one layout; none where no tile shows padding."""
    found: dict[tuple[int, int], list[int]] = {}
    for tile, window in enumerate(layout.tile_windows()):
        shape = window.bottom - window.top, window.right - window.left
        found.setdefault(shape if window.area else (0, 0), []).append(tile)
    whole, patches = (layout.side, layout.side), layout.side**2
    if set(found) == {whole}:
        return ()
    return tuple(
        TileGroup(
            tuple(image * layout.tiles + tile for image in range(images) for tile in tiles),
            shape,
            tuple(tokens_of_tile(shape[0] * shape[1], patches, length) for length in lengths),
        )
        for shape, tiles in found.items()
    )


def padding_of(layout: ImageLayout) -> Tensor:
    """Which patches (tiles, side * side) of an image's tiles show padding."""
    padding = torch.ones(layout.tiles, layout.side, layout.side, dtype=torch.bool, device="cpu")
    for tile, (top, bottom, left, right) in enumerate(layout.tile_windows()):
        padding[tile, top:bottom, left:right] = False
    return padding.flatten(1)


def choose_in_groups(
    metric: Tensor,
    padding: Tensor,
    length: int,
    groups: tuple[TileGroup, ...],
    layer: int,
    inputs: dict[str, Any],
    choose: Callable[[Tensor, int, dict[str, Any]], MergeResult],
) -> MergeResult:
    """The decisions of all groups as one.

    Args:
        metric: (B, N, C) what similarity is measured on.
        padding: (B, N) True for tokens of padding.
        length: M, tokens of a tile after the merge.
        groups: of the call.
        layer: of the tower.
        inputs: what the method needs besides the metric and the grid: values (B, N).
        choose: from a metric (b, R, C), tokens to remove and inputs (b, R) to the method's decision.
    """
    total = metric.shape[1]
    parent = torch.arange(total, device=metric.device).repeat(len(metric), 1)
    made: list[tuple[Tensor, Tensor, Tensor, MergeResult | None]] = []
    weight = torch.ones(metric.shape[:2], device=metric.device)
    for group in groups:
        tiles = torch.tensor(group.tiles, device=metric.device)
        before, after = group.lengths[layer : layer + 2]
        hidden = padding[tiles]
        shown = (~hidden).to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :before]
        result = None
        if before:
            given = {name: value[tiles].gather(1, shown) for name, value in inputs.items()}
            given["grid"] = group.grid
            result = choose(gather_tokens(metric[tiles], shown), before - after, given)
            own = torch.empty_like(shown).copy_(shown.gather(1, result.parent))
            parent[tiles] = parent[tiles].scatter(1, shown, own)
            if result.weight is not None:
                weight[tiles] = weight[tiles].scatter(1, shown, result.weight.to(weight.dtype))
        rest = hidden.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : total - before]
        first = parent[tiles].gather(1, shown[:, :1])  # a token of the image that stays
        merged, dropped = _padding_parents(rest, first, length - after)
        parent[tiles] = parent[tiles].scatter(1, rest, merged)
        if dropped:
            weight[tiles] = weight[tiles].scatter(1, rest, torch.zeros_like(rest, dtype=weight.dtype))
        made.append((tiles, shown, rest, result))
    return _joined(parent, weight, length, made)


def _padding_parents(rest: Tensor, first: Tensor, kept: int) -> tuple[Tensor, bool]:
    """Parents (b, P) of tokens of padding, and whether none stays, so that they are dropped.

    Args:
        rest: (b, P) their positions.
        first: (b, 1) a token of the image that stays.
        kept: how many of them stay.
    """
    count = rest.shape[1]
    if not count or kept == count:
        return rest, False
    if not kept:
        return first.expand(-1, count), True
    places = torch.arange(kept, device=rest.device) * count // kept  # the first of as many even segments
    segment = torch.searchsorted(places, torch.arange(count, device=rest.device), right=True) - 1
    return rest[:, places[segment]], False


def _joined(
    parent: Tensor,
    weight: Tensor,
    length: int,
    made: list[tuple[Tensor, Tensor, Tensor, MergeResult | None]],
) -> MergeResult:
    """One decision from those of the groups."""
    results = [result for *_, result in made if result is not None]
    mixing = order = None
    if any(result.order is not None for result in results):
        order = torch.arange(parent.shape[1], device=parent.device).repeat(len(parent), 1)
        for tiles, shown, rest, result in made:
            count = shown.shape[1]
            own = torch.arange(count, device=parent.device).expand_as(shown)
            if result is not None and result.order is not None:
                own = result.order
            after = torch.arange(rest.shape[1], device=parent.device).expand_as(rest) + count
            order[tiles] = order[tiles].scatter(1, shown, own).scatter(1, rest, after)
    if any(result.mixing is not None for result in results):
        mixing = _mixing(parent, weight, length, made)
    return MergeResult(
        parent,
        weight=weight,
        mixing=mixing,
        order=order,
        prunes=any(result.prunes for result in results),
        keeps_norm=any(result.keeps_norm for result in results),
    )


def _mixing(
    parent: Tensor,
    weight: Tensor,
    length: int,
    made: list[tuple[Tensor, Tensor, Tensor, MergeResult | None]],
) -> Tensor:
    """Coefficients (B, M, N): averages, but for the tokens of the image in groups that mix them."""
    plan = make_plan(parent, length)
    averages = torch.zeros(len(parent), length, parent.shape[1], device=parent.device)
    averages.scatter_(1, plan.slot.unsqueeze(1), weight.unsqueeze(1))
    mixing = averages / averages.sum(2, keepdim=True).clamp_min(1e-9)
    for tiles, shown, _, result in made:
        if result is None or result.mixing is None:
            continue
        is_kept = result.parent == torch.arange(shown.shape[1], device=parent.device)
        kept = is_kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        kept = kept[:, : result.mixing.shape[1]]  # (b, S) in raster order
        rows = plan.slot[tiles].gather(1, shown.gather(1, kept))
        own = result.mixing.expand(len(tiles), -1, -1).to(mixing.dtype)
        columns = torch.zeros(*own.shape[:2], parent.shape[1], device=parent.device)
        columns.scatter_(2, shown.unsqueeze(1).expand_as(own), own)
        mixing[tiles] = mixing[tiles].scatter(1, rows.unsqueeze(2).expand_as(columns), columns)
    return mixing
