"""The schema of chat requests. All of a request but its images is validated before any work starts."""

import json
import re
import reprlib
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from starlette.exceptions import HTTPException

from llava_pitome.integrations.serve.limits import Limits

MIN_TEMPERATURE = 0.01  # logits overflow below
CHARACTERS = 16  # that a token rarely exceeds
PUNCTUATION = 32  # brackets and commas of one JSON part, with a wide margin
SHORT = reprlib.Repr()  # of values in messages
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 100
SHORT.maxlevel = SHORT.maxlist = SHORT.maxdict = 3


class Schema(BaseModel):
    """A JSON object. Null means that a field is not given; unknown fields are refused."""

    model_config = ConfigDict(strict=True)
    only: ClassVar[dict[str, Any]] = {}  # fields of OpenAI's API with the one value that is supported
    ignored: ClassVar[set[str]] = set()  # fields of OpenAI's API without effect on an answer

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        fields = {k: v for k, v in fields.items() if v is not None and k not in cls.ignored}
        for name, value in cls.only.items():
            if (sent := fields.pop(name, value)) != value:
                raise ValueError(f"{name}={SHORT.repr(sent)} is not supported; allowed is {value}")
        if unknown := fields.keys() - cls.model_fields.keys():  # one error; extra="forbid" makes one for each
            raise ValueError(
                f"{SHORT.repr(min(unknown))} is not supported; allowed: {', '.join(cls.model_fields)}"
            )
        return fields


def _encodable(text: str) -> str:
    """The text; raises ValueError for lone surrogates, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{SHORT.repr(text)} holds a character that UTF-8 cannot encode") from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class ImageURL(Schema):
    """An http, https or data URL."""

    url: Text
    detail: Literal["auto", "low", "high"] = (
        "auto"  # without effect: the model's config says how images are cut
    )


class TextPart(Schema):
    """Text of a message."""

    type: Literal["text"]
    text: Text


class ImagePart(Schema):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageURL


class Message(Schema):
    """One turn of the conversation."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[
        list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
        FailFast(),
        Field(min_length=1),
        BeforeValidator(lambda text: [{"type": "text", "text": text}] if isinstance(text, str) else text),
    ]

    @model_validator(mode="after")
    def _check_images(self) -> "Message":
        if self.role != "user" and any(part.type == "image_url" for part in self.content):
            raise ValueError(f"role={self.role!r} is not allowed with images; allowed is 'user'")
        return self


class StreamOptions(Schema):
    """What a stream holds besides the answer."""

    only = {"include_obfuscation": False}
    include_usage: bool = False


class ChatRequest(Schema):
    """The body of a POST to /v1/chat/completions; validate it with Limits as the context."""

    only = {
        "n": 1, "logprobs": False, "top_logprobs": 0, "presence_penalty": 0, "frequency_penalty": 0,
        "tools": [], "functions": [], "tool_choice": "none", "function_call": "none", "logit_bias": {},
        "parallel_tool_calls": True, "response_format": {"type": "text"}, "modalities": ["text"],
        "stop": [],  # transformers 5.23 looks for stop strings in the processor, which has none
    }  # fmt: skip
    ignored = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}

    model: Text | None = None
    messages: Annotated[list[Message], FailFast(), Field(min_length=1)]
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, lt=2**63)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @field_validator("messages", mode="before")
    @classmethod
    def _count_parts(cls, messages: Any, info: ValidationInfo) -> Any:
        if not isinstance(messages, list):
            return messages
        contents = [m.get("content") if isinstance(m, dict) else None for m in messages]
        parts = sum(len(content) if isinstance(content, list) else 1 for content in contents)
        if parts > info.context.prompt_tokens:  # validating them would block the event loop
            raise ValueError(f"it has {parts} parts; at most {info.context.prompt_tokens} are allowed")
        return messages

    @field_validator("temperature")
    @classmethod
    def _check_temperature(cls, value: float) -> float:
        if 0 < value < MIN_TEMPERATURE:
            raise ValueError(f"it should be 0, or at least {MIN_TEMPERATURE}")
        return value

    @field_validator("max_tokens", "max_completion_tokens")
    @classmethod
    def _check_new_tokens(cls, value: int, info: ValidationInfo) -> int:
        if value > info.context.new_tokens:
            raise ValueError(f"it should be in [1, {info.context.new_tokens}]")
        return value

    @model_validator(mode="after")
    def _check_messages(self, info: ValidationInfo) -> "ChatRequest":
        limits: Limits = info.context
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is allowed with stream=true only")
        if self.messages[-1].role != "user":
            raise ValueError(f"the last message has role={self.messages[-1].role!r}; allowed is 'user'")
        parts = [part for message in self.messages for part in message.content]
        characters = sum(len(part.text) for part in parts if part.type == "text")
        images = sum(part.type == "image_url" for part in parts)
        for count, most, name in (
            (characters, CHARACTERS * limits.prompt_tokens, "characters of text"),
            (images, limits.images, "images"),
        ):
            if count > most:
                raise ValueError(f"the messages have {count} {name}; at most {most} are allowed")
        return self


def parse_request(raw: bytes | bytearray, content_type: str, limits: Limits) -> ChatRequest:
    """Returns the validated request of a body.

    Raises:
        HTTPException: 415 for another Content-Type than JSON, 413 for far more JSON than a prompt can need,
            400 for anything that is invalid or not supported.
    """
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(
            415, f"Content-Type={SHORT.repr(content_type)} is not allowed; allowed is application/json"
        )
    marks, most = sum(map(raw.count, (b"[", b"{", b","))), (CHARACTERS + PUNCTUATION) * limits.prompt_tokens
    if marks > most:  # parsing it would block the event loop
        raise HTTPException(413, f"the request has {marks} brackets and commas; at most {most} are allowed")
    try:
        return ChatRequest.model_validate(json.loads(raw), context=limits)
    except ValidationError as error:
        raise HTTPException(400, validation_message(error)) from error
    except (ValueError, RecursionError) as error:  # also invalid UTF-8, and numbers of 5000 digits
        raise HTTPException(400, f"the request is not valid JSON: {error}") from error


def validation_message(error: ValidationError) -> str:
    """Returns the first error in one line: the field, its value and what is allowed."""
    first = error.errors(include_url=False)[0]
    path, after_index = "", False
    for key in first["loc"]:
        if isinstance(key, int):
            path += f"[{key}]"
        elif not (after_index and key in ("text", "image_url")):  # not the tag of a part's type
            path += f".{key}" if path else key
        after_index = isinstance(key, int)
    reason = re.sub("^(Input|String|List) should", "it should", first["msg"]).removeprefix("Value error, ")
    if first["type"].startswith("union_tag"):  # the message of pydantic repeats a tag of any length
        reason = "it should be of type 'text' or 'image_url'"
        kind = first["input"].get("type") if isinstance(first["input"], dict) else None
        if isinstance(kind, str) and "video" in kind:
            reason = f"this server takes no videos; {reason}, such as frames of the video"
    if first["type"] == "missing":
        return f"{path} is required"
    if isinstance(first["input"], dict) and first["type"] == "value_error":
        return f"{path}: {reason}" if path else reason
    return f"{path or 'request'}={SHORT.repr(first['input'])} is not allowed: {reason}"
