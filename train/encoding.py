"""Conversations as tokens: written by the model's own chat template, with labels on what the assistant says.

What is learnt is then what is asked for later: the same template writes prompts for generation. Every answer
ends with the end-of-sequence token, also where a template leaves it out.
Pictures are one <image> token each here; `expand.expand` makes them as many as arrive at the language model.
"""

from itertools import accumulate
from typing import Any, NamedTuple

from train.conversations import Talk

IGNORED = -100  # a label without loss


class Written(NamedTuple):
    """A conversation as text.

    Attributes:
        text: all of it.
        answers: (first, behind the last) character of what the assistant says, the end of sequence included.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


def write(processor: Any, talk: Talk) -> Written:
    """What a chat template makes of a conversation, turn by turn.

    Raises:
        ValueError: the template writes earlier turns anew when later ones come, so that no turn has a place.
    """
    messages, end = talk.messages(), processor.tokenizer.eos_token
    text, before, answers = "", "", []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = processor.apply_chat_template(messages[:i], add_generation_prompt=True)
        whole = processor.apply_chat_template(messages[: i + 1])
        if not (prompt.startswith(before) and whole.startswith(prompt)):
            raise ValueError(
                "the chat template writes earlier turns anew when later ones come, which no labels can follow"
            )
        text += prompt[len(before) :]
        said = whole[len(prompt) :].rstrip()
        said += "" if said.endswith(end) else end
        answers.append((len(text), len(text) + len(said)))
        text, before = text + said, whole
    return Written(text, tuple(answers))


def encode(processor: Any, talk: Talk, longest: int, patches: int) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation, its pictures one token each.

    What is beyond `longest` tokens is cut off, as in LLaVA; pictures count as they do unmerged, so that a
    conversation has the same words at every ratio.

    Raises:
        ValueError: the template cannot be followed.
    """
    written = write(processor, talk)
    tokenizer = processor.tokenizer
    begun = tokenizer.bos_token is not None and written.text.startswith(tokenizer.bos_token)
    coded = tokenizer(written.text, add_special_tokens=not begun, return_offsets_mapping=True)
    ids: list[int] = coded["input_ids"]
    labels = [IGNORED] * len(ids)
    for i, (first, last) in enumerate(coded["offset_mapping"]):
        if any(start < last and first < end for start, end in written.answers):
            labels[i] = ids[i]
    image = processor.image_token_id
    ends = accumulate(patches if token == image else 1 for token in ids)
    kept = sum(end <= longest for end in ends)
    return ids[:kept], labels[:kept]
