"""Images of one layout that a model encodes together: what the hooks on tower and projector know of them.

Shapes: I images, T tiles of each, N patches of a tile, n tokens of a tile after the tower, D channels.
"""

import torch
from torch import Tensor

from llava_pitome.hooks.tile_groups import TileGroup, groups_of, padding_of
from llava_pitome.image_layout import ImageLayout
from llava_pitome.image_schedule import ImageSchedule, encoded_tiles


class TileCall:
    """Images of one layout on their way through tower and projector.

    Attributes:
        stock: the layout of each image in the model without merging.
        layout: the same after `resize`, as the tower encodes it.
        schedule: its token counts.
        images: I.
        tiles: tiles of an image that are encoded; those after them do not reach the language model.
        groups: of the tiles by the padding that they show; none where no tile does.
        projected: (I * tiles, n, D) the tokens of the tiles after the projector; None until then, and where
            the model pools tiles before the projector.
        is_pooled: whether it did.
    """

    def __init__(self, stock: ImageLayout, layout: ImageLayout, schedule: ImageSchedule, images: int):
        """Finds which tiles are encoded."""
        self.stock, self.layout, self.schedule, self.images = stock, layout, schedule, images
        self.tiles = encoded_tiles(layout, schedule)
        is_part = self.tiles < layout.tiles
        self.groups: tuple[TileGroup, ...] = () if is_part else groups_of(layout, images, schedule.lengths)
        self.projected: Tensor | None = None
        self.is_pooled = False

    def padding(self, device: torch.device) -> Tensor | None:
        """Which patches (I * T, N) show padding; None where none do."""
        return padding_of(self.layout).to(device).repeat(self.images, 1) if self.groups else None

    def tiles_to_encode(self, pixels: Tensor) -> Tensor:
        """The pixels (I * tiles, C, H, W) of the tiles that are encoded, of those of all."""
        if self.tiles == self.layout.tiles:
            return pixels
        return pixels.unflatten(0, (self.images, self.layout.tiles))[:, : self.tiles].flatten(0, 1)

    def all_tiles(self, x: Tensor) -> Tensor:
        """Values (I * T, N, D) of all tiles as the model packs them, of those (I * tiles, N', D) encoded.

        Tiles that are not encoded repeat the last that is, and patches that `resize` joined share a value.
        """
        if self.layout.side != self.stock.side:
            place = torch.arange(self.stock.side, device=x.device) * self.layout.side // self.stock.side
            x = x[:, (place[:, None] * self.layout.side + place).flatten()]
        if self.tiles == self.layout.tiles:
            return x
        tile = torch.arange(self.layout.tiles, device=x.device).clamp_max(self.tiles - 1)
        return x.unflatten(0, (self.images, self.tiles))[:, tile].flatten(0, 1)
