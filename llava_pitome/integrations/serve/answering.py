"""One answer among many that wait: with its own seed, ended and forgotten when nobody waits for it."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import torch
from torch import nn
from transformers import StoppingCriteriaList

from llava_pitome.cli.chat.streaming import StopOnEvent

PROMPT = ("input_ids", "attention_mask")  # of a processor's inputs


class Left(Exception):
    """Nobody is to be answered any more: the client has left, or the server ends."""


class OneAnswer:
    """The model for one request: it has the pictures and the seed, and ends when nobody waits for it."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any], seed: int | None, left: asyncio.Event):
        """Wraps a model.

        Args:
            model: a LLaVA.
            inputs: of `generate` besides the prompt's tokens. They are let go when nobody waits any more:
                what waits for its turn in transformers' queue cannot be taken back out of it.
            seed: None leaves the draws as they come.
            left: tells that nobody waits.
        """
        self._model, self._inputs, self._seed, self._left = model, inputs, seed, left
        self._dropping = asyncio.create_task(self._drop())

    async def _drop(self) -> None:
        await self._left.wait()
        self._inputs = {}

    def __getattr__(self, name: str) -> Any:
        """Everything else is the model's."""
        return getattr(self._model, name)

    def generate(self, **inputs: Any) -> Any:
        """As the model's.

        Raises:
            Left: nobody waits for it any more.
        """
        held = self._inputs
        if self._left.is_set():
            raise Left
        device = self._model.device
        inputs |= {key: value.to(device) for key, value in held.items()}
        inputs |= {key: inputs[key].to(device) for key in PROMPT}
        inputs["stopping_criteria"] = StoppingCriteriaList([StopOnEvent(self._left)])
        if self._seed is None:
            return self._model.generate(**inputs)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self._seed)
            return self._model.generate(**inputs)


async def unless(left: asyncio.Event, working: Coroutine[Any, Any, Any], cancel: bool) -> Any:
    """What work comes to, or Left once nobody waits; the work is cancelled then, or else ends by itself."""
    work, leaving = asyncio.create_task(working), asyncio.create_task(left.wait())
    await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
    leaving.cancel()
    if work.done():
        return work.result()
    if cancel:
        work.cancel()
    work.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody waits for it
    raise Left
