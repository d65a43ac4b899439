"""A stream's events as OpenAI's clients read them: errors, usage, and the end."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from llava_pitome.integrations.serve.guard import error

FAILED = 'data: {"error": "'  # how transformers begins it, with a text behind that may hold anything
USAGE = '"usage":{'  # never inside of a text, whose quotes are escaped
DATA = "data: "
ENDING = "the server is being ended"
log = logging.getLogger(__name__)


async def whole(
    parts: AsyncGenerator[str, None], usage: bool | None, left: asyncio.Event
) -> AsyncGenerator[str, None]:
    """The events of `transformers serve`, and an end; the usage stands alone, where it was asked for."""
    async with aclosing(parts):
        async for part in parts:
            if left.is_set():  # and still reads: the server ends
                yield _event(error(ENDING, 503))
                break
            before, failed, reason = part.partition(FAILED)
            yield _without_usage(before) if USAGE in before else before
            if failed:
                log.error("generating failed: %s", reason.strip().removesuffix('"}'))
                yield _event(error("generating failed", 500))
            elif usage and USAGE in part:
                yield _event(_last(part) | {"choices": []})
    yield f"{DATA}[DONE]\n\n"


def _event(held: dict) -> str:
    return f"{DATA}{json.dumps(held)}\n\n"


def _last(events: str) -> dict:
    """What the last of some events holds."""
    return json.loads(events.rstrip().rpartition("\n\n")[2].removeprefix(DATA))


def _without_usage(events: str) -> str:
    """The events, the last of which has usage in it."""
    before, gap, _ = events.rstrip().rpartition("\n\n")
    last = _last(events)
    del last["usage"]
    return before + gap + _event(last)
