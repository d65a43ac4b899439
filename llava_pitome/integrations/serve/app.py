"""The handlers of `transformers serve` around one merging model: the only file that knows them."""

import asyncio
import copy
import uuid
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from torch import nn
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerationState, Modality

from llava_pitome.api import image_tokens
from llava_pitome.integrations.serve.answering import PROMPT, Left, OneAnswer, unless
from llava_pitome.integrations.serve.events import ENDING, whole
from llava_pitome.integrations.serve.guard import ASKED, CHAT, HEALTH, MODELS, Guard, error
from llava_pitome.integrations.serve.limits import Limits
from llava_pitome.integrations.serve.prompts import Prompts
from llava_pitome.integrations.serve.request import Refused, check, read

SETTINGS = ("temperature", "top_p", "max_tokens", "max_completion_tokens")


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


class MergingChat(ChatCompletionHandler):
    """Chat completions of one merging model, whose requests are checked whole before any work."""

    def __init__(self, manager: OneModel, state: GenerationState, limits: Limits):
        """Answers within limits."""
        super().__init__(manager, state)
        self._limits = limits
        self._prompts = Prompts(manager.processor, image_tokens(manager.model), limits)

    async def answer(self, body: dict[str, Any], request_id: str, left: asyncio.Event) -> Any:
        """Prepares a request beside the other ones, and answers when its turn has come.

        Args:
            body: a request that was checked.
            request_id: names the answer.
            left: tells that nobody waits for it any more.

        Raises:
            Refused: it cannot be done.
            Left: nobody waits for it any more.
        """
        name, model, processor = self._resolve_model(body)
        inputs = await unless(left, self._prompts.inputs(body.pop("messages")), cancel=True)
        asked = {k: v for k, v in body.items() if k in SETTINGS and v is not None}
        settings = self._build_generation_config(asked, model.generation_config)
        prompt = {key: inputs.pop(key) for key in PROMPT}
        self._fits(prompt["input_ids"].shape[1], settings, model)
        answering = OneAnswer(model, dict(inputs), body.get("seed"), left)
        job = (request_id, answering, processor, name, prompt, settings)
        manager = self.generation_state.get_manager(name)
        if not body.get("stream"):
            return await unless(left, self._non_streaming(*job, gen_manager=manager), cancel=False)
        response = self._streaming(*job, gen_manager=manager)
        usage = (body.get("stream_options") or {}).get("include_usage")
        response.body_iterator = whole(response.body_iterator, usage, left)
        return response

    def _build_generation_config(
        self, body: dict, model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        """Draws tokens where a temperature or top_p asks for it; else takes the likeliest."""
        config = copy.deepcopy(model_generation_config)
        length = body.get("max_completion_tokens") or body.get("max_tokens")
        config.do_sample = bool(body.get("temperature", 1.0 if body.get("top_p") is not None else 0))
        if config.do_sample and config.top_k is None:
            config.top_k = 0  # all tokens; transformers would take 50
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = None
            body = {k: v for k, v in body.items() if k not in ("temperature", "top_p")}
        built = super()._build_generation_config(body, config, use_cb=use_cb)
        built.max_new_tokens = length  # None until the prompt's length is known
        return built

    def _fits(self, length: int, settings: GenerationConfig, model: nn.Module) -> None:
        """Leaves room for the answer; raises Refused for a prompt that is too long.

        An answer whose length the request does not name is as long as the limits and the model allow.
        """
        self._prompts.fits(length)
        context = model.config.text_config.max_position_embeddings
        if settings.max_new_tokens is None:
            settings.max_new_tokens = max(1, min(self._limits.answer, context - length))
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

    Raises:
        ValueError: the processor has no chat template.
    """
    if not processor.chat_template:
        raise ValueError(f"{name} has no chat template, so that no conversation can be put to it")
    manager = OneModel(name, model, processor)
    chat = MergingChat(manager, GenerationState(), limits)
    app = FastAPI(openapi_url=None)

    @app.post(CHAT)
    async def chat_completions(request: Request) -> Any:
        asked = request.scope[ASKED]
        body = read(asked.take(), request.headers.get("content-type", ""), limits)
        check(body, limits)
        return await chat.answer(body, f"chatcmpl-{uuid.uuid4().hex}", asked.left)

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
        return _told(str(reason), reason.status)

    @app.exception_handler(Left)
    async def gone(_request: Request, _reason: Left) -> JSONResponse:  # who reads it has not left
        return _told(ENDING, 503)

    @app.exception_handler(HTTPException)
    async def http(_request: Request, reason: HTTPException) -> JSONResponse:
        return _told(str(reason.detail), reason.status_code)

    @app.exception_handler(Exception)  # uvicorn logs it, too
    async def failed(_request: Request, reason: Exception) -> JSONResponse:
        return _told(f"generating failed: {type(reason).__name__}", 500)


def _told(reason: str, status: int) -> JSONResponse:
    """A refusal; half characters, which cannot be sent, are written out."""
    return JSONResponse(error(reason.encode(errors="backslashreplace").decode(), status), status_code=status)
