"""Dividing an image's budget among its tiles by the class attention of its thumbnail.

Shapes: I images, n tokens of a tile after the tower.
"""

from collections.abc import Sequence

from torch import Tensor

from llava_pitome.hooks.packed_tokens import Unit
from llava_pitome.hooks.tile_call import TileCall
from llava_pitome.hooks.tower_state import EncodedImages
from llava_pitome.image_layout import ImageLayout
from llava_pitome.image_schedule import divide
from llava_pitome.merge.plan import trace


def divide_by_attention(call: TileCall, found: EncodedImages, units: Sequence[Unit]) -> list[list[int]]:
    """The tokens that each unit of each image keeps: the thumbnail its own, tiles by its attention to them.

    The sum for an image is that of the units' own numbers.

    Args:
        call: the images.
        found: what the tower computed of their tiles.
        units: the thumbnail, and each tile.
    """
    side, layout = call.layout.side, call.layout
    attention = found.class_attention.unflatten(0, (call.images, call.tiles))[:, 0].float()
    plans = found.tower.plans()
    if plans:
        sizes = found.tower.tokens[-1].patch_sizes.unflatten(0, (call.images, call.tiles))[:, 0]
        slots = trace(plans).unflatten(0, (call.images, call.tiles))[:, 0]
        attention = (attention / sizes.clamp_min(1)).gather(1, slots)  # of each patch
    maps = attention.view(call.images, side, side)
    tiles = [(u, unit) for u, unit in enumerate(units) if unit.region > 0]
    counts = []
    for image in maps.cpu():
        weights = [float(_attended(image, layout, unit)) for _, unit in tiles]
        total = sum(unit.kept for _, unit in tiles)
        shares = divide(total, weights, [1] * len(tiles), [unit.count for _, unit in tiles])
        row = [unit.kept for unit in units]
        for (u, _), share in zip(tiles, shares):
            row[u] = share
        counts.append(row)
    return counts


def _attended(image: Tensor, layout: ImageLayout, unit: Unit) -> Tensor:
    """The sum of a thumbnail's attention (side, side) over the part of the image that a tile shows."""
    region, side = layout.regions[unit.region], layout.side
    window = region.window
    row, column = divmod(unit.tiles[0] - region.first, region.columns)
    own = region.window_of(unit.tiles[0] - region.first, side)
    height, width = window.bottom - window.top, window.right - window.left
    top, bottom = (round((row * side + y - window.top) * side / height) for y in (own.top, own.bottom))
    left, right = (round((column * side + x - window.left) * side / width) for x in (own.left, own.right))
    return image[top : max(bottom, top + 1), left : max(right, left + 1)].sum()
