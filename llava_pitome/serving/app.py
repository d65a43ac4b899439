"""The handlers of `transformers serve` around one merging model: the only file that knows them."""

import asyncio
import copy
import json
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from torch import nn
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerationState, Modality

from llava_pitome.serving.guard import CHAT, HEALTH, MODELS, Guard, error
from llava_pitome.serving.limits import Limits
from llava_pitome.serving.request import READ, Refused, check, opened, parts

FAILED = 'data: {"error": "'  # how transformers begins it, with a text behind that may hold anything


class OneModel(ModelManager):
    """Gives handlers the model that was loaded beforehand, whatever they ask for by its name."""

    def __init__(self, name: str, model: nn.Module, processor: Any):
        """Holds a model that is in use, merging or not."""
        self.model, self.processor = model, processor
        super().__init__(model_timeout=-1)
        self.force_model = name

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[nn.Module, Any]:
        """The model and its processor, which are there already."""
        return self.model, self.processor

    @staticmethod
    def get_model_modality(model: nn.Module, processor: Any = None) -> Modality:
        """Text and pictures, also where peft has wrapped the model."""
        return Modality.VLM

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The model's name as it is: there is one, of one revision."""
        return model_id

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The model, and how it merges."""
        merging = getattr(self.model.config, "token_merging", None)
        return [{"id": self.force_model, "object": "model", "owned_by": "local", "created": 0,
                 "token_merging": merging}]  # fmt: skip


class Seeded:
    """A model that begins to generate with a seed, in the thread that generates."""

    def __init__(self, model: nn.Module, seed: int | None):
        """Wraps a model; None leaves the draws as they come."""
        self._model, self._seed = model, seed

    def __getattr__(self, name: str) -> Any:
        """Everything else is the model's."""
        return getattr(self._model, name)

    def generate(self, **inputs: Any) -> Any:
        """As the model's."""
        if self._seed is not None:
            torch.manual_seed(self._seed)
        return self._model.generate(**inputs)


async def _whole(parts: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """A stream's events with errors as clients read them, and with the end that they wait for."""
    async with aclosing(parts):
        async for part in parts:
            before, failed, _ = part.partition(FAILED)
            yield before
            if failed:
                yield f"data: {json.dumps(error('generating failed', 500))}\n\n"
    yield "data: [DONE]\n\n"


class MergingChat(ChatCompletionHandler):
    """Chat completions of one merging model, whose requests are checked whole before any work."""

    def __init__(self, manager: OneModel, state: GenerationState, limits: Limits):
        """Answers within limits."""
        super().__init__(manager, state)
        self._limits = limits
        self._seeds: dict[str, int | None] = {}

    async def handle_request(self, body: dict, request_id: str) -> Any:
        """Checks a request, opens its pictures beside the other requests, and answers."""
        check(body, self._limits)
        self._no_placeholders(body["messages"])
        messages = await asyncio.to_thread(opened, body["messages"], self._limits)
        asked = {k: v for k, v in body.items() if k in READ and v is not None}  # the rest changes nothing
        self._seeds[request_id] = asked.pop("seed", None)
        try:
            return await super().handle_request(asked | {"messages": messages}, request_id)
        finally:
            del self._seeds[request_id]

    def _no_placeholders(self, messages: list[dict[str, Any]]) -> None:
        """Raises Refused for texts with the placeholder of an image in them."""
        token = self.model_manager.processor.image_token
        for i, message in enumerate(messages):
            texts = [part["text"] for part in parts(message, i) if part["type"] == "text"]
            if token in "".join(texts):  # a template may put them together
                raise Refused(
                    f"messages[{i}] holds {token}, which stands for a picture: send image_url parts"
                )

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict], modality: Modality) -> list[dict]:
        """The messages as they are: `opened` has put them into the processor's form."""
        return messages

    def _validate_request(self, body: dict) -> None:
        """Nothing is left to check."""

    def _build_generation_config(
        self, body: dict, model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        """Draws tokens where a temperature or top_p asks for it; else takes the likeliest."""
        config = copy.deepcopy(model_generation_config)
        length = body.get("max_completion_tokens") or body.get("max_tokens")
        config.do_sample = bool(body.get("temperature", 1.0 if body.get("top_p") is not None else 0))
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = None
            body = {k: v for k, v in body.items() if k not in ("temperature", "top_p")}
        built = super()._build_generation_config(body, config, use_cb=use_cb)
        built.max_new_tokens = length  # None until the prompt's length is known
        return built

    def _streaming(self, request_id: str, model: nn.Module, processor: Any, model_id: str, inputs: Any,
                   gen_config: GenerationConfig, **rest: Any) -> Any:  # fmt: skip
        """Streams, where the prompt is within the limits."""
        seeded = Seeded(model, self._seeds[request_id])
        self._fits(inputs, gen_config, model)
        response = super()._streaming(request_id, seeded, processor, model_id, inputs, gen_config, **rest)
        response.body_iterator = _whole(response.body_iterator)
        return response

    async def _non_streaming(self, request_id: str, model: nn.Module, processor: Any, model_id: str,
                             inputs: Any, gen_config: GenerationConfig, **rest: Any) -> Any:  # fmt: skip
        """Answers at once, where the prompt is within the limits."""
        seeded = Seeded(model, self._seeds[request_id])
        self._fits(inputs, gen_config, model)
        return await super()._non_streaming(
            request_id, seeded, processor, model_id, inputs, gen_config, **rest
        )

    def _fits(self, inputs: Any, settings: GenerationConfig, model: nn.Module) -> None:
        """Leaves room for the answer; raises Refused for a prompt that is too long.

        An answer whose length the request does not name is as long as the limits and the model allow.
        """
        length, context = inputs["input_ids"].shape[1], model.config.text_config.max_position_embeddings
        if length > min(self._limits.prompt, context - 1):
            raise Refused(
                f"the prompt has {length} tokens; at most {min(self._limits.prompt, context - 1)} are allowed"
            )
        if settings.max_new_tokens is None:
            settings.max_new_tokens = min(self._limits.answer, context - length)
        if length + settings.max_new_tokens > context:
            raise Refused(
                f"the prompt has {length} tokens and {settings.max_new_tokens} are asked for; the model "
                f"reads {context} in all"
            )


def build(name: str, model: nn.Module, processor: Any, limits: Limits) -> Guard:
    """The application: chat completions, the list of models, and whether it is up.

    Args:
        name: what clients call the model.
        model: in use, merging or not.
        processor: its processor, which `apply` was given.
        limits: what requests may ask.
    """
    manager = OneModel(name, model, processor)
    chat = MergingChat(manager, GenerationState(), limits)
    app = FastAPI(openapi_url=None)

    @app.post(CHAT)
    async def chat_completions(body: dict) -> Any:
        return await chat.handle_request(body, f"chatcmpl-{uuid.uuid4().hex}")

    @app.get(MODELS)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": manager.get_gen_models()}

    @app.get(HEALTH)
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    _explain(app)
    return Guard(app, limits)


def _explain(app: FastAPI) -> None:
    """Gives every refusal the form that OpenAI's clients read."""

    @app.exception_handler(Refused)
    async def refused(_request: Request, reason: Refused) -> JSONResponse:
        words = str(reason).encode(errors="backslashreplace").decode()  # half characters cannot be sent
        return JSONResponse(error(words, reason.status), status_code=reason.status)

    @app.exception_handler(HTTPException)
    async def http(_request: Request, reason: HTTPException) -> JSONResponse:
        return JSONResponse(error(str(reason.detail), reason.status_code), status_code=reason.status_code)

    @app.exception_handler(Exception)  # uvicorn logs it, too
    async def failed(_request: Request, reason: Exception) -> JSONResponse:
        return JSONResponse(error(f"generating failed: {type(reason).__name__}", 500), status_code=500)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, reason: RequestValidationError) -> JSONResponse:
        found = "; ".join(str(e["msg"]) for e in reason.errors())
        return JSONResponse(error(f"the request must be a JSON object: {found}", 400), status_code=400)
