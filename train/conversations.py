r"""Conversations about pictures in LLaVA's format: what a row says, and whether it can be trained on.

    {"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is this?"},
                                                    {"from": "gpt", "value": "A cat."}]}

`image` is a name, a list of names, or absent. As in LLaVA, what comes before the first words of the human is
left out, and pictures go in front of the words of their turn.
"""

from pathlib import Path
from typing import Any, NamedTuple

MARK = "<image>"
LONG = 200  # characters of a name in messages
BYTES = 4  # of text, about, make a token
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class BrokenRow(ValueError):
    """A row that cannot be trained on; the message says why."""


class Talk(NamedTuple):
    """A row.

    Attributes:
        images: files, in the order of their markers.
        turns: (role, words, pictures) with role "system", "user" or "assistant"; users and assistants take
            turns, and an assistant ends it.
    """

    images: tuple[Path, ...]
    turns: tuple[tuple[str, str, int], ...]

    def messages(self) -> list[dict[str, Any]]:
        """As chat templates take them."""
        return [
            {
                "role": role,
                "content": [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": words}],
            }
            for role, words, pictures in self.turns
        ]

    def length(self, picture: int) -> int:
        """Roughly how many tokens it has, with so many for a picture."""
        letters = sum(len(words.encode()) for _, words, _ in self.turns)
        return letters // BYTES + picture * len(self.images)


def read(row: Any, folder: Path) -> Talk:
    """What a row says.

    Args:
        row: as parsed.
        folder: that image names start from.

    Raises:
        BrokenRow: it is not what the format asks for, or a picture is missing.
    """
    said = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(said, list) or not said:
        raise BrokenRow('it has no list "conversations"')
    names = row.get("image") or []
    turns = _turns(said, bool(names))
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BrokenRow(f'"image" is {names!r}; it must be a name or a list of names')
    marked = sum(pictures for _, _, pictures in turns)
    if marked != len(names):
        raise BrokenRow(f"{marked} {MARK} in its words, but {len(names)} images")
    files = tuple(folder / name for name in names)
    for file in files:
        if not _is_file(file):
            raise BrokenRow(f"image {str(file)[:LONG]} is missing")
    return Talk(files, turns)


def _is_file(file: Path) -> bool:
    """Whether there is such a file; a name that no file can have, as a picture written as text, is none."""
    try:
        return file.is_file()
    except (OSError, UnicodeEncodeError):
        return False


def _turns(said: list[Any], pictured: bool) -> tuple[tuple[str, str, int], ...]:
    """Turns from the first of the human to the last of the assistant, a system prompt in front.

    Without pictures a marker is a word, which is written so that no tokenizer takes it for one.
    """
    turns: list[tuple[str, str, int]] = []
    for turn in said:
        role, words = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or role not in ROLES:
            raise BrokenRow(f"a turn is from {role!r}; allowed are {', '.join(ROLES)}")
        if not isinstance(words, str):
            raise BrokenRow(f"a turn says {words!r}, which is no text")
        if any("\ud800" <= letter <= "\udfff" for letter in words):
            raise BrokenRow("a turn says half of a surrogate pair, which is no text")
        role, words = ROLES[role], words if pictured else words.replace(MARK, "< image >")
        if role == "system" and turns:
            raise BrokenRow("a system prompt that is not at the beginning")
        if role == "assistant" and (not turns or turns[-1][0] == "system"):
            continue  # before the human said anything
        if role != "user" and MARK in words:
            raise BrokenRow(f"{MARK} in the words of the {role}")
        if turns and turns[-1][0] == role:
            raise BrokenRow(f"two turns of the {role} after each other")
        turns.append((role, words.replace(MARK, "").strip(), words.count(MARK)))
    while turns and turns[-1][0] != "assistant":
        turns.pop()  # nothing is learnt from what nobody answered
    if not turns:
        raise BrokenRow("the assistant answers nothing")
    return tuple(turns)
