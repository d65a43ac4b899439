"""One model for several people: what they ask for is done one after the other, each merging as he chose."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, NamedTuple

from PIL import Image
from torch import nn

from llava_pitome.api import apply, remove
from llava_pitome.cli.chat.conversation import AnswerStats, Conversation
from llava_pitome.config import MergeConfig
from llava_pitome.flops import closed_form
from llava_pitome.models import hf_llava as llava
from llava_pitome.tracing import ImageTrace, trace_image


class Answer(NamedTuple):
    """An answer so far.

    Attributes:
        text: what there is of it.
        numbers: what it cost; None until it is whole.
        gflops: of its prompt, in billions of operations; None until then.
    """

    text: str
    numbers: AnswerStats | None = None
    gflops: float | None = None


class Desk:
    """Asks a model, in a thread of its own, so that nobody's merging reaches another's answer.

    The answer of a person who leaves ends with the next token.

    Attributes:
        patches: of a picture.
        feature: layers of the tower that can merge.
    """

    def __init__(self, model: nn.Module, processor: Any, max_new_tokens: int):
        """Takes a model over, merging or not, and its processor."""
        self._model, self._processor, self._most = model, processor, max_new_tokens
        self._parts = llava.find(model)
        self.patches, self.feature = self._parts.patches, self._parts.feature
        self._turns = ThreadPoolExecutor(1)

    def ask(self, picture: Image.Image | None, question: str, config: MergeConfig | None) -> Iterator[Answer]:
        """The answer as it grows; the last one has the numbers.

        Args:
            picture: what is asked about, if anything.
            question: of a person.
            config: how to merge; None: not at all.

        Raises:
            ValueError: the question cannot be asked, or the model cannot merge so.
        """
        pieces: SimpleQueue[str | None] = SimpleQueue()
        left = threading.Event()
        done = self._turns.submit(self._answer, picture, question, config, pieces, left)
        done.add_done_callback(lambda _: pieces.put(None))
        text = ""
        try:
            while (piece := pieces.get()) is not None:
                text += piece
                yield Answer(text)
            numbers = done.result()
            yield Answer(text, numbers, self._gflops(numbers, config))
        finally:
            left.set()
            done.cancel()  # a turn that has not begun

    def study(self, picture: Image.Image, question: str, config: MergeConfig) -> ImageTrace:
        """What becomes of the picture's patches."""
        traced = self._turns.submit(trace_image, self._model, self._processor, picture, config, question)
        return traced.result()

    def _answer(
        self,
        picture: Image.Image | None,
        question: str,
        config: MergeConfig | None,
        pieces: "SimpleQueue",
        left: threading.Event,
    ) -> AnswerStats | None:
        """Works one answer out, as long as somebody reads it."""
        if config is None:
            remove(self._model)
        else:
            apply(self._model, config, self._processor)
        conversation = Conversation(self._model, self._processor, self._most)
        if picture is not None:
            conversation.add_image(picture)
        for piece in conversation.ask(question, left):
            pieces.put(piece)
        return conversation.stats

    def _gflops(self, numbers: AnswerStats, config: MergeConfig | None) -> float:
        """Of the prompt, by formula."""
        config = config or MergeConfig(ratio=1.0)
        text = numbers.prompt_tokens - numbers.image_tokens
        layers = llava.shapes(self._model).llm_layers
        if not numbers.patches:
            nothing = (0,) * (self.feature + 1)
            return closed_form(self._model, nothing, text, (0,) * (layers + 1)).llm / 1e9
        seen = config.patches_at(self.patches)
        tokens = config.tokens_at(self.patches, self.feature)
        lengths = config.lengths(seen, self.feature)
        return closed_form(
            self._model, lengths, text, config.llm_lengths(tokens, layers), config.site
        ).total / 1e9  # fmt: skip
