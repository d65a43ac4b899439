"""The turns of a conversation, and what the model is given for the next answer."""

import math
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from llava_pitome.cli.chat.numbers import Numbers, memory, speed
from llava_pitome.cli.chat.streaming import Stream
from llava_pitome.models import hf_llava as llava

if TYPE_CHECKING:
    from PIL import Image


class Conversation:
    """Questions, pictures and answers, in order. Every answer reads all that came before.

    Attributes:
        turns: messages as chat templates take them; pictures stand in them as {"type": "image"}.
        pictures: all that were shown, in the order of their places in the turns.
        numbers: what the last answer cost; None before there was one.
    """

    def __init__(self, model: nn.Module, processor: Any, max_new_tokens: int = 512, temperature: float = 0.0):
        """Starts an empty conversation.

        Args:
            model: a LLaVA, merging or not; how it merges may change between answers.
            processor: its processor, which `apply` was given.
            max_new_tokens: an answer's length at most.
            temperature: 0 takes the likeliest token, more draws.

        Raises:
            ValueError: a length or temperature out of its range.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} is not allowed: it must be at least 1")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature={temperature} is not allowed: it must be a number from 0")
        self.model, self.processor = model, processor
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.reset()

    def reset(self) -> None:
        """Forgets all turns and pictures."""
        self.turns: list[dict[str, Any]] = []
        self.pictures: list[Image.Image] = []
        self.numbers: Numbers | None = None
        self._shown: list[Image.Image] = []

    def show(self, picture: "Image.Image") -> None:
        """Puts a picture in front of the next question."""
        self._shown.append(picture)

    def ask(self, question: str, stop: threading.Event | None = None) -> Iterator[str]:
        """The answer's pieces as they are generated; the turn is kept as far as it was read.

        Where the model fails, or the question is refused, the conversation stays as it was.

        Args:
            question: of a person.
            stop: ends the answer once it is set, with the next token.

        Raises:
            ValueError: an empty question, one with the image placeholder in it, or a conversation longer
                than the model reads.
        """
        started = time.perf_counter()
        asked = self._asked(question)
        pictures = self.pictures + self._shown
        inputs = self._inputs([*self.turns, asked], pictures)
        stream = Stream(self.model, self.processor.tokenizer, inputs | self._settings(), started, stop)
        pieces: list[str] = []
        try:
            for piece in stream.pieces():
                piece = piece if pieces else piece.lstrip()  # the space behind "ASSISTANT:"
                if piece:
                    pieces.append(piece)
                    yield piece
        except (GeneratorExit, KeyboardInterrupt):
            self._keep(asked, pictures, pieces, inputs, stream)
            raise
        self._keep(asked, pictures, pieces, inputs, stream)

    def _asked(self, question: str) -> dict[str, Any]:
        """The question as a message.

        Raises:
            ValueError: it is empty, or holds the placeholder of an image.
        """
        if not question.strip():
            raise ValueError("the question is empty")
        if self.processor.image_token in question:
            raise ValueError(
                f"a question cannot hold {self.processor.image_token}: pictures are given beside it"
            )
        content = [{"type": "image"}] * len(self._shown) + [{"type": "text", "text": question}]
        return {"role": "user", "content": content}

    def _inputs(self, turns: list[dict[str, Any]], pictures: "list[Image.Image]") -> dict[str, Any]:
        """What the model is called with for a prompt (1, T).

        Raises:
            ValueError: the prompt and an answer are longer than the model reads.
        """
        prompt = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        inputs = self.processor(text=[prompt], images=pictures or None, return_tensors="pt")
        length, most = inputs["input_ids"].shape[1], self._context()
        if length + self.max_new_tokens > most:
            raise ValueError(
                f"the conversation has {length} tokens, and {self.max_new_tokens} are kept for the answer; "
                f"the model reads {most}: start anew, or merge more"
            )
        return dict(inputs.to(self.model.device, self.model.dtype))

    def _settings(self) -> dict[str, Any]:
        """How `generate` chooses tokens."""
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {}
        return {
            "do_sample": False, "max_new_tokens": self.max_new_tokens,
            "pad_token_id": self.processor.tokenizer.pad_token_id,
        } | sampling  # fmt: skip

    def _context(self) -> int:
        """Tokens the language model reads at most, the answer included."""
        return llava.unwrap(self.model).config.text_config.max_position_embeddings

    def _keep(
        self,
        asked: dict[str, Any],
        pictures: "list[Image.Image]",
        pieces: list[str],
        inputs: dict[str, Any],
        stream: Stream,
    ) -> None:
        """Takes the turn up, with what it cost."""
        answer = {"role": "assistant", "content": [{"type": "text", "text": "".join(pieces).strip()}]}
        self.turns += [asked, answer]
        self.pictures, self._shown = pictures, []
        self.numbers = None
        if not stream.times:
            return  # left before the first token
        ids, model = inputs["input_ids"], llava.unwrap(self.model)
        self.numbers = Numbers(
            image_tokens=int((ids == model.config.image_token_id).sum()),
            patches=len(pictures) * llava.find(model).patches,
            prompt_tokens=ids.shape[1],
            answer_tokens=len(stream.times),
            first_token=stream.times[0] - stream.started,
            tokens_per_second=speed(stream.times),
            memory=memory(ids.device),
        )
