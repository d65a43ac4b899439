"""Batches for the embedded model: pictures, what lies under each patch, and conversations about them."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from llava_pitome.embedded.questions import HINT, Question, ask
from llava_pitome.embedded.render import coverage, render
from llava_pitome.embedded.scenes import COLORS, DIGITS, LETTERS, PATCH, SHAPES, SIDE, TEXTURES, Scene, scene

IGNORE = -100
GRID = SIDE // PATCH
PATCHES = GRID**2
TURNS = 10  # questions asked about a training picture
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
TRAIN_SEEDS, STAGE = 1_000_000_000, 100_000_000  # validation takes the seeds from 0 upwards
HELD_OUT = 900_000_000
LABELS = {
    "shape": SHAPES,
    "color": COLORS,
    "texture": TEXTURES,
    "size": ("small", "large"),
    "mark": tuple("-" + DIGITS + LETTERS),  # "-" an object without a mark
}


class Scenes(IterableDataset):
    """A batch of `batch_size` scenes from each of the seeds in `starts` on."""

    def __init__(self, starts: Sequence[int], batch_size: int, tokenizer):
        self.starts, self.batch_size, self.tokenizer = starts, batch_size, tokenizer

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Batches of pixel_values, patches (B, PATCHES, len(LABELS)), input_ids and labels (B, T)."""
        worker = get_worker_info()  # several take turns, so that batches stay in order
        for start in self.starts[worker.id :: worker.num_workers] if worker else self.starts:
            scenes = [scene(seed) for seed in range(start, start + self.batch_size)]
            talk = conversations([ask(s, TURNS) for s in scenes], self.tokenizer)
            patches = torch.stack([patch_labels(s) for s in scenes])
            yield {
                "pixel_values": pixels(np.stack([render(s) for s in scenes])),
                "patches": patches,
                **talk,
                **pointers(talk["input_ids"], talk["labels"], patches, self.tokenizer),
            }


def pixels(pictures: np.ndarray) -> Tensor:
    """Pictures (B, H, W, 3) uint8 as the processor would hand them over: (B, 3, H, W) float32."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def patch_labels(scene: Scene) -> Tensor:
    """What covers most of each patch, by attribute: (PATCHES, len(LABELS)), 0 for nothing."""
    covers = np.stack([coverage(t).ravel() for t in scene.things])
    owner, covered = covers.argmax(0), covers.max(0) > 0.1
    rows = [[1 + LABELS[k].index(getattr(t, k) or "-") for k in LABELS] for t in scene.things]
    return torch.from_numpy(np.where(covered[:, None], np.array(rows)[owner], 0))


def pointers(ids: Tensor, labels: Tensor, patches: Tensor, tokenizer) -> dict[str, Tensor]:
    """Where the nouns of the questions are, and the patches of what they mean.

    Returns `nouns` (n, 2), row and position, and `meant` (n, PATCHES), summing to 1. "The small red circle"
    means the patches that are small, red and circle; a noun that means nothing in its picture is left out.
    """
    kinds = {}  # token to (attribute, value)
    for i, table in enumerate(words(tokenizer, ids.device)):
        kinds |= {int(token): (i, value) for value, token in enumerate(table) if token >= 0}
    thing = tokenizer.encode(" object", add_special_tokens=False)[0]
    nouns, meant = [], []
    for row, (line, said) in enumerate(zip(ids.tolist(), labels.tolist(), strict=True)):
        named: list[tuple[int, int]] = []
        for position, (token, label) in enumerate(zip(line, said, strict=True)):
            if label != IGNORE or (token not in kinds and token != thing):
                named = []
                continue
            named += [kinds[token]] if token in kinds else []
            if token == thing or kinds[token][0] == 0:
                here = torch.stack([patches[row, :, i] == value for i, value in named or [(0, -1)]]).all(0)
                if here.any():
                    nouns.append((row, position))
                    meant.append(here / here.sum())
                named = []
    return {"nouns": torch.tensor(nouns), "meant": torch.stack(meant)}


def words(tokenizer, device: torch.device) -> list[Tensor]:
    """The token for each value of each attribute in LABELS, -1 for nothing and what questions never name."""
    unnamed = ("plain", "-")
    table = []
    for values in LABELS.values():
        ids = [-1 if v in unnamed else tokenizer.encode(f" {v}", add_special_tokens=False)[0] for v in values]
        table.append(torch.tensor([-1, *ids], device=device))
    return table


def sides(tokenizer, device: torch.device) -> list[Tensor]:
    """The tokens for where each patch is, up or down and left or right: (PATCHES,) each."""
    top, bottom, left, right = (
        tokenizer.encode(f" {word}", add_special_tokens=False)[0]
        for word in ("top", "bottom", "left", "right")
    )
    far = torch.arange(GRID, device=device) >= GRID // 2
    rows, columns = torch.where(far, bottom, top), torch.where(far, right, left)
    return [rows.repeat_interleave(GRID), columns.repeat(GRID)]


def conversations(asked: list[list[Question]], tokenizer) -> dict[str, Tensor]:
    """Conversations, the picture in the first turn, padded on the right; only answers carry labels."""
    pieces: list[tuple[str, str]] = []
    for questions in asked:
        for turn, question in enumerate(questions):
            lead = f"{tokenizer.bos_token}USER: " + "<image>" * PATCHES + "\n" if turn == 0 else "USER: "
            pieces.append(
                (f"{lead}{question.text}{HINT if turn == 0 else ''} ASSISTANT:", f" {question.answer}")
            )
    prompts = tokenizer([p for p, _ in pieces], add_special_tokens=False)["input_ids"]
    answers = tokenizer([a for _, a in pieces], add_special_tokens=False)["input_ids"]
    rows, at = [], 0
    for questions in asked:
        ids: list[int] = []
        labels: list[int] = []
        for prompt, answer in zip(
            prompts[at : at + len(questions)], answers[at : at + len(questions)], strict=True
        ):
            said = [*answer, tokenizer.eos_token_id]
            ids += prompt + said
            labels += [IGNORE] * len(prompt) + said
        at += len(questions)
        rows.append((torch.tensor(ids), torch.tensor(labels)))
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([r[0] for r in rows], batch_first=True, padding_value=tokenizer.pad_token_id),
        "labels": pad([r[1] for r in rows], batch_first=True, padding_value=IGNORE),
    }
