"""Which patch of an image went into which token, recorded merge by merge while a model runs.

`record_merges` records a model that runs anyway, `trace_image` runs it once on one image.
Shapes: B images, N patches of an image, M tokens, C channels of a metric.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from llava_pitome.api import merge_tokens
from llava_pitome.config import MergeConfig
from llava_pitome.hooks.handle import MergeHandle
from llava_pitome.hooks.merge_step import MergeRecord
from llava_pitome.image_io import to_rgb
from llava_pitome.methods import METHODS, PLACES
from llava_pitome.models import hf_llava


class PatchState(NamedTuple):
    """The token that each patch of an image is in, at some point of the model.

    Attributes:
        slot: (N,) the index of the token that each patch is in.
        dropped: (N,) True for patches that no token's value comes from; their slot is the token that the
            method assigned them to.
        tokens: M, the number of tokens.
    """

    slot: Tensor
    dropped: Tensor
    tokens: int


class TracedMerge(NamedTuple):
    """One merge of one image.

    Attributes:
        place: a name in PLACES.
        layer: index of the layer in the tower or the language model; 0 after the projector.
        before: the patches before the merge.
        after: the patches after it.
        record: what the merge was computed from, with B = 1.
    """

    place: str
    layer: int
    before: PatchState
    after: PatchState
    record: MergeRecord

    def energy(self, fallback: bool = False) -> Tensor | None:
        """The energy (N,) of the token that each patch was in before the merge (the paper, eq. 4).

        The method's own function computes it from the metric that the method used. None for a method that
        has no energy, unless `fallback` asks for PiToMe's energy of the same tokens.
        """
        record = self.record
        energies = METHODS[record.method](**record.parameters).energies(record.metric, record.depth)
        if energies is None and fallback:
            energies = METHODS[MergeConfig.method]().energies(record.metric, record.depth)
        return None if energies is None else energies[0].cpu()[self.before.slot]


class MergeTrace(NamedTuple):
    """All merges of one image, in the order of the layers.

    Attributes:
        patches: N.
        merges: in the tower, after the projector, in the language model.
    """

    patches: int
    merges: tuple[TracedMerge, ...]

    @property
    def initial(self) -> PatchState:
        """The state before the first merge: every patch is a token."""
        patches = torch.arange(self.patches, device="cpu")
        return PatchState(patches, torch.zeros_like(patches, dtype=torch.bool), self.patches)

    def after(self, place: str, layer: int = 0) -> PatchState:
        """The state after a layer of the tower or the language model (from 0), or after the projector."""
        earlier = [m for m in self.merges if _position(m.place, m.layer) <= _position(place, layer)]
        return earlier[-1].after if earlier else self.initial

    def merge(self, place: str, layer: int = 0) -> TracedMerge | None:
        """The merge in a layer; None where nothing merges."""
        return next((m for m in self.merges if (m.place, m.layer) == (place, layer)), None)


class MergeRecorder:
    """The merges of the last forward pass of a model; made by `record_merges`.

    Of this thread's last one, or, in a thread that ran none, of the one that began last.
    """

    def __init__(self, handle: MergeHandle):
        """Records nothing yet."""
        self._handle = handle
        self._of_thread: dict[int, list[MergeRecord]] = {}

    @property
    def _records(self) -> list[MergeRecord]:
        newest = next(reversed(self._of_thread.values()), [])
        return self._of_thread.get(get_ident(), newest)

    def add(self, record: MergeRecord) -> None:
        """Adds a merge; one in a layer that is not after the last one's starts a new forward pass."""
        records = self._of_thread.get(get_ident(), [])
        position = _position(record.place, record.layer)
        if not records or position <= _position(records[-1].place, records[-1].layer):
            self._of_thread.pop(get_ident(), None)  # the last entry is of the pass that began last
            records = []
        records.append(record)
        self._of_thread[get_ident()] = records

    def trace(self, image: int = 0) -> MergeTrace:
        """The trace of one image of the last forward pass.

        `image` is its index, in the order of the prompts.

        Raises:
            ValueError: no forward pass was recorded, or it had no image of that index.
        """
        patches = self._handle.patches()
        if not patches:
            raise ValueError("no image was encoded: run the model first")
        count = min((len(record.metric) for record in self._records), default=image + 1)
        if not 0 <= image < count:
            raise ValueError(f"image={image} is not allowed: the last pass had {count} images")
        state, merges = MergeTrace(patches, ()).initial, []
        for batch in self._records:
            record = _of_image(batch, image)
            slot, dropped = record.plan.slot[0].cpu(), record.dropped[0].cpu()
            after = PatchState(
                slot[state.slot], state.dropped | dropped[state.slot], record.plan.kept.shape[1]
            )
            merges.append(TracedMerge(record.place, record.layer, state, after, record))
            state = after
        return MergeTrace(patches, tuple(merges))


@contextmanager
def record_merges(handle: MergeHandle) -> Iterator[MergeRecorder]:
    """Records the merges of a model inside a with block, without changing its results.

    Raises:
        RuntimeError: another recorder is active.
    """
    recorder = MergeRecorder(handle)
    handle.record(recorder.add)
    try:
        yield recorder
    finally:
        handle.record(None)


class ImageTrace(NamedTuple):
    """One image, one config, and what the config does to the image's patches.

    Attributes:
        config: how the model merged.
        image: the input of the vision tower as an image, after resizing, cropping and normalisation.
        grid: rows and columns of its patches.
        trace: its merges.
    """

    config: MergeConfig
    image: Image.Image
    grid: tuple[int, int]
    trace: MergeTrace


@torch.no_grad()
def trace_image(
    model: nn.Module, processor: Any, image: Image.Image, config: MergeConfig, question: str | None = None
) -> ImageTrace:
    """Runs a model once on an image, merging as `config` says, and returns the trace of the image.

    A config that was applied before, and the processor, are restored afterwards.

    Args:
        model: see `models.hf_llava.SUPPORTED`.
        processor: its processor.
        image: of any size and mode; it becomes RGB as by `image_io.to_rgb`.
        config: how to merge.
        question: about the image; needed, and used, only where the language model merges. A text that
            contains the processor's image token is taken as the complete prompt.

    Raises:
        ValueError: the model does not support the config, the image cannot become RGB, or a question is
            missing.
    """
    image = to_rgb(image)
    in_language_model = bool(config.merging_layers)
    if in_language_model and not question:
        raise ValueError(
            f"method {config.method!r} merges in the language model, which reads a question: give one"
        )
    with merge_tokens(model, config, processor) as handle, record_merges(handle) as recorder:
        pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
        if in_language_model:
            inputs = processor(images=image, text=_prompt(processor, question), return_tensors="pt")
            model(**inputs.to(model.device, model.dtype), logits_to_keep=1)
        else:
            hf_llava.encode(model, pixels)
        pixels = handle.resized(pixels)
        grid = tuple(side // processor.patch_size for side in pixels.shape[-2:])
        return ImageTrace(config, as_image(processor, pixels[0]), grid, recorder.trace())


def as_image(processor: Any, pixels: Tensor) -> Image.Image:
    """Pixel values (3, H, W) of one image as an RGB image, with the processor's normalisation undone."""
    settings, values = processor.image_processor, pixels.detach().cpu().float().numpy()
    if settings.do_normalize:
        mean, std = (
            np.asarray(x, np.float32).reshape(-1, 1, 1) for x in (settings.image_mean, settings.image_std)
        )
        values = values * std + mean
    if settings.do_rescale:
        values = values / settings.rescale_factor
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def _position(place: str, layer: int) -> tuple[int, int]:
    """A sort key: data passes the places in the order of PLACES, and their layers in ascending order."""
    return PLACES.index(place), layer


def _of_image(record: MergeRecord, image: int) -> MergeRecord:
    """The record of a batch, cut down to one of its images."""
    row = slice(image, image + 1)
    tensors = {name: x[row] for name, x in record.plan._asdict().items() if isinstance(x, Tensor)}
    plan = record.plan._replace(**tensors)
    return record._replace(metric=record.metric[row], plan=plan, dropped=record.dropped[row])


def _prompt(processor: Any, question: str) -> str:
    """The prompt of a question about one image."""
    if processor.image_token in question:
        return question
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
