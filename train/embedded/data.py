"""Batches for the embedded model: images, labels of every patch, and conversations about them.

Shapes: B images, P patches of an image, T tokens, N nouns.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset, get_worker_info

from llava_pitome.embedded.questions import HINT, Question, ask
from llava_pitome.embedded.render import coverage, render
from llava_pitome.embedded.scenes import COLORS, DIGITS, LETTERS, PATCH, SHAPES, SIDE, TEXTURES, Scene, scene
from train.conversation import IGNORE_INDEX

GRID = SIDE // PATCH
PATCHES = GRID**2
TURNS = 10  # questions about an image
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
TRAIN_SEEDS, STAGE_SEEDS = 1_000_000_000, 100_000_000  # the first, and seeds per stage; validation has 0 on
HELD_OUT_SEEDS = 900_000_000
LABELS = {
    "shape": SHAPES,
    "color": COLORS,
    "texture": TEXTURES,
    "size": ("small", "large"),
    "mark": tuple("-" + DIGITS + LETTERS),  # "-": an object without a mark
}
WORDLESS = ("plain", "-")  # values that questions never name


class SceneBatches(IterableDataset):
    """A batch of `batch_size` consecutive scenes from each of some first seeds."""

    def __init__(self, first_seeds: Sequence[int], batch_size: int, tokenizer: Any):
        """Takes the first seed of every batch."""
        self.first_seeds, self.batch_size, self.tokenizer = first_seeds, batch_size, tokenizer

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Batches: pixel_values, patches, input_ids and labels (B, T), nouns, referents."""
        worker = get_worker_info()  # workers alternate, so that batches stay in order
        for first in self.first_seeds[worker.id :: worker.num_workers] if worker else self.first_seeds:
            scenes = [scene(seed) for seed in range(first, first + self.batch_size)]
            text = encode_conversations([ask(s, TURNS) for s in scenes], self.tokenizer)
            patches = torch.stack([patch_labels(s) for s in scenes])
            yield {
                "pixel_values": pixel_values(np.stack([render(s) for s in scenes])),
                "patches": patches,
                **text,
                **noun_referents(text["input_ids"], text["labels"], patches, self.tokenizer),
            }


def pixel_values(images: np.ndarray) -> Tensor:
    """Images (B, H, W, 3) in uint8 as the processor preprocesses them: (B, 3, H, W) in float32."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values, device="cpu").view(3, 1, 1) for values in (MEAN, STD))
    return (x - mean) / std


def patch_labels(scene: Scene) -> Tensor:
    """Indices into LABELS, from 1, of the object that covers a patch most; 0: none. (P, len(LABELS))."""
    covers = np.stack([coverage(t).ravel() for t in scene.things])
    owner, is_covered = covers.argmax(0), covers.max(0) > 0.1
    rows = [[1 + LABELS[k].index(getattr(t, k) or "-") for k in LABELS] for t in scene.things]
    return torch.from_numpy(np.where(is_covered[:, None], np.array(rows)[owner], 0))


def noun_referents(ids: Tensor, labels: Tensor, patches: Tensor, tokenizer: Any) -> dict[str, Tensor]:
    """The nouns of the questions, the text without labels, and the patches that they refer to.

    "The small red circle" refers to the patches that are small, red and circle. A noun without a referent in
    its image is left out. Ids and labels are (B, T), patches (B, P, len(LABELS)) as in `patch_labels`.

    Returns:
        `nouns` (N, 2), row and position of each, and `referents` (N, P), weights that sum to 1.
    """
    attributes = {}  # of a token: index and value of its label
    for i, table in enumerate(label_tokens(tokenizer, ids.device)):
        attributes |= {int(token): (i, value) for value, token in enumerate(table) if token >= 0}
    (any_object,) = first_tokens(tokenizer, ["object"])
    nouns, referents = [], []
    for row, (tokens, row_labels) in enumerate(zip(ids.tolist(), labels.tolist(), strict=True)):
        phrase: list[tuple[int, int]] = []  # attributes of the current noun phrase
        for position, (token, label) in enumerate(zip(tokens, row_labels, strict=True)):
            if label != IGNORE_INDEX or (token not in attributes and token != any_object):
                phrase = []
                continue
            phrase += [attributes[token]] if token in attributes else []
            if token == any_object or attributes[token][0] == 0:  # a noun: "object", or a shape
                fits = torch.stack([patches[row, :, i] == value for i, value in phrase or [(0, -1)]]).all(0)
                if fits.any():
                    nouns.append((row, position))
                    referents.append(fits / fits.sum())
                phrase = []
    return {"nouns": torch.tensor(nouns, device=ids.device), "referents": torch.stack(referents)}


def first_tokens(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """The first token of each word after a blank."""
    return [tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in words]


def label_tokens(
    tokenizer: Any, device: torch.device, labels: dict[str, Sequence[str]] = LABELS
) -> list[Tensor]:
    """The token of every value of every label, in the order of `patch_labels`; -1 where there is no word."""
    return [
        torch.tensor(
            [-1, *(-1 if v in WORDLESS else first_tokens(tokenizer, [v])[0] for v in values)], device=device
        )
        for values in labels.values()
    ]


def side_tokens(tokenizer: Any, device: torch.device) -> list[Tensor]:
    """The tokens "top" or "bottom", and "left" or "right", of each patch: (P,) each."""
    top, bottom, left, right = first_tokens(tokenizer, ("top", "bottom", "left", "right"))
    is_far = torch.arange(GRID, device=device) >= GRID // 2
    rows, columns = torch.where(is_far, bottom, top), torch.where(is_far, right, left)
    return [rows.repeat_interleave(GRID), columns.repeat(GRID)]


def encode_conversations(
    questions: list[list[Question]], tokenizer: Any, image_tokens: int = PATCHES
) -> dict[str, Tensor]:
    """input_ids and labels (B, T) of conversations, padded on the right; only answers have labels.

    The same tokens as `conversation.encode` makes, many times faster.
    """
    image = "<image>" * image_tokens + "\n"
    prompts, answers = [], []
    for turn, question in ((i, q) for turns in questions for i, q in enumerate(turns)):
        start, hint = (f"{tokenizer.bos_token}USER: {image}", HINT) if turn == 0 else ("USER: ", "")
        prompts.append(f"{start}{question.text}{hint} ASSISTANT:")
        answers.append(f" {question.answer}")
    encoded = zip(*(tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in (prompts, answers)))
    ids, labels = [], []
    for turns in questions:
        row: list[int] = []
        row_labels: list[int] = []
        for _, (prompt, answer) in zip(turns, encoded):
            answer = [*answer, tokenizer.eos_token_id]
            row += prompt + answer
            row_labels += [IGNORE_INDEX] * len(prompt) + answer
        ids.append(torch.tensor(row, device="cpu"))
        labels.append(torch.tensor(row_labels, device="cpu"))
    return {
        "input_ids": pad_sequence(ids, True, tokenizer.pad_token_id),
        "labels": pad_sequence(labels, True, IGNORE_INDEX),
    }
