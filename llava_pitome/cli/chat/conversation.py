"""A conversation with a LLaVA: its turns, the inputs of the next answer, and the cost of the last one."""

import math
import resource
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from llava_pitome.cli.chat.streaming import AnswerStream
from llava_pitome.config import MergeConfig
from llava_pitome.image_io import to_rgb
from llava_pitome.models import hf_llava as llava
from llava_pitome.models.image_counts import counts_of

if TYPE_CHECKING:
    from PIL import Image


class AnswerStats(NamedTuple):
    """The cost of one answer.

    Attributes:
        image_tokens: at the input of the language model, of all images and videos of the prompt.
        patches: that the image tokens were made of; where the model cuts images into tiles or takes videos,
            the image tokens that it would be given without merging.
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
    """Questions, images or videos, and answers, in order. Every answer is generated from all turns before it.

    Attributes:
        turns: messages for the chat template, with {"type": "image"} for each image, and alike for videos.
        images: of all turns, in order.
        videos: of all turns, in order; each as its frames.
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
        """Removes all turns, images and videos."""
        self.turns: list[dict[str, Any]] = []
        self.images: list[Image.Image] = []
        self.videos: list[list[Image.Image]] = []
        self.stats: AnswerStats | None = None
        self._new_images: list[Image.Image] = []
        self._new_videos: list[list[Image.Image]] = []

    def add_image(self, image: "Image.Image") -> None:
        """Adds an image, which becomes RGB as by `image_io.to_rgb`, to the next question, before its text.

        Raises:
            ValueError: it cannot become RGB, or the conversation has a video.
        """
        if self.videos + self._new_videos:
            raise ValueError(
                "the conversation has a video, beside which no image is possible: begin a new one"
            )
        self._new_images.append(to_rgb(image))

    def add_video(self, frames: "Sequence[Image.Image]") -> None:
        """Adds a video, as `video_io.read_video` returns it, to the next question, before its text.

        Raises:
            ValueError: the model takes no videos, the video has no frames or, unlike those before it, another
                number of frames, or the conversation has an image.
        """
        parts = llava.find(self.model)
        if not counts_of(parts).takes_videos:
            raise ValueError(f"a {type(parts.model).__name__} takes no videos")
        if self.images + self._new_images:
            raise ValueError(
                "the conversation has an image, beside which no video is possible: begin a new one"
            )
        counts = {len(video) for video in self.videos + self._new_videos}
        if not frames:
            raise ValueError("a video has 0 frames; at least 1 is needed")
        if counts - {len(frames)}:
            raise ValueError(
                f"the video has {len(frames)} frames, and those before it {counts.pop()}; the videos of a "
                "conversation must have equally many"
            )
        self._new_videos.append([to_rgb(frame) for frame in frames])

    def count_tokens(self, config: MergeConfig | None) -> int:
        """Tokens of all images and videos, those of the next question included.

        Args:
            config: how they merge; None: not at all.

        Raises:
            ValueError: the config has a budget that does not fit one of them.
        """
        return self._count(config, self.images + self._new_images, self.videos + self._new_videos)

    def _count(
        self,
        config: MergeConfig | None,
        images: "list[Image.Image]",
        videos: "list[list[Image.Image]]",
    ) -> int:
        counts = counts_of(llava.find(self.model))
        tokens = sum(counts.images(config, [(image.height, image.width) for image in images]))
        return tokens + (sum(counts.videos(config, [len(video) for video in videos])) if videos else 0)

    def ask(self, question: str, stop: threading.Event | None = None) -> Iterator[str]:
        """The pieces of the answer as they are generated.

        An answer that is interrupted is kept in the turns as far as it was read. Where the model fails or the
        question is refused, the conversation stays as it was.

        Args:
            question: the user's text.
            stop: ends the answer at the next token once it is set.

        Raises:
            ValueError: an empty question, one that contains a placeholder, a budget that does not fit an
                image or video, or a conversation that is longer than the model's context.
        """
        started = time.perf_counter()
        if not question.strip():
            raise ValueError("the question is empty")
        for name in ("image", "video"):
            token = getattr(self.processor, f"{name}_token", None)
            if token and token in question:
                raise ValueError(f"a question cannot contain {token}: add {name}s separately")
        content = [{"type": "image"}] * len(self._new_images) + [{"type": "video"}] * len(self._new_videos)
        message = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        images, videos = self.images + self._new_images, self.videos + self._new_videos
        inputs = self._inputs([*self.turns, message], images, videos)
        tokenizer = self.processor.tokenizer
        settings = {"max_new_tokens": self.max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
        sampling = {"temperature": self.temperature} if self.temperature else {}
        stream = AnswerStream(self.model, tokenizer, stop)
        pieces: list[str] = []

        def keep() -> None:
            answer = {"role": "assistant", "content": [{"type": "text", "text": "".join(pieces).strip()}]}
            self.turns += [message, answer]
            self.images, self._new_images = images, []
            self.videos, self._new_videos = videos, []
            unmerged = self._count(None, images, videos)
            self.stats = self._stats(inputs["input_ids"], unmerged, started, stream.times)

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

    def _inputs(
        self,
        turns: list[dict[str, Any]],
        images: "list[Image.Image]",
        videos: "list[list[Image.Image]]",
    ) -> dict[str, Any]:
        """The model's inputs for a prompt (1, T).

        Raises:
            ValueError: the prompt and an answer are longer than the model's context.
        """
        prompt = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        given = {"images": [images] if images else None} | ({"videos": videos} if videos else {})
        inputs = self.processor(text=[prompt], **given, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        context = llava.unwrap(self.model).config.text_config.max_position_embeddings
        if length + self.max_new_tokens > context:
            raise ValueError(
                f"the conversation has {length} tokens, and {self.max_new_tokens} are reserved for the "
                f"answer; the model's context is {context}: start a new conversation, or merge more"
            )
        return dict(inputs.to(self.model.device, self.model.dtype))

    def _stats(
        self, input_ids: torch.Tensor, unmerged: int, started: float, times: list[float]
    ) -> AnswerStats | None:
        """The stats of an answer from its token times; None where no token was generated."""
        if not times:
            return None
        parts = llava.find(self.model).llava
        ids = [token for token in (parts.image_token, parts.video_token) if token is not None]
        placeholders = torch.tensor(ids, device=input_ids.device)
        seconds = times[-1] - times[0]
        return AnswerStats(
            image_tokens=int(torch.isin(input_ids, placeholders).sum()),
            patches=unmerged,
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
