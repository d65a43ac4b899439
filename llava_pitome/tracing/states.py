"""The token that each patch is in, at every point of a model.

Shapes: N cells of an image's grid, B parts of an image that merge alike, n tokens of a part, C channels of a
metric.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from llava_pitome.config import MergeConfig
from llava_pitome.hooks.merge_step import MergeRecord
from llava_pitome.methods import METHODS, PLACES

OUTSIDE = -1  # the slot of a cell without a patch, or whose patch shows padding


class PatchState(NamedTuple):
    """The token that each patch of an image is in, at some point of the model.

    Attributes:
        slot: (N,) the index of the token that each patch is in; OUTSIDE where no token stands for the cell.
        dropped: (N,) True for patches that no token's value comes from; their slot is the token that the
            method assigned them to.
        tokens: M, the number of tokens.
    """

    slot: Tensor
    dropped: Tensor
    tokens: int


class ComparedTokens(NamedTuple):
    """Tokens that a merge compared with those of the same part.

    Attributes:
        metric: (B, n, C) what similarity was measured on.
        part: (N,) the part that each patch was in; OUTSIDE for patches that were in none.
        index: (N,) the token of that part.
    """

    metric: Tensor
    part: Tensor
    index: Tensor


class TracedMerge(NamedTuple):
    """The merges of one image at one point of the model.

    Attributes:
        place: a name in PLACES.
        layer: index of the layer in the tower or the language model; 0 after the projector.
        before: the patches before the merge.
        after: the patches after it.
        record: what the merge was computed from, with B = 1; of several merges, as of the tiles of an image,
            the first one's. None where tokens were only packed.
        compared: the tokens of each merge.
    """

    place: str
    layer: int
    before: PatchState
    after: PatchState
    record: MergeRecord | None
    compared: tuple[ComparedTokens, ...]

    def energy(self, fallback: bool = False) -> Tensor | None:
        """The energy (N,) of the token that each patch was in before the merge (the paper, eq. 4).

        The method's own function computes it from the metric that the method used. None for a method that
        has no energy, unless `fallback` asks for PiToMe's energy of the same tokens, and where no tokens were
        compared. NaN for patches that were in none of these tokens.
        """
        if self.record is None:
            return None
        record, found = self.record, torch.full(self.before.slot.shape, torch.nan, device="cpu")
        method, pitome = METHODS[record.method](**record.parameters), METHODS[MergeConfig.method]()
        for metric, part, index in self.compared:
            energies = method.energies(metric, record.depth)
            if energies is None and fallback:
                energies = pitome.energies(metric, record.depth)
            if energies is None:
                return None
            is_in = part >= 0
            found[is_in] = energies.cpu().to(found.dtype)[part[is_in], index[is_in]]
        return found


class MergeTrace(NamedTuple):
    """All merges of one image, in the order of the layers.

    Attributes:
        patches: of the image, those that show padding not counted.
        merges: in the tower, after the projector, in the language model.
        start: the state before the first merge; None: every patch is a token.
    """

    patches: int
    merges: tuple[TracedMerge, ...]
    start: PatchState | None = None

    @property
    def initial(self) -> PatchState:
        """The state before the first merge."""
        if self.start is not None:
            return self.start
        patches = torch.arange(self.patches, device="cpu")
        return PatchState(patches, torch.zeros_like(patches, dtype=torch.bool), self.patches)

    def after(self, place: str, layer: int = 0) -> PatchState:
        """The state after a layer of the tower or the language model (from 0), or after the projector."""
        earlier = [m for m in self.merges if position(m.place, m.layer) <= position(place, layer)]
        return earlier[-1].after if earlier else self.initial

    def merge(self, place: str, layer: int = 0) -> TracedMerge | None:
        """The merge in a layer; None where nothing merges."""
        return next((m for m in self.merges if (m.place, m.layer) == (place, layer)), None)


def position(place: str, layer: int) -> tuple[int, int]:
    """A sort key: data passes the places in the order of PLACES, and their layers in ascending order."""
    return PLACES.index(place), layer
