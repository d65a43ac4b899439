"""The tokens of images as a model packs them: where they are in the packed sequence, and what they stand for.

Shapes: I images of one layout, T tiles of each, P packed tokens of an image without merging, A tokens of a
unit, n tokens of a tile after the tower, D channels.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from llava_pitome.hooks.tile_call import TileCall
from llava_pitome.hooks.tower_state import EncodedImages
from llava_pitome.image_layout import ImageLayout, Region
from llava_pitome.image_schedule import divide, tokens_of_tile
from llava_pitome.merge.plan import gather_tokens, trace

NOWHERE = 2**30  # the position of patches that show padding


class PackedTokens(NamedTuple):
    """Tokens of images.

    Attributes:
        x: (I, A, D) features after the projector.
        position: (I, A) of each in the sequence that the model packs without merging.
        sizes: (I, A) tokens of that sequence that each stands for.
        metric: (I, A, C) what similarity is measured on; None: the features.
        attention: (I, A) attention of the class token; None where it is not needed.
    """

    x: Tensor
    position: Tensor
    sizes: Tensor
    metric: Tensor | None = None
    attention: Tensor | None = None

    @staticmethod
    def stacked(parts: Sequence["PackedTokens"]) -> "PackedTokens":
        """Those of several units, or images, one after the other along the first dimension."""
        return PackedTokens(*(None if xs[0] is None else torch.cat(xs) for xs in zip(*parts)))

    def split(self, parts: int) -> list["PackedTokens"]:
        """Undoes `stacked` for equal parts."""
        chunks = ([None] * parts if x is None else x.chunk(parts) for x in self)
        return [PackedTokens(*xs) for xs in zip(*chunks)]

    def row(self, image: int) -> "PackedTokens":
        """Those of one image, with I = 1."""
        return PackedTokens(*(None if x is None else x[image : image + 1] for x in self))

    def in_order(self) -> "PackedTokens":
        """The same by ascending position."""
        order = self.position.argsort(dim=1)
        return PackedTokens(
            gather_tokens(self.x, order), self.position.gather(1, order), self.sizes.gather(1, order)
        )


def joined(parts: Sequence[PackedTokens]) -> PackedTokens:
    """The tokens of several units of the same images together."""
    return PackedTokens(*(None if any(x is None for x in xs) else torch.cat(xs, 1) for xs in zip(*parts)))


class Unit(NamedTuple):
    """Tokens of an image that merge with each other alone.

    Attributes:
        region: index of its region in the layout.
        tiles: indices of the image's tiles that it takes.
        count: tokens before the merge after the projector.
        kept: tokens after it.
        grid: rows and columns of its tokens, where nothing has merged.
    """

    region: int
    tiles: tuple[int, ...]
    count: int
    kept: int
    grid: tuple[int, int]


def units_of(call: TileCall, config: object) -> list[Unit]:
    """The units of a call's images: regions, or tiles where tokens of different tiles do not merge."""
    layout, schedule, found = call.layout, call.schedule, []
    by_tile = not config.across_tiles or config.tile_shares == "attention"
    for r, (region, kept) in enumerate(zip(layout.regions, schedule.regions)):
        if not kept:
            continue
        tiles = tuple(range(region.first, region.first + region.tiles))
        if region.tiles == 1 or not by_tile or config.tile_shares == "joint":
            count = region.tokens if region.is_pooled else schedule.arrived[r]
            found.append(Unit(r, tiles, count, kept, (region.height, region.width)))
            continue
        counts = [_count(layout, region, tile, schedule.lengths[-1]) for tile in tiles]
        weights = [layout.tile_patches[t] for t in tiles] if config.tile_shares != "equal" else None
        weights = weights or [int(n > 0) for n in counts]
        least = [int(n > 0) for n in counts]
        for tile, count, share in zip(tiles, counts, divide(kept, weights, least, counts)):
            if share:
                window = region.window_of(tile - region.first, layout.side)
                grid = (window.bottom - window.top, window.right - window.left)
                found.append(Unit(r, (tile,), count, share, grid))
    return found


def _count(layout: ImageLayout, region: Region, tile: int, of_tile: int) -> int:
    """Tokens of a tile before the merge after the projector."""
    if region.is_pooled:
        return int((_source_tiles(layout, layout.regions.index(region)) == tile).sum())
    return tokens_of_tile(layout.tile_patches[tile], layout.side**2, of_tile)


def unit_tokens(
    call: TileCall,
    packed: Tensor,
    found: EncodedImages,
    units: Sequence[Unit],
    by_keys: bool,
    with_attention: bool,
) -> list[PackedTokens]:
    """The tokens of each unit before the merge after the projector.

    Args:
        call: the images.
        packed: (I, P, D) as the model packed them, every patch with its token's features.
        found: what the tower computed of their tiles.
        units: of the images.
        by_keys: whether similarity is measured on the tower's keys.
        with_attention: whether the attention of the class token is needed.
    """
    device, images = packed.device, call.images
    plans = found.tower.plans()
    sizes = found.tower.tokens[-1].patch_sizes.to(device)
    length = sizes.shape[1]
    keys = found.keys[:, found.keys.shape[1] - length :].to(device) if by_keys else None
    attention = found.class_attention.to(device) if with_attention else None
    of_tokens = [
        None if x is None else x.unflatten(0, (images, call.tiles)).flatten(1, 2)
        for x in (call.projected, sizes, keys, attention)
    ]  # (I, tiles * n, ...)
    kept = slots = torch.arange(length, device=device).expand(len(sizes), -1)
    if plans:
        kept, slots = plans[0].kept, trace(plans)
        for plan in plans[1:]:
            kept = kept.gather(1, plan.kept)
    table = _positions(call.layout)[: call.tiles].to(device).repeat(images, 1)
    position = table.gather(1, kept.to(device)).unflatten(0, (images, call.tiles))  # (I, tiles, n)
    result = []
    for unit in units:
        region = call.layout.regions[unit.region]
        if region.is_pooled:
            result.append(_of_pooled(call, packed, unit, of_tokens, slots.to(device), length))
            continue
        own = position[:, list(unit.tiles)].flatten(1)
        ordered, index = own.sort(1)
        index = index[:, : unit.count] + unit.tiles[0] * length
        x, size, key, attended = (
            None if y is None else y.gather(1, index) if y.ndim == 2 else gather_tokens(y, index)
            for y in of_tokens
        )
        result.append(PackedTokens(x, ordered[:, : unit.count], size, key, attended))
    return result


def _of_pooled(
    call: TileCall, packed: Tensor, unit: Unit, of_tokens: list[Tensor | None], slots: Tensor, length: int
) -> PackedTokens:
    """The tokens of a unit that the model pools: keys and attention are those of the nearest patch."""
    layout, images = call.layout, call.images
    source, tile = _sources(layout, unit.region), _source_tiles(layout, unit.region)
    positions = _token_positions(layout)[unit.region]
    if len(unit.tiles) < layout.regions[unit.region].tiles:
        own = torch.isin(tile, torch.tensor(unit.tiles, device="cpu"))
        source, tile, positions = source[own], tile[own], positions[own]
    device = packed.device
    position = positions.to(device).expand(images, -1)
    slots = slots.unflatten(0, (images, call.tiles)).flatten(1, 2)  # (I, tiles * side * side)
    patch = (tile * layout.side**2 + source).to(device)
    token = slots[:, patch] + tile.to(device) * length
    key, attended = (
        None if y is None else y.gather(1, token) if y.ndim == 2 else gather_tokens(y, token)
        for y in of_tokens[2:]
    )
    sizes = torch.ones(position.shape, device=device)
    return PackedTokens(gather_tokens(packed, position), position, sizes, key, attended)


@lru_cache(maxsize=512)
def _token_positions(layout: ImageLayout) -> tuple[Tensor, ...]:
    """The packed position of every token of each region, newlines left out, in raster order."""
    found, first = [], 0
    for region in layout.regions:
        step = region.width + region.newlines
        rows = torch.arange(region.height, device="cpu")[:, None] * step
        found.append((first + rows + torch.arange(region.width, device="cpu")).flatten())
        first += region.height * step
    return tuple(found)


@lru_cache(maxsize=512)
def _positions(layout: ImageLayout) -> Tensor:
    """The packed position (T, side * side) of every patch; NOWHERE for padding, and in pooled regions."""
    side = layout.side
    table = torch.full((layout.tiles, side, side), NOWHERE, device="cpu")
    for region, positions in zip(layout.regions, _token_positions(layout)):
        if region.is_pooled or not region.tokens:
            continue
        grid = torch.full((region.rows * side, region.columns * side), NOWHERE, device="cpu")
        top, bottom, left, right = region.window
        grid[top:bottom, left:right] = positions.view(region.height, region.width)
        tiles = grid.view(region.rows, side, region.columns, side).transpose(1, 2).reshape(-1, side, side)
        table[region.first : region.first + region.tiles] = tiles
    return table.flatten(1)


@lru_cache(maxsize=512)
def _nearest(layout: ImageLayout, index: int) -> tuple[Tensor, Tensor]:
    """The row and column in a pooled region's grid of the patch that is nearest to each token."""
    region = layout.regions[index]
    top, bottom, left, right = region.window
    rows = top + ((torch.arange(region.height, device="cpu") + 0.5) * (bottom - top) / region.height).long()
    columns = left + ((torch.arange(region.width, device="cpu") + 0.5) * (right - left) / region.width).long()
    return rows.repeat_interleave(region.width), columns.repeat(region.height)


def _sources(layout: ImageLayout, index: int) -> Tensor:
    """The patch, counted in its tile, that is nearest to each token of a pooled region."""
    rows, columns = _nearest(layout, index)
    return (rows % layout.side) * layout.side + columns % layout.side


def _source_tiles(layout: ImageLayout, index: int) -> Tensor:
    """The tile of the image in which that patch is."""
    rows, columns = _nearest(layout, index)
    region = layout.regions[index]
    return region.first + rows // layout.side * region.columns + columns // layout.side


def newline_positions(call: TileCall) -> Tensor:
    """The packed positions of the newline tokens that stay."""
    layout, schedule, found = call.layout, call.schedule, []
    first = 0
    for region, kept in zip(layout.regions, schedule.newlines):
        step = region.width + region.newlines
        if kept:  # of `kept` even segments of rows, the last row's
            row = (torch.arange(1, kept + 1, device="cpu") * region.height) // kept - 1
            found.append(first + row * step + region.width)
        first += region.height * step
    if schedule.ends_with_newline:
        found.append(torch.tensor([first], device="cpu"))
    return torch.cat(found) if found else torch.empty(0, dtype=torch.long, device="cpu")
