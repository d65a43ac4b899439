"""Which token each patch of an image is in, where a model cuts images into tiles.

The tiles are put together to the picture that they were cut from, on one grid of cells: the tiles of an image
with the thumbnail beside them, or the frames of a video in rows.
Shapes: N cells of the grid, T tiles of an image, S patches of a tile, P packed tokens of an image without
merging, M tokens of it that reach the language model.
"""

from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from llava_pitome.hooks.merge_step import MergeRecord
from llava_pitome.image_layout import ImageLayout, Region
from llava_pitome.merge.plan import MergePlan
from llava_pitome.tracing.states import OUTSIDE, ComparedTokens, MergeTrace, PatchState, TracedMerge

IN_A_ROW = 4  # frames of a video
WHITE = (255, 255, 255)


class Canvas(NamedTuple):
    """The grid on which the tiles of an image are put together.

    Attributes:
        grid: rows and columns of its cells.
        cell: (T, S) the cell of each patch.
        shows: (T, S) True for patches that show the image, and not padding.
    """

    grid: tuple[int, int]
    cell: Tensor
    shows: Tensor

    @property
    def padding(self) -> Tensor:
        """Which cells (N,) show padding."""
        return self.spread(~self.shows, False)

    @property
    def blank(self) -> Tensor:
        """Which cells (N,) hold no patch."""
        return ~self.spread(torch.ones_like(self.shows), False)

    def spread(self, values: Tensor, fill: object) -> Tensor:
        """Values (T, S) of patches as those (N,) of cells; `fill` for cells without a patch."""
        cells = torch.full((self.grid[0] * self.grid[1],), fill, dtype=values.dtype, device="cpu")
        cells[self.cell.flatten()] = values.flatten()
        return cells

    def image(self, tiles: list[Image.Image]) -> Image.Image:
        """The pictures of the T tiles put together, a whole number of pixels a cell."""
        side = round(self.cell.shape[1] ** 0.5)
        step = tiles[0].width // side
        whole = Image.new("RGB", (self.grid[1] * step, self.grid[0] * step), WHITE)
        for first, tile in zip(self.cell[:, 0].tolist(), tiles):
            row, column = divmod(first, self.grid[1])
            whole.paste(tile, (column * step, row * step))
        return whole


def canvas_of(layout: ImageLayout) -> Canvas:
    """The canvas for the tiles of a layout, with a cell between its regions."""
    side = layout.side
    if layout.is_video:
        across = min(IN_A_ROW, len(layout.regions))
        corners = [(i // across * (side + 1), i % across * (side + 1)) for i in range(len(layout.regions))]
    else:  # the tiles first, then the thumbnail
        *thumbnail, last = layout.regions
        corners = [(0, last.columns * side + 1)] * len(thumbnail) + [(0, 0)]
    ends = [
        (row + region.rows * side, column + region.columns * side)
        for region, (row, column) in zip(layout.regions, corners)
    ]
    rows, columns = (max(sides) for sides in zip(*ends))
    patch = torch.arange(side, device="cpu")
    cells, shows = [], []
    for region, (row, column) in zip(layout.regions, corners):
        for tile in range(region.tiles):
            down, right = row + tile // region.columns * side, column + tile % region.columns * side
            cells.append(((down + patch)[:, None] * columns + right + patch).flatten())
            top, bottom, left, end = region.window_of(tile, side)
            is_shown = torch.zeros(side, side, dtype=torch.bool, device="cpu")
            is_shown[top:bottom, left:end] = True
            shows.append(is_shown.flatten())
    return Canvas((rows, columns), torch.stack(cells), torch.stack(shows))


class PackedMerge(NamedTuple):
    """A merge of packed tokens, by their positions in the sequence that is packed without merging.

    Attributes:
        before: (B, A) of the tokens before it, in B parts that merge alike.
        after: (B, A) of the tokens that they merged into.
        record: of the merge; None where there is none.
    """

    before: Tensor
    after: Tensor
    record: MergeRecord | None


class RecordedPass:
    """What was recorded of one forward pass.

    Attributes:
        records: of its merges.
        packed_merges: those after the projector, of a model that cuts images into tiles.
        layouts: of the images of such a model; none until they were packed.
        positions: (M,) of each image's tokens in the sequence that is packed without merging.
    """

    def __init__(self) -> None:
        """Holds nothing yet."""
        self.records: list[MergeRecord] = []
        self.packed_merges: list[PackedMerge] = []
        self.layouts: tuple[ImageLayout, ...] = ()
        self.positions: tuple[Tensor, ...] = ()


def trace_tiles(found: RecordedPass, image: int = 0) -> MergeTrace:
    """The trace of the only image, or video, of a pass, on the grid of `canvas_of`.

    A token of a pooled region is that of the patches nearest to it. Tokens after the projector have the
    indices that they have among the image's tokens, newlines counted.

    Raises:
        ValueError: no image was encoded, or several, or `image` is not 0.
    """
    if not found.layouts:
        raise ValueError("no image was encoded: run the model first")
    if len(found.layouts) > 1:
        raise ValueError(
            f"the last pass had {len(found.layouts)} images; of a model that cuts images into tiles, a pass "
            "with one image is traced"
        )
    if image != 0:
        raise ValueError(f"image={image} is not allowed: the last pass had 1 images")
    return _Tracer(found).trace()


class _Tracer:
    """Follows the patches of one image through a pass.

    Attributes:
        token: (T, S) the token that each patch is in, by its index in its tile and, after the projector,
            among the image's.
        dropped: (T, S) as in PatchState.
    """

    def __init__(self, found: RecordedPass):
        """Starts before the first merge."""
        self.found, (self.layout,), (self.final,) = found, found.layouts, found.positions
        self.canvas = canvas_of(self.layout)
        tiles, patches = self.canvas.cell.shape
        self.token = torch.arange(patches, device="cpu").repeat(tiles, 1)
        self.kept = self.token.clone()  # (T, n) the patch that stands for each token of a tile
        self.dropped = self.canvas.shows & ~self._reaching()[:, None]
        self.live = self.canvas.shows & ~self.dropped
        self.merges: list[TracedMerge] = []
        self.start = self.state = self._state_in_tiles()

    def trace(self) -> MergeTrace:
        """The whole trace."""
        for record in self.found.records:
            if record.place == "tower":
                self._merge_in_tower(record)
        self._pack()
        for record in self.found.records:
            if record.place == "decoder":
                self._merge_in_language_model(record)
        return MergeTrace(int(self.canvas.shows.sum()), tuple(self.merges), self.start)

    def _reaching(self) -> Tensor:
        """Which tiles (T,) are in a region whose tokens are packed."""
        packed = torch.cat([self.final, *(merge.before.flatten() for merge in self.found.packed_merges)])
        reaching, first = [], 0
        for region in self.layout.regions:
            end = first + region.tokens + region.num_newlines
            is_in = bool(((packed >= first) & (packed < end)).any())
            reaching += [is_in] * region.tiles
            first = end
        return torch.tensor(reaching, device="cpu")

    def _add(self, record: MergeRecord, compared: list[ComparedTokens], after: PatchState) -> None:
        merge = TracedMerge(record.place, record.layer, self.state, after, _first(record), tuple(compared))
        self.merges.append(merge)
        self.state = after

    def _state_in_tiles(self) -> PatchState:
        """The state while tokens are in tiles: those that show the image are counted through."""
        tile = torch.arange(len(self.token), device="cpu")[:, None] * self.token.shape[1]
        used, slot = (self.token + tile)[self.live].unique(return_inverse=True)
        slots = torch.full_like(self.token, OUTSIDE)
        slots[self.live] = slot
        return PatchState(
            self.canvas.spread(slots, OUTSIDE), self.canvas.spread(self.dropped, False), len(used)
        )

    def _merge_in_tower(self, record: MergeRecord) -> None:
        plan, tiles = _on_cpu(record.plan), len(record.metric)
        compared = self._compared_in_tower(record)
        before = self.token[:tiles]
        self.dropped[:tiles] |= self.live[:tiles] & record.dropped.cpu().gather(1, before)
        self.token[:tiles] = plan.slot.gather(1, before)
        self.kept = self.kept[:tiles].gather(1, plan.kept)
        self._add(record, compared, self._state_in_tiles())

    def _compared_in_tower(self, record: MergeRecord) -> list[ComparedTokens]:
        """The tokens of the tiles, those of padding left out, by how many there are in a tile."""
        by_count: dict[int, list[tuple[int, Tensor]]] = {}
        for tile in range(len(record.metric)):
            used = self.token[tile][self.live[tile]].unique()
            if len(used):
                by_count.setdefault(len(used), []).append((tile, used))
        found = []
        for members in by_count.values():
            metric = torch.stack(
                [record.metric[tile, used.to(record.metric.device)] for tile, used in members]
            )
            part, index = (torch.full_like(self.token, OUTSIDE) for _ in range(2))
            for i, (tile, used) in enumerate(members):
                live = self.live[tile]
                part[tile, live] = i
                index[tile, live] = torch.searchsorted(used, self.token[tile, live])
            found.append(ComparedTokens(metric, *(self.canvas.spread(x, OUTSIDE) for x in (part, index))))
        return found

    def _pack(self) -> None:
        """After the projector: from tokens of tiles to those of the image."""
        position = packed_positions(self.layout)  # (T, S)
        for region in self.layout.regions:
            own = slice(region.first, min(region.first + region.tiles, len(self.kept)))
            if not region.is_pooled:  # a token is where the patch is that stands for it
                stands_for = self.kept[own].gather(1, self.token[own])
                position[own] = position[own].gather(1, stands_for)
        compared: list[ComparedTokens] = []
        for merge in self.found.packed_merges:
            position = self._merge_packed(merge, position, compared)
        index = torch.searchsorted(self.final, position.clamp_min(0))
        self.token = torch.where(self.live, index, OUTSIDE)
        records = [merge.record for merge in self.found.packed_merges if merge.record is not None]
        after = self._state_of_image(len(self.final))
        first = None if not records else _first(records[0])
        self.merges.append(TracedMerge("prefix", 0, self.state, after, first, tuple(compared)))
        self.state = after

    def _merge_packed(self, merge: PackedMerge, position: Tensor, compared: list[ComparedTokens]) -> Tensor:
        """The positions (T, S) after a merge of packed tokens, which is added to `compared`."""
        count = self.layout.tokens
        moved = torch.arange(count, device="cpu")
        part, index = (torch.full((count,), OUTSIDE, device="cpu") for _ in range(2))
        drops = torch.zeros(count, dtype=torch.bool, device="cpu")
        for i, (before, after) in enumerate(zip(merge.before, merge.after)):
            moved[before], part[before] = after, i
            index[before] = torch.arange(len(before), device="cpu")
            if merge.record is not None:
                drops[before] = merge.record.dropped[i].cpu()
        at = position.clamp_min(0)
        self.dropped |= self.live & drops[at]
        if merge.record is not None:
            cells = (torch.where(self.live, x[at], OUTSIDE) for x in (part, index))
            compared.append(
                ComparedTokens(merge.record.metric, *(self.canvas.spread(x, OUTSIDE) for x in cells))
            )
        return torch.where(self.live, moved[at], position)

    def _merge_in_language_model(self, record: MergeRecord) -> None:
        slot, dropped = _on_cpu(record.plan).slot[0], record.dropped[0].cpu()
        at = self.token.clamp_min(0)
        index = self.canvas.spread(self.token, OUTSIDE)
        part = torch.where(index >= 0, 0, OUTSIDE)
        self.dropped |= self.live & dropped[at]
        self.token = torch.where(self.live, slot[at], OUTSIDE)
        self._add(
            record, [ComparedTokens(record.metric, part, index)], self._state_of_image(record.plan.length)
        )

    def _state_of_image(self, tokens: int) -> PatchState:
        """The state once tokens are the image's."""
        return PatchState(
            self.canvas.spread(self.token, OUTSIDE), self.canvas.spread(self.dropped, False), tokens
        )


def packed_positions(layout: ImageLayout) -> Tensor:
    """Where each patch (T, S) is in the sequence that the model packs without merging; OUTSIDE for padding.

    Of a region that the model pools, it is the place of the token nearest to the patch.
    """
    side, first, tiles = layout.side, 0, []
    for region in layout.regions:
        rows, columns = region.rows * side, region.columns * side
        grid = torch.full((rows, columns), OUTSIDE, device="cpu")
        top, bottom, left, right = region.window
        if region.window.area and region.tokens:
            down, across = _nearest(bottom - top, region.height), _nearest(right - left, region.width)
            step = region.width + region.newlines
            grid[top:bottom, left:right] = first + down[:, None] * step + across
        tiles.append(_in_tiles(grid, region, side))
        first += region.tokens + region.num_newlines
    return torch.cat(tiles)


def _nearest(patches: int, tokens: int) -> Tensor:
    """The token, of evenly spaced ones, that is nearest to each patch of a row or column."""
    return torch.arange(patches, device="cpu") * tokens // patches


def _in_tiles(grid: Tensor, region: Region, side: int) -> Tensor:
    """Values of a region's patches by tile (tiles, S)."""
    tiles = grid.view(region.rows, side, region.columns, side).transpose(1, 2)
    return tiles.reshape(region.tiles, side * side).contiguous()


def _first(record: MergeRecord) -> MergeRecord:
    """The record of the first part alone."""
    tensors = {name: x[:1] for name, x in record.plan._asdict().items() if isinstance(x, Tensor)}
    return record._replace(
        metric=record.metric[:1], plan=record.plan._replace(**tensors), dropped=record.dropped[:1]
    )


def _on_cpu(plan: MergePlan) -> MergePlan:
    return MergePlan(*(x.cpu() if isinstance(x, Tensor) else x for x in plan))
