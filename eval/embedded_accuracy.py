"""Accuracy on the embedded scenes in this process: quick enough to search hundreds of configs.

An image is encoded once for all of its questions. The prompts are those of lmms-eval's VQAv2 task, an
answer is right when it equals the scene's; published numbers come from eval.run.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from eval.embedded_images import embedded_image
from llava_pitome import MergeConfig, embedded, load, merge_tokens
from llava_pitome.embedded.dataset import SCENES
from llava_pitome.embedded.questions import HINT, Question
from llava_pitome.models import hf_llava

TRAINING = 900_000_000  # the first seed of training images; those of validation start at 0
QUESTIONS = 3  # per image
BUDGETS = (98, 59, 39, 20)  # image tokens of 196: 50, 30, 20 and 10 %
TILED_BUDGETS = (0.2, 0.1, 0.05)  # shares of an image's own tokens


class EmbeddedEvaluation:
    """Images, questions about them, and an embedded model.

    Attributes:
        kinds: the answer type of every question.
    """

    def __init__(self, first_seed: int, images: int, batch_size: int = 64, model: str = embedded.NAME):
        """Renders the images of `images` seeds from `first_seed` on, and loads the model in bfloat16.

        Args:
            first_seed: of the scenes.
            images: their number.
            batch_size: images, or questions, at a time.
            model: the name of an embedded model, or the folder of one that was trained like it.
        """
        self.model, self.processor = load(model, dtype=torch.bfloat16)
        is_tiled = hf_llava.find(self.model).llava.tiling is not None
        data = embedded.NAME_NEXT if is_tiled else embedded.NAME
        make_scene, ask = SCENES[data]
        seeds = range(first_seed, first_seed + images)
        self._questions = [ask(make_scene(seed), QUESTIONS) for seed in seeds]
        self._batch_size = batch_size
        self._images = {}
        for start in range(0, images, batch_size):
            rendered = [embedded_image(seed, data) for seed in seeds[start : start + batch_size]]
            inputs = self.processor.image_processor(rendered, return_tensors="pt")
            self._images[start] = inputs.to(torch.bfloat16)
        self.kinds = [q.answer_type for questions in self._questions for q in questions]

    @torch.inference_mode()
    def __call__(self, config: MergeConfig | None) -> np.ndarray:
        """Which questions are answered right under a config, or unmerged: booleans, image by image."""
        merging = nullcontext() if config is None else merge_tokens(self.model, config, self.processor)
        with merging:
            starts = range(0, len(self._questions), self._batch_size)
            return np.array([right for start in starts for right in self._answer_images(start)])

    def _answer_images(self, start: int) -> Iterator[bool]:
        """The questions about one batch of images, which are encoded once."""
        batch = slice(start, start + self._batch_size)
        encoded = self.model.get_image_features(**self._images[start], return_dict=True)
        pairs = [(f, q) for f, qs in zip(encoded.pooler_output, self._questions[batch]) for q in qs]
        for first in range(0, len(pairs), self._batch_size):
            part = pairs[first : first + self._batch_size]
            answers = self._generate([features for features, _ in part], [q for _, q in part])
            yield from (answer == q.answer for answer, (_, q) in zip(answers, part))

    def _generate(self, features: list[Tensor], questions: Sequence[Question]) -> list[str]:
        """The answer to each question about each image's features."""
        tokenizer, placeholder = self.processor.tokenizer, self.processor.image_token
        prompts = [
            self.processor.apply_chat_template(_messages(q), add_generation_prompt=True).replace(
                placeholder, placeholder * len(image)
            )
            for image, q in zip(features, questions)
        ]
        inputs = tokenizer(prompts, padding=True, return_tensors="pt")
        generated = self.model.generate(
            **inputs,
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=features)},
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        new_tokens = generated[:, inputs["input_ids"].shape[1] :]
        return [answer.strip() for answer in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]


def _messages(question: Question) -> list[dict]:
    content = [{"type": "image"}, {"type": "text", "text": question.text + HINT}]
    return [{"role": "user", "content": content}]


def evaluate_all(
    configs: Sequence[MergeConfig | None],
    first_seed: int,
    images: int,
    jobs: int,
    model: str = embedded.NAME,
) -> Iterator[np.ndarray]:
    """The result of `EmbeddedEvaluation` for each config, in order, by single-threaded processes."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes when they start
    arguments = (first_seed, images, model)
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_start, initargs=arguments) as pool:
        yield from pool.map(_evaluate, configs)


_evaluation: EmbeddedEvaluation | None = None  # one per process


def _start(first_seed: int, images: int, model: str) -> None:
    global _evaluation
    torch.set_num_threads(1)
    _evaluation = EmbeddedEvaluation(first_seed, images, model=model)


def _evaluate(config: MergeConfig | None) -> np.ndarray:
    return _evaluation(config)
