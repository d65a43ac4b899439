"""A chat request, checked whole before any work starts: its form, its settings, how much it holds."""

import json
import math
import reprlib
from typing import Any

from llava_pitome.integrations.serve.limits import Limits

ROLES = ("system", "user", "assistant")
SAMPLING = {  # by field: the least and the most
    "temperature": (0, 2),
    "top_p": (0, 1),
    "seed": (0, 2**63 - 1),
}
WITHOUT_EFFECT = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
}  # on answers
READ = {"model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", *SAMPLING}
AS_IT_IS = {  # fields with the only value that is served
    "n": 1, "logprobs": False, "top_logprobs": 0, "presence_penalty": 0, "frequency_penalty": 0,
    "tools": [], "functions": [], "tool_choice": "none", "function_call": "none", "logit_bias": {},
    "parallel_tool_calls": True, "response_format": {"type": "text"}, "modalities": ["text"],
    "stop": [],  # transformers 5.23 looks the words up in the processor, which has none
}  # fmt: skip
DETAILS = (None, "auto", "low", "high")  # all the same: the tower has one size
COLDEST = 0.01  # below, scores overflow
CHARACTERS = 16  # a token is rarely longer
MARKS = 32  # brackets and commas around one text or picture, with much to spare
SHORT = reprlib.Repr()  # for values in reasons
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 100


class Refused(ValueError):
    """A request that is answered with a 4xx and this reason.

    Attributes:
        status: the HTTP status.
    """

    def __init__(self, reason: str, status: int = 400):
        """Keeps the reason for the client."""
        super().__init__(reason)
        self.status = status


def read(raw: bytes, kind: str, limits: Limits) -> dict[str, Any]:
    """The JSON object that a request is.

    Args:
        raw: its body.
        kind: its Content-Type.
        limits: how long a prompt may be.

    Raises:
        Refused: it is none, or holds far more than a prompt can.
    """
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise Refused(f"Content-Type={said(kind)} is not allowed: it must be application/json", 415)
    marks = sum(map(raw.count, (b"[", b"{", b",")))
    if marks > (CHARACTERS + MARKS) * limits.prompt:  # reading it would hold everybody up
        raise Refused(f"{marks} brackets and commas are too many for a prompt of {limits.prompt} tokens", 413)
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:  # also what is no UTF-8, or a number of 5000 digits
        raise Refused(f"the request is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise Refused("the request must be a JSON object")
    return body


def check(body: dict[str, Any], limits: Limits) -> None:
    """Raises Refused for a request with anything in it that would fail later or be ignored.

    Pictures are not opened yet.
    """
    for key, value in body.items():
        if key in READ | WITHOUT_EFFECT or value is None:
            continue
        if key not in AS_IT_IS:
            raise Refused(f"{said(key)} is not supported")
        if value != AS_IT_IS[key]:
            raise Refused(f"{key}={said(value)} is not supported; allowed is {AS_IT_IS[key]}")
    _settings(body, limits)
    _messages(body.get("messages"), limits)


def _settings(body: dict[str, Any], limits: Limits) -> None:
    """Checks how the answer is to be made."""
    for key, (least, most) in SAMPLING.items():
        value = body.get(key)
        whole = key == "seed"
        if value is not None and not (_number(value, whole) and least <= value <= most):
            kind = "a whole number" if whole else "a number"
            raise Refused(f"{key}={said(value)} is not allowed: it must be {kind} in [{least}, {most}]")
    for key in ("max_tokens", "max_completion_tokens"):
        value = body.get(key)
        if value is not None and not (_number(value, True) and 1 <= value <= limits.answer):
            raise Refused(
                f"{key}={said(value)} is not allowed: it must be a whole number in [1, {limits.answer}]"
            )
    if body.get("top_p") == 0:
        raise Refused("top_p=0 is not allowed: it must be above 0")
    if 0 < (body.get("temperature") or 0) < COLDEST:
        raise Refused(
            f"temperature={body['temperature']} is not allowed: it must be 0, or at least {COLDEST}"
        )
    _streaming(body)


def _streaming(body: dict[str, Any]) -> None:
    """Checks whether the answer comes in pieces."""
    if not isinstance(body.get("stream"), bool | None):
        raise Refused(f"stream={said(body['stream'])} is not allowed: it must be true or false")
    streaming = body.get("stream_options")
    if streaming is None:
        return
    if not isinstance(streaming, dict) or streaming.keys() - {"include_usage", "include_obfuscation"}:
        raise Refused("stream_options may hold include_usage, and include_obfuscation=false")
    if streaming.get("include_obfuscation"):
        raise Refused("include_obfuscation is not supported; allowed is false")
    if not isinstance(streaming.get("include_usage"), bool | None):
        raise Refused(
            f"include_usage={said(streaming['include_usage'])} is not allowed: it must be true or false"
        )
    if not body.get("stream"):
        raise Refused("stream_options is for requests with stream=true")


def _messages(messages: Any, limits: Limits) -> None:
    """Checks the form of the conversation."""
    if not isinstance(messages, list) or not messages:
        raise Refused("messages must be a list with at least one message")
    characters = pictures = held = 0
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise Refused(f"messages[{i}] must be an object whose role is one of {', '.join(ROLES)}")
        if odd := {key for key, value in message.items() if value is not None} - {"role", "content"}:
            raise Refused(f"messages[{i}] holds {said(sorted(odd)[0])}, which is not supported")
        for part in parts(message, i):
            held += 1
            characters += len(part["text"]) if part["type"] == "text" else 0
            pictures += part["type"] == "image_url"
            if part["type"] == "image_url" and message["role"] != "user":
                raise Refused(f"messages[{i}]: only a user's messages may hold pictures")
    if messages[-1]["role"] != "user":
        raise Refused("the last message must be a user's")
    if held > limits.prompt:
        raise Refused(f"{held} texts and pictures are too many for a prompt of {limits.prompt} tokens")
    if characters > CHARACTERS * limits.prompt:
        raise Refused(f"{characters} characters of text are too many for a prompt of {limits.prompt} tokens")
    if pictures > limits.pictures:
        raise Refused(f"{pictures} pictures are too many: at most {limits.pictures} are allowed in a request")


def parts(message: dict[str, Any], i: int) -> list[dict[str, Any]]:
    """The parts of a message, a text being one part.

    Raises:
        Refused: a part that is no text and no picture.
    """
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise Refused(f"messages[{i}].content must be a text, or a list of at least one part")
    return [_part(part, i) for part in content]


def _part(part: Any, i: int) -> dict[str, Any]:
    """One part of a message.

    Raises:
        Refused: it is no text and no picture, or holds more than that.
    """
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "image_url"):
        raise Refused(f"messages[{i}]: a part must be of type 'text' or 'image_url', not {said(kind)}")
    if odd := part.keys() - {"type", kind}:
        raise Refused(f"messages[{i}]: a part of type {said(kind)} may not hold {said(sorted(odd)[0])}")
    held = part.get(kind)
    if kind == "text":
        if not isinstance(held, str) or not _is_unicode(held):
            raise Refused(f"messages[{i}]: a part of type 'text' must hold a text under 'text'")
        return part
    if not isinstance(held, dict) or not isinstance(held.get("url"), str):
        raise Refused(f"messages[{i}]: image_url must be an object with a text under 'url'")
    if held.keys() - {"url", "detail"} or held.get("detail") not in DETAILS:
        raise Refused(f"messages[{i}]: image_url may hold 'url', and as 'detail' auto, low or high")
    return part


def _is_unicode(text: str) -> bool:
    """Whether a text has no half characters, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _number(value: Any, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return isinstance(value, int) or math.isfinite(value)


def said(value: Any) -> str:
    """What a request holds, short enough to be said back to it."""
    return SHORT.repr(value)
