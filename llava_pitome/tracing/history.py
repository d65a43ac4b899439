"""What became of each patch of a picture: watched while a model merges, and told merge by merge.

Shapes: B images, N patches of a picture, M tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from llava_pitome.config import MergeConfig
from llava_pitome.hooks.handle import MergeHandle
from llava_pitome.hooks.merge_step import MergeRecord
from llava_pitome.methods import METHODS, PLACES


class State(NamedTuple):
    """Where a picture's patches are, somewhere in the model.

    Attributes:
        slot: (N,) the token that each patch is in.
        dropped: (N,) True for patches that left nothing behind; their slot is then where a method put them.
        tokens: M, how many there are.
    """

    slot: Tensor
    dropped: Tensor
    tokens: int


class Merge(NamedTuple):
    """One merge of one picture.

    Attributes:
        place: a name in PLACES.
        layer: the tower's or the language model's, from 0; 0 at the prefix.
        before: where the patches were in front of it.
        after: where they are behind it.
        sight: what it went by, a batch of one.
    """

    place: str
    layer: int
    before: State
    after: State
    sight: MergeRecord

    def energy(self, borrowed: bool = False) -> Tensor | None:
        """The energy (N,) of the token that each patch was in, in front of the merge (the paper, eq. 4).

        It is computed by the method's own function on what the method was given. None where the method goes
        by no energy; with `borrowed` it is PiToMe's, as the paper has it, on the same tokens.
        """
        sight = self.sight
        energies = METHODS[sight.method](**sight.parameters).energies(sight.metric, sight.depth)
        if energies is None and borrowed:
            energies = METHODS[MergeConfig.method]().energies(sight.metric, sight.depth)
        return None if energies is None else energies[0].cpu()[self.before.slot]


class History(NamedTuple):
    """All merges of one picture, in order.

    Attributes:
        patches: N.
        merges: in the tower, at the prefix, in the language model.
    """

    patches: int
    merges: tuple[Merge, ...]

    @property
    def start(self) -> State:
        """Every patch is a token."""
        return State(torch.arange(self.patches), torch.zeros(self.patches, dtype=torch.bool), self.patches)

    def after(self, place: str, layer: int = 0) -> State:
        """Where the patches are behind a layer of the tower or language model (from 0), or the prefix."""
        passed = [m for m in self.merges if _order(m.place, m.layer) <= _order(place, layer)]
        return passed[-1].after if passed else self.start

    def merge(self, place: str, layer: int = 0) -> Merge | None:
        """The merge there; None where nothing merges."""
        return next((m for m in self.merges if (m.place, m.layer) == (place, layer)), None)


class Watch:
    """What is seen of the last forward pass of a model that merges."""

    def __init__(self, merging: MergeHandle):
        """Prepares watching, which `watching` begins and ends."""
        self._merging = merging
        self._seen: list[tuple[str, int, MergeRecord]] = []

    def show(self, place: str, layer: int, sight: MergeRecord) -> None:
        """Takes a merge in; one that is not behind the last begins another pass."""
        if self._seen and _order(place, layer) <= _order(*self._seen[-1][:2]):
            self._seen.clear()
        self._seen.append((place, layer, sight))

    def history(self, image: int = 0) -> History:
        """What became of one picture of the last forward pass.

        Args:
            image: which of its pictures, in the order of the prompts.

        Raises:
            ValueError: there was no pass, or it had not as many pictures.
        """
        patches = self._merging.patches()
        if not patches:
            raise ValueError("no picture was encoded: run the model first")
        count = min((len(sight.metric) for _, _, sight in self._seen), default=image + 1)
        if not 0 <= image < count:
            raise ValueError(f"image={image} is not allowed: the last pass had {count} pictures")
        state, merges = History(patches, ()).start, []
        for place, layer, sight in self._seen:
            one = _of(sight, image)
            after = _later(state, one)
            merges.append(Merge(place, layer, state, after, one))
            state = after
        return History(patches, tuple(merges))


@contextmanager
def watching(merging: MergeHandle) -> Iterator[Watch]:
    """Watches a model merge; afterwards `history` tells of the last forward pass inside the block.

    Raises:
        RuntimeError: somebody else is watching it.
    """
    watch = Watch(merging)
    merging.watch(watch.show)
    try:
        yield watch
    finally:
        merging.watch(None)


def _order(place: str, layer: int) -> tuple[int, int]:
    return PLACES.index(place), layer


def _of(sight: MergeRecord, image: int) -> MergeRecord:
    """One picture's part of what was seen of a batch."""
    at = slice(image, image + 1)
    plan = sight.plan._replace(**{k: getattr(sight.plan, k)[at] for k in ("slot", "kept", "gone")})
    return sight._replace(metric=sight.metric[at], plan=plan, dropped=sight.dropped[at])


def _later(state: State, sight: MergeRecord) -> State:
    """Where the patches are behind a merge."""
    slot, dropped = sight.plan.slot[0].cpu(), sight.dropped[0].cpu()
    return State(slot[state.slot], state.dropped | dropped[state.slot], sight.plan.length)
