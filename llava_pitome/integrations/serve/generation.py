"""From a validated request to its answer, with the chat handler of `transformers serve`."""

import asyncio
import copy
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import Any

import torch
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import GenerationState

from llava_pitome.api import applied
from llava_pitome.cli.chat.streaming import StopOnEvent
from llava_pitome.integrations.serve.images import Fetch, fetch_images, image_urls, is_remote, open_images
from llava_pitome.integrations.serve.limits import Limits
from llava_pitome.integrations.serve.remote import fetch
from llava_pitome.integrations.serve.requests import SHORT, ChatRequest, Message
from llava_pitome.models import hf_llava
from llava_pitome.models.image_counts import Size, counts_of

FETCH_THREADS = 8  # requests whose images are fetched at a time
STREAM_ERROR = 'data: {"error": "'  # of transformers; the text after it is not escaped
ERROR_TYPES = {
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_exceeded",
    500: "server_error",
    503: "server_error",
}
SHUTTING_DOWN = "the server is shutting down"
Count = int | Callable[[Sequence[Size]], list[int]]
log = logging.getLogger(__name__)


def error_body(message: str, status: int) -> dict[str, Any]:
    """Returns an error in the form of OpenAI's API."""
    kind = ERROR_TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "code": status}}


class RequestModel:
    """The model as one request generates with it: with its images and its seed, until it is stopped.

    Attributes:
        stopped: set when the client has disconnected or was answered, or when the server shuts down.
        image_inputs: of `generate`. They are cleared once the request is stopped: it cannot be taken back out
            of the queue of transformers.
    """

    def __init__(self, model: nn.Module, seed: int | None):
        """Wraps a LLaVA; without a seed, sampling is not repeatable."""
        self._model, self._seed = model, seed
        self.stopped = asyncio.Event()
        self.image_inputs: dict[str, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        """Everything else is the model's."""
        return getattr(self._model, name)

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, streamer: Any = None, **options: Any
    ) -> Any:
        """Returns the tokens, as the model does; only the prompt's where the request was stopped."""
        inputs = self.image_inputs | {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.stopped.is_set():
            if streamer is not None:
                streamer.end()
            return input_ids
        device = self._model.device
        options |= {key: value.to(device) for key, value in inputs.items()} | {"streamer": streamer}
        options["stopping_criteria"] = StoppingCriteriaList([StopOnEvent(self.stopped)])
        if self._seed is None:
            return self._model.generate(**options)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self._seed)
            return self._model.generate(**options)


class Handler(ChatCompletionHandler):
    """The chat handler of transformers, whose streams hold the usage in a chunk of its own or not at all."""

    def __init__(self, state: GenerationState, include_usage: bool):
        """Answers one request; the model is given with it and not managed here."""
        super().__init__(None, state)
        self._include_usage = include_usage

    def _build_chunk_sse(self, *args: Any, usage: Any = None, **fields: Any) -> str:
        event = super()._build_chunk_sse(*args, **fields)
        if usage is None or not self._include_usage:
            return event
        chunk = json.loads(event.removeprefix("data: "))
        return event + _sse(chunk | {"choices": [], "usage": usage.model_dump(exclude_none=True)})


class Prompts:
    """Prepares the model's inputs in threads beside the event loop.

    One request is prepared at a time, so that memory holds the images of one. Fetching has threads of its
    own, so that a slow URL delays no request that brings its images along.
    """

    def __init__(self, processor: Any, image_tokens: Count, limits: Limits, fetch: Fetch = fetch):
        """Prepares within limits.

        Args:
            processor: of the model, which `apply` was given where it merges.
            image_tokens: the tokens of each image of a prompt, after merging, from their heights and widths;
                a number where they do not matter.
            limits: of requests.
            fetch: returns what a URL holds.
        """
        self._processor, self._image_tokens = processor, image_tokens
        self._limits, self._fetch = limits, fetch
        self._prepare_pool = ThreadPoolExecutor(1, "prepare")
        self._fetch_pool = ThreadPoolExecutor(FETCH_THREADS, "fetch")

    async def inputs(self, messages: list[Message]) -> Any:
        """Returns `input_ids` and `attention_mask` (1, T), and what the model takes with images.

        Raises:
            HTTPException: too many tokens, or an image that cannot be fetched or opened.
        """
        loop = asyncio.get_running_loop()
        text_tokens = await loop.run_in_executor(self._prepare_pool, self._count, messages)
        urls = image_urls(messages)
        files = await self._fetched(urls) if any(map(is_remote, urls)) else {}
        return await loop.run_in_executor(self._prepare_pool, self._process, messages, files, text_tokens)

    async def _fetched(self, urls: list[str]) -> dict[str, bytes]:
        seconds = self._limits.seconds
        deadline = time.monotonic() + seconds
        work = self._fetch_pool.submit(fetch_images, urls, self._limits, deadline, self._fetch)
        try:  # bounds the wait for a thread and for DNS, too
            return await asyncio.wait_for(asyncio.wrap_future(work), seconds)
        except TimeoutError as error:
            if work.cancelled():  # before it began
                reason = f"too many images are being fetched: no thread was free within {seconds} s"
                raise HTTPException(503, reason) from error
            raise HTTPException(400, f"fetching the images took more than {seconds} s") from error

    def _count(self, messages: list[Message]) -> int:
        """The tokens of a prompt without those of its images.

        Raises:
            HTTPException: the prompt is too long, as far as is known before its images are opened.
        """
        try:
            text = self._processor.apply_chat_template(_turns(messages), add_generation_prompt=True)
        except TemplateError as error:  # some templates refuse an order of roles
            raise HTTPException(400, f"the model's chat template refuses the messages: {error}") from error
        placeholder, images = self._processor.image_token, len(image_urls(messages))
        if text.count(placeholder) != images:  # text parts may make one together
            raise HTTPException(
                400, f"text with {placeholder} is not allowed: send images as image_url parts"
            )
        video = getattr(self._processor, "video_token", None)
        if video and video in text:
            raise HTTPException(400, f"text with {video} is not allowed: this server takes no videos")
        tokens = len(self._processor.tokenizer(text, add_special_tokens=False)["input_ids"]) - images
        fixed = self._image_tokens if isinstance(self._image_tokens, int) else 1
        self.check_length(tokens + images * fixed)
        return tokens

    def check_length(self, tokens: int) -> None:
        """Raises HTTPException for a prompt of too many tokens."""
        most = self._limits.prompt_tokens
        if tokens > most:
            raise HTTPException(
                400, f"the prompt has {tokens} tokens, image tokens included; at most {most} are allowed"
            )

    def _process(self, messages: list[Message], files: dict[str, bytes], text_tokens: int) -> Any:
        turns = _turns(messages)
        parts = [part for turn in turns for part in turn["content"] if part["type"] == "image"]
        images = open_images(image_urls(messages), files, self._limits)
        if not isinstance(self._image_tokens, int):
            try:
                counts = self._image_tokens([(image.height, image.width) for image in images])
            except ValueError as error:  # a budget that does not fit one
                raise HTTPException(400, str(error)) from error
            self.check_length(text_tokens + sum(counts))
        for part, image in zip(parts, images):
            part["image"] = image
        return self._processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )


def _turns(messages: list[Message]) -> list[dict[str, Any]]:
    """Returns the messages as chat templates take them, images without their content."""
    return [
        {"role": m.role, "content": [
            {"type": "text", "text": p.text} if p.type == "text" else {"type": "image"} for p in m.content
        ]} for m in messages
    ]  # fmt: skip


class ChatGenerator:
    """Answers validated requests with one model."""

    def __init__(self, name: str, model: nn.Module, processor: Any, limits: Limits):
        """Takes a model, merging or not, and the processor that `apply` was given.

        Raises:
            ValueError: the processor has no chat template.
        """
        if not processor.chat_template:
            raise ValueError(f"{name} has no chat template, which chat requests need")
        self.name, self.model, self._processor, self._limits = name, model, processor, limits
        counts, config = counts_of(hf_llava.find(model)), applied(model)
        is_fixed = counts.tiling is None
        of_images = counts.images(config, [None])[0] if is_fixed else partial(counts.images, config)
        self._prompts = Prompts(processor, of_images, limits)
        self._state = GenerationState()

    async def answer(self, chat: ChatRequest, model: RequestModel) -> Response:
        """Prepares a request beside other ones and answers it in its turn. Its messages are cleared.

        Args:
            chat: the request.
            model: of the request; it gets the images.

        Raises:
            HTTPException: 400 or 413 for a request that cannot be answered.
        """
        if chat.model not in (None, self.name):
            raise HTTPException(
                400, f"model={SHORT.repr(chat.model)} is not served; allowed is {self.name!r}"
            )
        inputs = await self._prompts.inputs(chat.messages)
        chat.messages.clear()  # the request may wait, and base64 is long
        prompt = {key: inputs.pop(key) for key in ("input_ids", "attention_mask")}
        model.image_inputs = dict(inputs)
        config = self._generation_config(chat, prompt["input_ids"].shape[1])
        handler = Handler(self._state, bool(chat.stream_options and chat.stream_options.include_usage))
        manager = self._state.get_manager(self.name)
        job = (f"chatcmpl-{uuid.uuid4().hex}", model, self._processor, self.name, prompt, config, manager)
        if not chat.stream:  # shielded: the inference thread of transformers cannot set a cancelled future
            return await asyncio.shield(handler._non_streaming(*job))
        response = handler._streaming(*job)
        response.body_iterator = _finish_stream(response.body_iterator, model.stopped)
        return response

    def _generation_config(self, chat: ChatRequest, prompt_tokens: int) -> GenerationConfig:
        """Returns the model's generation config with the settings of a request.

        Tokens are sampled where a temperature or top_p asks for it; decoding is greedy otherwise. Without a
        length the answer may be as long as the limits and the model allow.

        Raises:
            HTTPException: the prompt and the answer are too long.
        """
        self._prompts.check_length(prompt_tokens)
        context = self.model.config.text_config.max_position_embeddings
        new_tokens = chat.max_completion_tokens or chat.max_tokens
        new_tokens = new_tokens or max(1, min(self._limits.new_tokens, context - prompt_tokens))
        if prompt_tokens + new_tokens > context:
            raise HTTPException(
                400, f"the prompt has {prompt_tokens} tokens and the answer may have {new_tokens}; the model "
                f"has a context of {context}"
            )  # fmt: skip
        config = copy.deepcopy(self.model.generation_config)
        config.max_new_tokens = new_tokens
        config.do_sample = chat.temperature > 0 if chat.temperature is not None else chat.top_p is not None
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = None
            return config
        config.temperature = config.temperature if chat.temperature is None else chat.temperature
        config.top_p = config.top_p if chat.top_p is None else chat.top_p
        config.top_k = config.top_k or 0  # all tokens; the default of transformers is 50
        return config


async def _finish_stream(
    events: AsyncGenerator[str, None], stopped: asyncio.Event
) -> AsyncGenerator[str, None]:
    """Yields the events of `transformers serve`, errors in OpenAI's form, and [DONE] at the end."""
    async with aclosing(events):
        async for event in events:
            if stopped.is_set():  # with a client that still reads: the server is shutting down
                yield _sse(error_body(SHUTTING_DOWN, 503))
                break
            event, failed, reason = event.partition(STREAM_ERROR)
            yield event
            if failed:
                log.error("generation failed: %s", reason.strip().removesuffix('"}'))
                yield _sse(error_body("generation failed", 500))
    yield "data: [DONE]\n\n"


def _sse(chunk: dict[str, Any]) -> str:
    """Returns a server-sent event."""
    return f"data: {json.dumps(chunk)}\n\n"
