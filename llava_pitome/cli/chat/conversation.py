"""A conversation with a LLaVA: its turns, the inputs of the next answer, and the cost of the last one."""

import math
import resource
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from llava_pitome.cli.chat.streaming import AnswerStream
from llava_pitome.image_io import to_rgb
from llava_pitome.models import hf_llava as llava

if TYPE_CHECKING:
    from PIL import Image


class AnswerStats(NamedTuple):
    """The cost of one answer.

    Attributes:
        image_tokens: at the input of the language model, of all images of the prompt.
        patches: that the image tokens were made of.
        prompt_tokens: of the complete prompt, image tokens included.
        answer_tokens: that were generated.
        first_token: seconds from the question to the first of them.
        tokens_per_second: of the tokens after the first; None for an answer of one token.
        memory: peak memory in bytes, of the process on a CPU, of the allocator on a GPU.
    """

    image_tokens: int
    patches: int
    prompt_tokens: int
    answer_tokens: int
    first_token: float
    tokens_per_second: float | None
    memory: int

    def line(self) -> str:
        """The stats in one line."""
        speed = f"{self.tokens_per_second:.1f} tokens/s" if self.tokens_per_second else "1 token"
        return (
            f"{self.image_tokens} image tokens of {self.patches} · first token {self.first_token:.2f} s · "
            f"{speed} · {self.memory / 2**30:.2f} GB"
        )


class Conversation:
    """Questions, images and answers, in order. Every answer is generated from all turns before it.

    Attributes:
        turns: messages for the chat template, with {"type": "image"} for each image.
        images: of all turns, in order.
        stats: of the last answer; None before the first.
    """

    def __init__(self, model: nn.Module, processor: Any, max_new_tokens: int = 512, temperature: float = 0.0):
        """Starts an empty conversation.

        Args:
            model: a LLaVA, merging or not; its config may change between answers.
            processor: the model's, which `apply` was given.
            max_new_tokens: the most tokens of an answer.
            temperature: of sampling; 0 takes the likeliest token.

        Raises:
            ValueError: a length or temperature out of range.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} is not allowed: it must be at least 1")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature={temperature} is not allowed: it must be a number from 0")
        self.model, self.processor = model, processor
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.reset()

    def reset(self) -> None:
        """Removes all turns and images."""
        self.turns: list[dict[str, Any]] = []
        self.images: list[Image.Image] = []
        self.stats: AnswerStats | None = None
        self._new_images: list[Image.Image] = []

    def add_image(self, image: "Image.Image") -> None:
        """Adds an image, which becomes RGB as by `image_io.to_rgb`, to the next question, before its text.

        Raises:
            ValueError: it cannot become RGB.
        """
        self._new_images.append(to_rgb(image))

    def ask(self, question: str, stop: threading.Event | None = None) -> Iterator[str]:
        """The pieces of the answer as they are generated.

        An answer that is interrupted is kept in the turns as far as it was read. Where the model fails or the
        question is refused, the conversation stays as it was.

        Args:
            question: the user's text.
            stop: ends the answer at the next token once it is set.

        Raises:
            ValueError: an empty question, one that contains the image placeholder, or a conversation that is
                longer than the model's context.
        """
        started = time.perf_counter()
        if not question.strip():
            raise ValueError("the question is empty")
        if self.processor.image_token in question:
            raise ValueError(f"a question cannot contain {self.processor.image_token}: add images separately")
        content = [{"type": "image"}] * len(self._new_images) + [{"type": "text", "text": question}]
        message = {"role": "user", "content": content}
        images = self.images + self._new_images
        inputs = self._inputs([*self.turns, message], images)
        tokenizer = self.processor.tokenizer
        settings = {"max_new_tokens": self.max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
        sampling = {"temperature": self.temperature} if self.temperature else {}
        stream = AnswerStream(self.model, tokenizer, stop)
        pieces: list[str] = []

        def keep() -> None:
            answer = {"role": "assistant", "content": [{"type": "text", "text": "".join(pieces).strip()}]}
            self.turns += [message, answer]
            self.images, self._new_images = images, []
            self.stats = self._stats(inputs["input_ids"], len(images), started, stream.times)

        try:
            for piece in stream.generate(**inputs, **settings, do_sample=bool(sampling), **sampling):
                piece = piece if pieces else piece.lstrip()  # the space after "ASSISTANT:"
                if piece:
                    pieces.append(piece)
                    yield piece
        except (GeneratorExit, KeyboardInterrupt):
            keep()
            raise
        keep()

    def _inputs(self, turns: list[dict[str, Any]], images: "list[Image.Image]") -> dict[str, Any]:
        """The model's inputs for a prompt (1, T).

        Raises:
            ValueError: the prompt and an answer are longer than the model's context.
        """
        prompt = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        inputs = self.processor(text=[prompt], images=images or None, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        context = llava.unwrap(self.model).config.text_config.max_position_embeddings
        if length + self.max_new_tokens > context:
            raise ValueError(
                f"the conversation has {length} tokens, and {self.max_new_tokens} are reserved for the "
                f"answer; the model's context is {context}: start a new conversation, or merge more"
            )
        return dict(inputs.to(self.model.device, self.model.dtype))

    def _stats(
        self, input_ids: torch.Tensor, images: int, started: float, times: list[float]
    ) -> AnswerStats | None:
        """The stats of an answer from its token times; None where no token was generated."""
        if not times:
            return None
        model = llava.unwrap(self.model)
        seconds = times[-1] - times[0]
        return AnswerStats(
            image_tokens=int((input_ids == model.config.image_token_id).sum()),
            patches=images * llava.find(model).patches,
            prompt_tokens=input_ids.shape[1],
            answer_tokens=len(times),
            first_token=times[0] - started,
            tokens_per_second=(len(times) - 1) / seconds if seconds > 0 else None,
            memory=_peak_memory(input_ids.device),
        )


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
