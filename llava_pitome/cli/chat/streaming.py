"""An answer as a stream of text, with the time of every token."""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer


class AnswerStream(TextIteratorStreamer):
    """The text of one answer while it is generated, as an iterator.

    Attributes:
        times: `time.perf_counter()` at each generated token.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, stop: threading.Event | None = None):
        """Prepares the stream; `generate` starts it.

        Args:
            model: a LLaVA, merging or not.
            tokenizer: its processor's.
            stop: ends generation at the next token once it is set.
        """
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []
        self._model, self._stop, self._is_prompt = model, stop or threading.Event(), True

    def generate(self, **inputs: Any) -> Iterator[str]:
        """The pieces of the answer to a single prompt; closing the iterator ends generation.

        Args:
            **inputs: for the model's `generate`.

        Raises:
            Exception: whatever the model's `generate` raises, after the pieces before it.
        """
        criteria = StoppingCriteriaList([StopOnEvent(self._stop)])
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(self._model.generate, **inputs, streamer=self, stopping_criteria=criteria)
            done.add_done_callback(lambda _: self.text_queue.put(self.stop_signal))  # after an error too
            try:
                yield from self
            finally:
                self._stop.set()
            done.result()

    def put(self, value: Tensor) -> None:
        """Takes the prompt first, then one token at a time."""
        if not self._is_prompt:
            self.times.append(time.perf_counter())
        self._is_prompt = False
        super().put(value)


class StopOnEvent(StoppingCriteria):
    """Ends generation once an event is set."""

    def __init__(self, event: threading.Event | asyncio.Event):
        """Checks the event before every token."""
        self._event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Whether each row (B,) is done."""
        return torch.full((len(input_ids),), self._event.is_set(), device=input_ids.device)
