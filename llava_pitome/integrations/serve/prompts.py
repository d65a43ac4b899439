"""From a request's conversation to the model's inputs, beside the event loop and within bounded memory."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jinja2 import TemplateError

from llava_pitome.integrations.serve import images
from llava_pitome.integrations.serve.limits import Limits
from llava_pitome.integrations.serve.remote import fetch
from llava_pitome.integrations.serve.request import Refused, parts

FETCHING = 8  # requests whose pictures are fetched at one time


class Prompts:
    """Prepares one request at a time, in a thread of its own: so many pictures are in memory, not more.

    Fetching, which is waiting, has threads of its own, so that a slow address holds up nobody who sends his
    pictures along.
    """

    def __init__(self, processor: Any, tokens: int, limits: Limits, read: images.Read = fetch):
        """Prepares within limits.

        Args:
            processor: of the model, which `apply` was given where it merges.
            tokens: image tokens of a picture.
            limits: what requests may ask.
            read: fetches what an address holds.
        """
        self._processor, self._tokens, self._limits, self._read = processor, tokens, limits, read
        self._preparing = ThreadPoolExecutor(1, "prepare")
        self._fetching = ThreadPoolExecutor(FETCHING, "fetch")

    async def inputs(self, messages: list[dict[str, Any]]) -> Any:
        """What the model takes: `input_ids` (1, T) and, with pictures, `pixel_values` (pictures, 3, H, W).

        Args:
            messages: a conversation that was checked.

        Raises:
            Refused: it has too many tokens, or a picture that cannot be had.
        """
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._preparing, self._count, messages)
        held: dict[str, bytes] = {}
        if any(map(images.is_remote, images.addresses(messages))):
            held = await self._fetched(messages)
        return await loop.run_in_executor(self._preparing, self._processed, messages, held)

    async def _fetched(self, messages: list[dict[str, Any]]) -> dict[str, bytes]:
        """The pictures that are not in the request."""
        seconds = self._limits.seconds
        work = self._fetching.submit(
            images.fetched, messages, self._limits, time.monotonic() + seconds, self._read
        )
        try:  # also ends the wait for a thread, and for a name server
            return await asyncio.wait_for(asyncio.wrap_future(work), seconds)
        except TimeoutError as error:
            if work.cancelled():  # before it began
                raise Refused(
                    f"too many pictures are being fetched: none of {seconds} s was free", 503
                ) from error
            raise Refused(f"fetching the pictures took more than {seconds} s") from error

    def _count(self, messages: list[dict[str, Any]]) -> None:
        """Raises Refused for a conversation that is too long, before any of its pictures is touched."""
        turns = [
            {"role": message["role"], "content": [
                {"type": "image"} if part["type"] == "image_url" else part for part in parts(message, i)
            ]} for i, message in enumerate(messages)
        ]  # fmt: skip
        try:
            text = self._processor.apply_chat_template(turns, add_generation_prompt=True)
        except TemplateError as error:  # some refuse an order of roles
            raise Refused(f"the model's chat template refuses the messages: {error}") from error
        token = self._processor.image_token
        pictures = len(images.addresses(messages))
        if text.count(token) != pictures:  # parts of several texts may make one together
            raise Refused(f"the messages hold {token}, which stands for a picture: send image_url parts")
        said = self._processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        self.fits(len(said) + pictures * (self._tokens - 1))

    def fits(self, length: int) -> None:
        """Raises Refused for a prompt of too many tokens."""
        if length > self._limits.prompt:
            raise Refused(
                f"the prompt has {length} tokens, image tokens among them; at most {self._limits.prompt} are "
                "allowed"
            )

    def _processed(self, messages: list[dict[str, Any]], held: dict[str, bytes]) -> Any:
        """Opens the pictures, and hands everything to the processor."""
        conversation = images.opened(messages, self._limits, held)
        return self._processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
