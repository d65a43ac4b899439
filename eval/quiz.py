"""Questions about the embedded scenes, asked in this process: quick enough to search hundreds of configs.

A picture goes through the tower once for all of its questions. The prompts are those of lmms-eval's VQAv2
task, an answer is right when it is the scene's own; eval/run.py is what published numbers come from.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava_pitome import MergeConfig, load, merge_tokens
from llava_pitome.embedded.questions import HINT, Question, ask
from llava_pitome.embedded.render import render
from llava_pitome.embedded.scenes import scene

TRAINING = 900_000_000  # the first seed of the pictures that training may see; validation takes those from 0
EACH = 3  # questions about a picture
BUDGETS = (98, 59, 39, 20)  # tokens of 196: 50, 70, 80 and 90 % of them go


class Quiz:
    """Pictures, questions about them, and the embedded model.

    Attributes:
        kinds: the answer type of every question.
    """

    def __init__(self, first_seed: int, pictures: int, batch_size: int = 64):
        """Draws the pictures of `pictures` seeds from `first_seed` on, and loads the model in bfloat16."""
        self.model, self.processor = load("embedded", dtype=torch.bfloat16)
        scenes = [scene(seed) for seed in range(first_seed, first_seed + pictures)]
        drawn = [Image.fromarray(render(s)) for s in scenes]
        self._pixels = self.processor.image_processor(drawn, return_tensors="pt")["pixel_values"].bfloat16()
        self._asked = [ask(s, EACH) for s in scenes]
        self._batch_size = batch_size
        self.kinds = [q.answer_type for questions in self._asked for q in questions]

    @torch.inference_mode()
    def __call__(self, config: MergeConfig | None) -> np.ndarray:
        """Which questions are answered rightly under a config, or unmerged: booleans, picture by picture."""
        merging = nullcontext() if config is None else merge_tokens(self.model, config, self.processor)
        with merging:
            return np.array([right for first in self._starts() for right in self._answers(first)])

    def _starts(self) -> range:
        return range(0, len(self._asked), self._batch_size)

    def _answers(self, first: int) -> Iterator[bool]:
        """The questions about one batch of pictures, encoded once."""
        there = slice(first, first + self._batch_size)
        encoded = self.model.model.get_image_features(pixel_values=self._pixels[there], return_dict=True)
        features = encoded.pooler_output
        asked = [(image, q) for image, questions in zip(features, self._asked[there]) for q in questions]
        for start in range(0, len(asked), self._batch_size):
            part = asked[start : start + self._batch_size]
            said = self._say([image for image, _ in part], [q for _, q in part])
            yield from (answer == q.answer for answer, (_, q) in zip(said, part))

    def _say(self, features: list[Tensor], questions: Sequence[Question]) -> list[str]:
        """What the model answers to each question about each picture's features."""
        tokenizer, marker = self.processor.tokenizer, self.processor.image_token
        prompts = [
            self.processor.apply_chat_template(_talk(q), add_generation_prompt=True).replace(
                marker, marker * len(image)
            )
            for image, q in zip(features, questions)
        ]
        inputs = tokenizer(prompts, padding=True, return_tensors="pt")
        said = self.model.generate(
            **inputs,
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=features)},
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers = tokenizer.batch_decode(said[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [a.strip() for a in answers]


def _talk(question: Question) -> list[dict]:
    content = [{"type": "image"}, {"type": "text", "text": question.text + HINT}]
    return [{"role": "user", "content": content}]


def everyone(
    configs: Sequence[MergeConfig | None], first_seed: int, pictures: int, jobs: int
) -> Iterator[np.ndarray]:
    """What `Quiz` says of each config, in order, worked out in several processes of one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes when they start
    with ProcessPoolExecutor(
        jobs, get_context("spawn"), initializer=_prepare, initargs=(first_seed, pictures)
    ) as pool:
        yield from pool.map(_ask, configs)


_quiz: Quiz | None = None  # a process's own


def _prepare(first_seed: int, pictures: int) -> None:
    global _quiz
    torch.set_num_threads(1)
    _quiz = Quiz(first_seed, pictures)


def _ask(config: MergeConfig | None) -> np.ndarray:
    return _quiz(config)
