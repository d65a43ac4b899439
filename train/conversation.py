r"""Conversations in LLaVA's format: parsing a row, and encoding it with labels on the assistant's turns.

    {"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is this?"},
                                                    {"from": "gpt", "value": "A cat."}]}

`image` is a name, a list of names, or absent. As in LLaVA, turns before the first human turn are dropped, and
images come before the text of their turn.
"""

import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

IMAGE, VIDEO = "<image>", "<video>"
IGNORE_INDEX = -100  # a label without loss
MAX_NAME = 200  # characters of a file name in error messages
BYTES_PER_TOKEN = 4  # of text, roughly
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class BrokenRow(ValueError):
    """A row that cannot be trained on; the message says why."""


class Conversation(NamedTuple):
    """A parsed row.

    Attributes:
        images: files, in the order of their placeholders.
        messages: as chat templates take them: an optional system prompt, then user and assistant in turns,
            the assistant last.
    """

    images: tuple[Path, ...]
    messages: list[dict[str, Any]]

    def length(self, image_tokens: int) -> int:
        """Its approximate number of tokens, with `image_tokens` for all of its images."""
        texts = (message["content"][-1]["text"] for message in self.messages)
        return sum(len(text.encode()) for text in texts) // BYTES_PER_TOKEN + image_tokens


def parse_row(row: Any, folder: Path) -> Conversation:
    """The conversation of a row, a decoded JSON value, whose image names are relative to `folder`.

    Raises:
        BrokenRow: the row does not follow the format, or an image is missing.
    """
    if isinstance(row, dict) and row.get("video"):
        raise BrokenRow(
            f'"video" is {str(row["video"])[:MAX_NAME]!r}; train.run trains on images and text alone'
        )
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not turns:
        raise BrokenRow('it has no list "conversations"')
    names = row.get("image") or []
    messages = _messages(turns, bool(names))
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BrokenRow(f'"image" is {names!r}; it must be a name or a list of names')
    placeholders = sum(len(message["content"]) - 1 for message in messages)
    if placeholders != len(names):
        raise BrokenRow(f"{placeholders} {IMAGE} in its text, but {len(names)} images")
    files = tuple(folder / name for name in names)
    for file in files:
        if not _is_file(file):
            raise BrokenRow(f"image {str(file)[:MAX_NAME]} is missing")
    return Conversation(files, messages)


def _is_file(file: Path) -> bool:
    """Whether there is such a file; False for a name that no file can have, such as an image in base64."""
    try:
        return file.is_file()
    except (OSError, UnicodeEncodeError):
        return False


def _messages(turns: list[Any], has_images: bool) -> list[dict[str, Any]]:
    """Messages from the first human turn to the last of the assistant, after an optional system prompt.

    A placeholder of videos, and one of images where there are none, is ordinary text, rewritten so that no
    tokenizer reads it as a special token.
    """
    messages: list[dict[str, Any]] = []
    for turn in turns:
        role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or role not in ROLES:
            raise BrokenRow(f"a turn is from {role!r}; allowed are {', '.join(ROLES)}")
        if not isinstance(text, str):
            raise BrokenRow(f"the value of a turn is {text!r}, which is not text")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise BrokenRow("the value of a turn contains half of a surrogate pair, which is not text")
        role, text = ROLES[role], text.replace(VIDEO, "< video >")
        text = text if has_images else text.replace(IMAGE, "< image >")
        if role == "system" and messages:
            raise BrokenRow("a system prompt that is not at the beginning")
        if role == "assistant" and (not messages or messages[-1]["role"] == "system"):
            continue  # before the first human turn
        if role != "user" and IMAGE in text:
            raise BrokenRow(f"{IMAGE} in a turn of the {role}")
        if messages and messages[-1]["role"] == role:
            raise BrokenRow(f"two consecutive turns of the {role}")
        content = [{"type": "image"} for _ in range(text.count(IMAGE))]
        content.append({"type": "text", "text": text.replace(IMAGE, "").strip()})
        messages.append({"role": role, "content": content})
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()  # no answer to learn from
    if not messages:
        raise BrokenRow("it has no answer of the assistant")
    return messages


def render(processor: Any, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
    """The text that the chat template makes of a conversation, and the span of characters of each answer.

    Every answer follows the prompt of its generation; where that ends with a blank, further blanks that the
    template writes before an answer (LLaMA-3's a newline) are left out. An answer ends with the special token
    that the template writes after it, or else with the end-of-sequence token. Rendering turn by turn finds
    the spans; `return_assistant_tokens_mask` of transformers needs a `{% generation %}` block, which not all
    templates have, and leaves that last token out.

    Raises:
        ValueError: the template renders earlier turns differently once later ones follow.
    """
    messages, specials = conversation.messages, _special_tokens(processor.tokenizer)
    text, rendered, between, answers = "", "", "", []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = processor.apply_chat_template(messages[:i], add_generation_prompt=True)
        with_answer = processor.apply_chat_template(messages[: i + 1])
        is_usual = with_answer.startswith(prompt)
        before = "" if is_usual else processor.apply_chat_template(messages[:i])
        answer = with_answer[len(prompt) :] if is_usual else _after_prompt(prompt, before, with_answer)
        if answer is None or not prompt.startswith(rendered):
            raise ValueError(
                "the chat template renders earlier turns differently once later ones follow, so that labels "
                "cannot be aligned"
            )
        if prompt[-1:].isspace():
            answer = answer.lstrip()
        text += between + prompt[len(rendered) :]
        stripped, own = answer.rstrip(), message["content"][-1]["text"]
        end = stripped.lstrip().removeprefix(own)  # special tokens in the answer's own text do not end it
        is_ended = end.endswith(specials)
        between = answer[len(stripped) :] if is_ended else ""
        stripped += "" if is_ended else processor.tokenizer.eos_token
        answers.append((len(text), len(text) + len(stripped)))
        text, rendered = text + stripped, with_answer
    return text, answers


def _special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Special tokens that may end an answer: also those that are not in use under a name, as LLaMA-3's."""
    added = tokenizer.added_tokens_decoder.values()
    return (tokenizer.eos_token, *(str(token) for token in added if token.special))


def _after_prompt(prompt: str, before: str, with_answer: str) -> str | None:
    """The answer in a rendered conversation whose template writes other blanks before it than in its prompt.

    OneVision's template has "assistant" and a newline in the prompt, a space between them before an answer.

    Args:
        prompt: the earlier turns with the generation prompt.
        before: the earlier turns.
        with_answer: the earlier turns and the answer.

    Returns:
        The answer; None where more than blanks differs.
    """
    if not (prompt.startswith(before) and with_answer.startswith(before)):
        return None
    words = map(re.escape, prompt[len(before) :].split())
    turn = with_answer[len(before) :]
    found = re.match(r"\s*" + r"\s+".join(words), turn)
    return None if found is None else turn[found.end() :]


def encode(
    processor: Any, conversation: Conversation, max_length: int, image_tokens: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation, each image one placeholder; `collator.expand` repeats those.

    Tokens after the first `max_length` are cut off, as in LLaVA. An image counts as its number of tokens
    without merging, so that a conversation has the same text at every ratio.

    Args:
        processor: the model's.
        conversation: that is encoded.
        max_length: tokens that are kept.
        image_tokens: tokens of each of its images.

    Raises:
        ValueError: labels cannot be aligned with the chat template, see `render`.
    """
    text, answers = render(processor, conversation)
    tokenizer = processor.tokenizer
    has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    encoded = tokenizer(text, add_special_tokens=not has_bos, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    labels = [
        token if any(start < last and first < end for start, end in answers) else IGNORE_INDEX
        for token, (first, last) in zip(ids, encoded["offset_mapping"])
    ]
    of_images = iter(image_tokens)
    ends = accumulate(next(of_images) if token == processor.image_token_id else 1 for token in ids)
    kept = sum(end <= max_length for end in ends)
    return ids[:kept], labels[:kept]
