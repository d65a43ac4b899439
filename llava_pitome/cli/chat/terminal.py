"""A conversation in a terminal or from a pipe: a question or a command a line, streamed answers."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from llava_pitome.api import apply, remove
from llava_pitome.cli.chat.conversation import Conversation
from llava_pitome.cli.options import Option, merge_options, parse
from llava_pitome.config import MergeConfig
from llava_pitome.config_validation import AMOUNTS
from llava_pitome.image_io import open_image
from llava_pitome.models import hf_llava as llava
from llava_pitome.models.image_counts import counts_of
from llava_pitome.video_io import FRAMES, read_video


class Quit(Exception):
    """The user ended the conversation."""


class Terminal:
    """Answers questions and runs commands, one a line.

    Attributes:
        conversation: with the model.
        config: how the model merges; None where it does not.
        frames: that are read of a video, at most.
        record: every question and answer with its stats, as /save writes them.
    """

    def __init__(
        self,
        conversation: Conversation,
        config: MergeConfig | None,
        out: TextIO | None = None,
        frames: int = FRAMES,
    ):
        """Takes a conversation with a model that merges as `config` says.

        Args:
            conversation: a new one.
            config: how the model merges; None where it does not.
            out: where answers are written; None: standard output.
            frames: that are read of a video, at most.
        """
        self.conversation, self.config, self.out = conversation, config, out or sys.stdout
        self.frames = frames
        self._initial = config
        self.record: list[dict[str, Any]] = []

    def run(self, lines: Iterable[str], interactive: bool) -> None:
        """Handles lines until they end or one is /quit.

        An interactive session writes what is wrong with a line and goes on; otherwise an error ends it.

        Raises:
            ValueError: a line that is not allowed, where the session is not interactive.
        """
        for line in lines:
            try:
                self.handle(line.strip())
            except Quit:
                return
            except (ValueError, KeyboardInterrupt) as error:
                if not interactive:
                    raise
                self.write(f"{error}\n" if isinstance(error, ValueError) else "\n(stopped)\n")

    def handle(self, line: str) -> None:
        """Answers a question, or runs a command.

        Raises:
            ValueError: the line is not allowed; the message says why.
            Quit: the line ends the conversation.
        """
        name, _, argument = line.partition(" ")
        if name in COMMANDS:
            command, argument = COMMANDS[name], argument.strip()
            if command.argument and not argument:
                raise ValueError(f"{name} needs {command.argument}: {command.help}")
            command.run(self, argument)
        elif name.startswith("/"):
            raise ValueError(f"{name} is no command; allowed are {', '.join(COMMANDS)}")
        elif line:
            self.ask(line)

    def ask(self, question: str) -> None:
        """Writes the answer as it is generated, then a line of stats."""
        pieces: list[str] = []
        answer = self.conversation.ask(question)
        try:
            for piece in answer:
                pieces.append(piece)
                self.write(piece)
        except KeyboardInterrupt:
            answer.close()
            self._record(question, pieces)
            raise
        finally:
            answer.close()
        self.write(f"\n[{self.conversation.stats.line()}]\n")
        self._record(question, pieces)

    def _record(self, question: str, pieces: list[str]) -> None:
        """Keeps an answer, complete or not, for /save."""
        stats = self.conversation.stats
        self.record.append(
            {
                "question": question, "answer": "".join(pieces).strip(),
                "numbers": stats._asdict() if stats else None,
                "token_merging": self.config.to_dict() if self.config else None,
            }
        )  # fmt: skip

    def write(self, text: str) -> None:
        """Writes text at once."""
        self.out.write(text)
        self.out.flush()

    def add_image(self, file: str) -> None:
        """Adds an image file to the next question."""
        image = open_image(file)
        self.conversation.add_image(image)
        self.write(f"{file}: {image.width} x {image.height} pixels, for the next question\n")

    def add_video(self, file: str) -> None:
        """Adds a video file to the next question."""
        frames = read_video(file, self.frames)
        self.conversation.add_video(frames)
        size = f"{frames[0].width} x {frames[0].height} pixels"
        self.write(f"{file}: {len(frames)} frames of {size}, for the next question\n")

    def merge(self, words: list[str]) -> None:
        """Changes how the model merges from the next answer on, which encodes all images again.

        Args:
            words: fields of MergeConfig as key=value.

        Raises:
            ValueError: an unknown field or a bad value, or a config that does not fit the model or an image
                of the conversation; nothing is changed then.
        """
        conversation, options = self.conversation, fields_options()
        given = {name: value for name, value in parse(words, options).items() if value is not None}
        config = with_fields(self.config or self._initial, given)
        tokens, unmerged = (conversation.count_tokens(c) for c in (config, None))
        apply(conversation.model, config, conversation.processor)
        self.config = config
        of_model = counts_of(llava.find(conversation.model))
        if of_model.tiling is None:
            tokens, unmerged = (of_model.images(c, [None])[0] for c in (config, None))
            counts = f"{tokens} image tokens of {unmerged} an image"
        else:  # an image's depend on its size
            counts = f"{tokens} image tokens of {unmerged}" if unmerged else " ".join(words)
        self.write(f"{counts} from the next answer on\n")

    def remove_merging(self) -> None:
        """Merges nothing from the next answer on."""
        remove(self.conversation.model)
        self.config = None
        self.write("nothing merges from the next answer on\n")

    def reset(self) -> None:
        """Starts a new conversation."""
        self.conversation.reset()
        self.write("a new conversation\n")

    def save(self, file: str) -> None:
        """Writes the record as JSON."""
        try:
            Path(file).write_text(json.dumps(self.record, indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            raise ValueError(f"{file} cannot be written: {error.strerror}") from error
        self.write(f"{len(self.record)} answers are in {file}\n")

    def list_commands(self) -> None:
        """Writes the commands."""
        for name, command in COMMANDS.items():
            self.write(f"  {name + ' ' + command.argument:<16}{command.help}\n")

    def quit(self) -> None:
        """Raises Quit."""
        raise Quit


def fields_options() -> dict[str, Option]:
    """An option for every field of MergeConfig."""
    names = {field.name for field in dataclasses.fields(MergeConfig)}
    return {name: option for name, option in merge_options().items() if name in names}


def with_fields(config: MergeConfig | None, given: dict[str, Any]) -> MergeConfig:
    """The config with other fields; where one of them says how far to merge, none of the config's does.

    Raises:
        ValueError: the fields contradict each other, or nothing says how far to merge.
    """
    fields = config.to_dict() if config else {}
    if given.keys() & set(AMOUNTS):
        fields = {k: v for k, v in fields.items() if k not in AMOUNTS}
    return MergeConfig.from_dict(fields | given)


class Command(NamedTuple):
    """A command: its argument ("" for none), its help, and what it runs."""

    argument: str
    help: str
    run: Callable[[Terminal, str], None]


COMMANDS = {
    "/image": Command("FILE", "add an image to the next question", Terminal.add_image),
    "/video": Command("FILE", "add a video to the next question", Terminal.add_video),
    "/ratio": Command(
        "R", "share of the tokens that every tower layer keeps", lambda t, x: t.merge([f"ratio={x}"])
    ),
    "/tokens": Command(
        "N", "tokens of an image at the input of the LLM", lambda t, x: t.merge([f"tokens={x}"])
    ),
    "/merge": Command(
        "K=V ...", "fields of MergeConfig: tokens_per_frame=16 temporal=true", lambda t, x: t.merge(x.split())
    ),
    "/plain": Command("", "no merging", lambda t, _: t.remove_merging()),
    "/reset": Command("", "start a new conversation", lambda t, _: t.reset()),
    "/save": Command("FILE", "write questions, answers and stats as JSON", Terminal.save),
    "/help": Command("", "list the commands", lambda t, _: t.list_commands()),
    "/quit": Command("", "end", lambda t, _: t.quit()),
}
