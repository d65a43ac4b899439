"""A conversation in a terminal, or from a pipe: lines in, streamed answers out."""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from llava_pitome.api import apply, remove
from llava_pitome.cli.chat.conversation import Conversation
from llava_pitome.config import MergeConfig
from llava_pitome.image_io import open_image
from llava_pitome.models import hf_llava as llava


class Over(Exception):
    """The conversation was ended by its user."""


class Terminal:
    """What a line does: ask, or one of the commands.

    Attributes:
        conversation: what is being said.
        config: how the model merges; None where it does not.
        record: everything asked and answered, with the numbers, as /save writes it.
    """

    def __init__(
        self,
        conversation: Conversation,
        config: MergeConfig | None,
        change: Callable[..., MergeConfig],
        out: TextIO | None = None,
    ):
        """Takes a conversation over.

        Args:
            conversation: with a model that merges as `config` says.
            config: how.
            change: makes the config for `ratio=` or `tokens=`, with everything else as it was asked for.
            out: where answers go; None: standard output.
        """
        self.conversation, self.config, self.out = conversation, config, out or sys.stdout
        self._change = change
        self.record: list[dict[str, Any]] = []

    def hold(self, lines: Iterable[str], interactive: bool) -> None:
        """Takes lines until there are no more or one says /quit.

        A person is told what was wrong with a line and goes on; a pipe, which reads no such thing, ends.

        Raises:
            ValueError: what was wrong, where nobody is there to be told.
        """
        for line in lines:
            try:
                self.take(line.strip())
            except Over:
                return
            except ValueError as error:
                if not interactive:
                    raise
                self.say(f"{error}\n")
            except KeyboardInterrupt:
                if not interactive:
                    raise
                self.say("\n(stopped)\n")

    def take(self, line: str) -> None:
        """Does what one line asks for.

        Raises:
            ValueError: it cannot be done; the message says why.
            Over: the line ends the conversation.
        """
        name, _, argument = line.partition(" ")
        if name in COMMANDS:
            COMMANDS[name].do(self, argument.strip())
        elif name.startswith("/"):
            raise ValueError(f"{name} is no command; there are {', '.join(COMMANDS)}")
        elif line:
            self.ask(line)

    def ask(self, question: str) -> None:
        """Shows the answer as it comes, then a line of numbers."""
        pieces: list[str] = []
        answer = self.conversation.ask(question)
        try:
            for piece in answer:
                pieces.append(piece)
                self.say(piece)
        except KeyboardInterrupt:
            answer.close()
            self._note(question, pieces)
            raise
        finally:
            answer.close()
        self.say(f"\n[{self.conversation.numbers.line()}]\n")
        self._note(question, pieces)

    def _note(self, question: str, pieces: list[str]) -> None:
        """Keeps an answer, or what there is of it, for /save."""
        numbers = self.conversation.numbers
        self.record.append(
            {
                "question": question, "answer": "".join(pieces).strip(),
                "numbers": numbers._asdict() if numbers else None,
                "token_merging": self.config.to_dict() if self.config else None,
            }
        )  # fmt: skip

    def say(self, text: str) -> None:
        """Writes text at once."""
        self.out.write(text)
        self.out.flush()

    def merge(self, **amount: Any) -> None:
        """Merges otherwise from the next answer on, which reads all pictures anew."""
        config, conversation = self._change(**amount), self.conversation
        apply(conversation.model, config, conversation.processor)
        self.config = config
        parts = llava.find(conversation.model)
        tokens = config.tokens_at(parts.patches, parts.feature)
        self.say(f"{tokens} image tokens of {parts.patches} a picture from now on\n")


def _image(terminal: Terminal, argument: str) -> None:
    if not argument:
        raise ValueError("/image needs the name of a file")
    picture = open_image(argument)
    terminal.conversation.show(picture)
    terminal.say(f"{argument}: {picture.width} x {picture.height} pixels, with the next question\n")


def _ratio(terminal: Terminal, argument: str) -> None:
    terminal.merge(ratio=_number(float, argument, "a number in (0, 1]"))


def _tokens(terminal: Terminal, argument: str) -> None:
    terminal.merge(tokens=_number(int, argument, "a whole number from 1"))


def _plain(terminal: Terminal, _argument: str) -> None:
    remove(terminal.conversation.model)
    terminal.config = None
    terminal.say("nothing merges from now on\n")


def _reset(terminal: Terminal, _argument: str) -> None:
    terminal.conversation.reset()
    terminal.say("a new conversation\n")


def _save(terminal: Terminal, argument: str) -> None:
    if not argument:
        raise ValueError("/save needs the name of a file")
    try:
        Path(argument).write_text(json.dumps(terminal.record, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ValueError(f"{argument} cannot be written: {error.strerror}") from error
    terminal.say(f"{len(terminal.record)} answers are in {argument}\n")


def _help(terminal: Terminal, _argument: str) -> None:
    for name, command in COMMANDS.items():
        terminal.say(f"  {name + ' ' + command.argument:<16}{command.help}\n")


def _quit(_terminal: Terminal, _argument: str) -> None:
    raise Over


def _number(kind: type, text: str, allowed: str) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not allowed: it must be {allowed}") from error


class Command(NamedTuple):
    """A word behind a slash: what it takes, what it does for people, and how."""

    argument: str
    help: str
    do: Callable[[Terminal, str], None]


COMMANDS = {
    "/image": Command("FILE", "a picture for the next question", _image),
    "/ratio": Command("R", "the share of tokens that every layer of the tower keeps", _ratio),
    "/tokens": Command("N", "how many image tokens reach the language model", _tokens),
    "/plain": Command("", "no merging", _plain),
    "/reset": Command("", "forget what was said and shown", _reset),
    "/save": Command("FILE", "write questions, answers and numbers as JSON", _save),
    "/help": Command("", "this list", _help),
    "/quit": Command("", "end", _quit),
}
