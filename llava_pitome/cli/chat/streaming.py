"""An answer piece by piece while the model still generates, with the times that people feel."""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer


class Stream:
    """One answer that is being generated.

    Attributes:
        started: `time.perf_counter()` before anything was done for it.
        times: when each token was there, on the same clock.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        inputs: dict[str, Any],
        started: float | None = None,
        stop: threading.Event | None = None,
    ):
        """Prepares the answer; `pieces` starts it.

        Args:
            model: a LLaVA, merging or not.
            tokenizer: of its processor.
            inputs: everything for `generate`, of a single prompt (1, T).
            started: when work on it began, where that was earlier than now.
            stop: ends the generation once it is set, with the next token.
        """
        self.started = time.perf_counter() if started is None else started
        self.times: list[float] = []
        self._model, self._inputs = model, inputs
        self._text = _Timed(tokenizer, self.times)
        self._stop = stop or threading.Event()

    def pieces(self) -> Iterator[str]:
        """The answer's text as it comes; leaving early ends the generation.

        Raises:
            Exception: whatever `generate` raised, after the pieces that came before.
        """
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(
                self._model.generate,
                **self._inputs,
                streamer=self._text,
                stopping_criteria=StoppingCriteriaList([Until(self._stop)]),
            )
            done.add_done_callback(lambda _: self._text.close())  # an error ends the text, too
            try:
                yield from self._text
            finally:
                self._stop.set()
            done.result()


class _Timed(TextIteratorStreamer):
    """Text as it can be read, and the time of every token."""

    def __init__(self, tokenizer: Any, times: list[float]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._times, self._prompt = times, True

    def put(self, value: Tensor) -> None:
        """Takes the prompt first, then one token at a time."""
        if not self._prompt:
            self._times.append(time.perf_counter())
        self._prompt = False
        super().put(value)

    def close(self) -> None:
        """Ends the text, however generation ended."""
        self.text_queue.put(self.stop_signal)


class Until(StoppingCriteria):
    """Ends generation once an event is set."""

    def __init__(self, event: threading.Event | asyncio.Event):
        """Looks at an event before every token."""
        self._event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Whether each row (B,) is done."""
        return torch.full((len(input_ids),), self._event.is_set(), device=input_ids.device)
