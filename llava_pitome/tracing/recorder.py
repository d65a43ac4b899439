"""A recorder of the merges of a model that runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident

import torch
from torch import Tensor

from llava_pitome.hooks.handle import MergeHandle
from llava_pitome.hooks.merge_step import MergeRecord
from llava_pitome.image_layout import ImageLayout
from llava_pitome.tracing.states import ComparedTokens, MergeTrace, PatchState, TracedMerge, position
from llava_pitome.tracing.tiles import PackedMerge, RecordedPass, trace_tiles


class MergeRecorder:
    """The merges of the last forward pass of a model; made by `record_merges`.

    Of this thread's last one, or, in a thread that ran none, of the one that began last.
    """

    def __init__(self, handle: MergeHandle):
        """Records nothing yet."""
        self._handle = handle
        self._of_thread: dict[int, RecordedPass] = {}

    @property
    def _last(self) -> RecordedPass:
        newest = next(reversed(self._of_thread.values()), RecordedPass())
        return self._of_thread.get(get_ident(), newest)

    def _begin(self) -> RecordedPass:
        """Makes a pass of this thread's the one that began last."""
        self._of_thread.pop(get_ident(), None)
        self._of_thread[get_ident()] = RecordedPass()
        return self._of_thread[get_ident()]

    def add(self, record: MergeRecord) -> None:
        """Adds a merge; one in a layer that is not after the last one's starts a new forward pass."""
        found = self._of_thread.get(get_ident())
        if found is None or self._starts(found, record):
            found = self._begin()
        found.records.append(record)

    def _starts(self, found: RecordedPass, record: MergeRecord) -> bool:
        """Whether a merge is of another forward pass than the one that was recorded so far."""
        if found.layouts and record.place != "decoder":  # its images were packed already
            return True
        if not found.records:
            return False
        at, last = (position(r.place, r.layer) for r in (record, found.records[-1]))
        is_part = record.place == "prefix" and self._handle.packing is not None
        return at < last or (at == last and not is_part)

    def merged(self, before: Tensor, after: Tensor, record: bool) -> None:
        """Adds a merge of packed tokens, see `hooks.image_packing.ImagePacking.listener`."""
        found = self._of_thread.get(get_ident())
        if found is None or found.layouts:
            found = self._begin()
        found.packed_merges.append(
            PackedMerge(before.cpu(), after.cpu(), found.records[-1] if record else None)
        )

    def packed(self, layouts: Sequence[ImageLayout], positions: Sequence[Tensor]) -> None:
        """Ends the images of a forward pass, see `hooks.image_packing.ImagePacking.listener`."""
        found = self._of_thread.get(get_ident())
        if found is None or found.layouts:
            found = self._begin()
        found.layouts, found.positions = tuple(layouts), tuple(x.cpu() for x in positions)

    def trace(self, image: int = 0) -> MergeTrace:
        """The trace of one image of the last forward pass.

        `image` is its index, in the order of the prompts. Of a model that cuts images into tiles, it is the
        trace of the grid that `tracing.tiles.Canvas` describes.

        Raises:
            ValueError: no forward pass was recorded, or it had no image of that index, or several where the
                model cuts images into tiles.
        """
        if self._handle.packing is not None:
            return trace_tiles(self._last, image)
        patches = self._handle.patches()
        if not patches:
            raise ValueError("no image was encoded: run the model first")
        records = self._last.records
        count = min((len(record.metric) for record in records), default=image + 1)
        if not 0 <= image < count:
            raise ValueError(f"image={image} is not allowed: the last pass had {count} images")
        state, merges = MergeTrace(patches, ()).initial, []
        for batch in records:
            record = _of_image(batch, image)
            slot, dropped = record.plan.slot[0].cpu(), record.dropped[0].cpu()
            after = PatchState(
                slot[state.slot], state.dropped | dropped[state.slot], record.plan.kept.shape[1]
            )
            compared = (ComparedTokens(record.metric, torch.zeros_like(state.slot), state.slot),)
            merges.append(TracedMerge(record.place, record.layer, state, after, record, compared))
            state = after
        return MergeTrace(patches, tuple(merges))

    @property
    def layout(self) -> ImageLayout | None:
        """How the last forward pass cut its image into tiles; None where it did not."""
        return self._last.layouts[0] if self._last.layouts else None


@contextmanager
def record_merges(handle: MergeHandle) -> Iterator[MergeRecorder]:
    """Records the merges of a model inside a with block, without changing its results.

    Raises:
        RuntimeError: another recorder is active.
    """
    recorder = MergeRecorder(handle)
    handle.record(recorder.add)
    if handle.packing is not None:
        handle.packing.listener = recorder
    try:
        yield recorder
    finally:
        handle.record(None)
        if handle.packing is not None:
            handle.packing.listener = None


def _of_image(record: MergeRecord, image: int) -> MergeRecord:
    """The record of a batch, cut down to one of its images."""
    row = slice(image, image + 1)
    tensors = {name: x[row] for name, x in record.plan._asdict().items() if isinstance(x, Tensor)}
    plan = record.plan._replace(**tensors)
    return record._replace(metric=record.metric[row], plan=plan, dropped=record.dropped[row])
