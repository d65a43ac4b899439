"""One model for all users of the page: requests run one after another, each with its own merging."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from llava_pitome.api import apply, remove
from llava_pitome.cli.chat.conversation import AnswerStats, Conversation
from llava_pitome.cli.draw.configs import amount_in_own_place
from llava_pitome.config import MergeConfig
from llava_pitome.flops import closed_form, closed_form_of_layouts
from llava_pitome.models import hf_llava
from llava_pitome.models.image_counts import counts_of
from llava_pitome.token_schedule import kept_tokens
from llava_pitome.tracing import ImageTrace, trace_image

if TYPE_CHECKING:
    from PIL import Image

RATIO = 0.9  # without --ratio and a saved config
RATIO_STEP = 0.005  # of the slider


class InitialChoices(NamedTuple):
    """What is chosen when the page opens.

    Attributes:
        method: a name in METHODS.
        ratio: value of the slider.
        note: shown where the model was saved to merge otherwise; else empty.
    """

    method: str = MergeConfig.method
    ratio: float = RATIO
    note: str = ""


def initial_choices(
    ratio: float | None, saved: MergeConfig | None, patches: int, layers: int, has_tiles: bool = False
) -> InitialChoices:
    """Returns the ratio of the command, or else what was saved with the model where the page can express it.

    Args:
        ratio: of the command, if any.
        saved: config of the model, if any.
        patches: of an image or tile.
        layers: of the vision tower, up to the feature layer.
        has_tiles: whether the model cuts images into tiles.
    """
    if ratio is not None:
        return InitialChoices(ratio=ratio)
    if saved is None:
        return InitialChoices()
    steps = [round(1 - RATIO_STEP * i, 3) for i in range(round(1 / RATIO_STEP))]
    for candidate in [saved.ratio] if isinstance(saved.ratio, int | float) else steps:
        if merge_config(saved.method, candidate, patches, layers, has_tiles) == saved:
            return InitialChoices(saved.method, candidate)
    return InitialChoices(
        note=f"This model was saved to merge with `{json.dumps(saved.changes())}`, which a method and a "
        f"ratio cannot express. It is not used here: the page starts with {MergeConfig.method} at a ratio of "
        f"{RATIO}."
    )


def merge_config(
    method: str, ratio: float, patches: int, layers: int, has_tiles: bool = False
) -> MergeConfig:
    """Returns a config that merges where the method's paper does, down to the tokens that the ratio leaves.

    Args:
        method: a name in METHODS.
        ratio: share of tokens that each layer of the vision tower keeps.
        patches: of an image or tile.
        layers: of the vision tower, up to the feature layer.
        has_tiles: whether the model cuts images into tiles.
    """
    amount = amount_in_own_place(method, {"ratio": ratio}, patches, layers, has_tiles)
    return MergeConfig(method=method, **amount)


class Answer(NamedTuple):
    """An answer so far.

    Attributes:
        text: generated so far.
        stats: its cost; None until it is complete.
        gflops: of its prompt, in billions of operations; None until it is complete.
    """

    text: str
    stats: AnswerStats | None = None
    gflops: float | None = None


class Session:
    """Runs a model in one thread, so that no user's merging reaches the answer of another.

    Attributes:
        counts: of the model.
        patches: of an image or tile.
        layers: of the vision tower, up to the feature layer.
    """

    def __init__(self, model: nn.Module, processor: Any, max_new_tokens: int):
        """Takes over a model, merging or not, and its processor."""
        self._model, self._processor, self._max_new_tokens = model, processor, max_new_tokens
        self.counts = counts_of(hf_llava.find(model))
        self.patches, self.layers, tiling = self.counts
        self.has_tiles = tiling is not None
        self._pool = ThreadPoolExecutor(1)

    def answer(
        self, image: "Image.Image | None", question: str, config: MergeConfig | None
    ) -> Iterator[Answer]:
        """Yields the answer as it grows, at last with statistics. Closing the iterator ends generation.

        Args:
            image: which the question is about, if any.
            question: of a user.
            config: how to merge; None: not at all.

        Raises:
            ValueError: an invalid question, or a config that does not fit the model.
        """
        pieces: SimpleQueue[str | None] = SimpleQueue()
        closed = threading.Event()

        def generate() -> AnswerStats | None:
            if config is None:
                remove(self._model)
            else:
                apply(self._model, config, self._processor)
            conversation = Conversation(self._model, self._processor, self._max_new_tokens)
            if image is not None:
                conversation.add_image(image)
            for piece in conversation.ask(question, closed):
                pieces.put(piece)
            return conversation.stats

        work = self._pool.submit(generate)
        work.add_done_callback(lambda _: pieces.put(None))
        text = ""
        try:
            while (piece := pieces.get()) is not None:
                text += piece
                yield Answer(text)
            stats = work.result()
            yield Answer(text, stats, self._gflops(stats, config, image))
        finally:
            closed.set()
            work.cancel()  # where it has not begun

    def trace(self, image: "Image.Image", question: str, config: MergeConfig) -> ImageTrace:
        """Returns which patch of the image went into which token."""
        return self._pool.submit(trace_image, self._model, self._processor, image, config, question).result()

    def amount(self, config: MergeConfig) -> str:
        """Returns how many tokens a config leaves of an image, of the nominal size where that matters."""
        tokens, unmerged = (self.counts.images(c, [None])[0] for c in (config, None))
        for layer, keep in config.decoder.items():
            tokens = kept_tokens(tokens, keep, f"decoder[{layer}]")
        line = f"{tokens} image tokens of {unmerged}"
        if not self.has_tiles:
            return line
        height, width = self.counts.tiling.nominal_size
        return f"{line} for an image of {width} x {height} pixels"

    def _gflops(self, stats: AnswerStats, config: MergeConfig | None, image: "Image.Image | None") -> float:
        """Returns the GFLOPs of the prompt by formula."""
        config = config or MergeConfig(ratio=1.0)
        text = stats.prompt_tokens - stats.image_tokens
        if self.has_tiles:
            layouts = [] if image is None else [self.counts.tiling.image(image.height, image.width)]
            return closed_form_of_layouts(self._model, layouts, text, config).total / 1e9
        layers = hf_llava.shapes(self._model).llm_layers
        if not stats.patches:
            nothing = (0,) * (self.layers + 1)
            return closed_form(self._model, nothing, text, (0,) * (layers + 1)).llm / 1e9
        lengths = config.lengths(config.patches_at(self.patches), self.layers)
        llm_lengths = config.llm_lengths(config.tokens_at(self.patches, self.layers), layers)
        return closed_form(self._model, lengths, text, llm_lengths, config.site).total / 1e9
