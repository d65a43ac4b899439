"""Batches for the embedded LLaVA-NeXT: pictures of one size, labels of every patch, and conversations.

Shapes: B pictures, K tiles with the thumbnail first, P patches of a tile, T image tokens, N nouns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from llava_pitome.embedded.anyres import GRID, Tiling, tiling
from llava_pitome.embedded.questions_next import ask
from llava_pitome.embedded.render import coverage_of_cells, render
from llava_pitome.embedded.scenes import COLORS, DIGITS, LETTERS, SHAPES, TEXTURES, Scene
from llava_pitome.embedded.scenes_next import SIGN, WORDS, sample_size, scene
from train.conversation import IGNORE_INDEX
from train.embedded.data import encode_conversations, first_tokens, label_tokens

TRAIN_SEEDS, STAGE_SEEDS = 4_000_000_000, 100_000_000  # the first, and seeds per stage; validation has 0 on
HELD_OUT_SEEDS = 3_000_000_000
PATCHES = GRID**2
BINS = 6  # of a token's row and of its column in the picture: halves and thirds are unions of them
LABELS: dict[str, Sequence[str]] = {
    "shape": (*SHAPES, SIGN),
    "color": COLORS,
    "texture": TEXTURES,
    "size": ("small", "large"),
    "mark": tuple("-" + DIGITS + LETTERS),  # "-": an object without a mark
    "word": ("-", *WORDS),
}
LEGIBLE = (4, 5)  # labels that the thumbnail does not resolve: mark and word
SHAPE, MARK, WORD = 0, 4, 5


@dataclass(frozen=True)
class Layout:
    """Where the image tokens of a picture come from, in the language model's order.

    Attributes:
        tile: of each token, 0 the thumbnail, -1 for a newline; (T,).
        patch: in that tile; (T,).
        bins: row and column of each token in the picture, from 0 to BINS - 1; (T, 2).
    """

    tile: Tensor
    patch: Tensor
    bins: Tensor


def layout(tiles: Tiling) -> Layout:
    """The layout of a picture: the thumbnail, then rows of the unpadded tiles, each with a newline."""
    (rows, columns), (_, tile_columns) = (GRID * n for n in tiles.tiles), tiles.tiles
    r, c = np.mgrid[:rows, :columns]
    tile, patch = 1 + r // GRID * tile_columns + c // GRID, r % GRID * GRID + c % GRID
    kept = _unpadded(tiles, rows, columns)
    tile, patch = (np.pad(x[kept], ((0, 0), (0, 1)), constant_values=-1).ravel() for x in (tile, patch))
    bins = [_bins(tiles.patch_borders(axis), tiles.size[axis]) for axis in (0, 1)]
    bins = np.stack(np.meshgrid(*bins, indexing="ij"), -1)[kept]
    bins = np.pad(bins, ((0, 0), (0, 1), (0, 0))).reshape(-1, 2)
    thumbnail = _bins(np.arange(GRID + 1.0), GRID)
    thumbnail = np.stack(np.meshgrid(thumbnail, thumbnail, indexing="ij"), -1).reshape(-1, 2)
    return Layout(
        torch.from_numpy(np.concatenate([np.zeros(PATCHES, int), tile])),
        torch.from_numpy(np.concatenate([np.arange(PATCHES), patch])),
        torch.from_numpy(np.concatenate([thumbnail, bins])),
    )


def _unpadded(tiles: Tiling, rows: int, columns: int) -> tuple[slice, slice]:
    """The rows and columns of patches that transformers' `unpad_image` keeps."""
    height, width = tiles.size
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(padding, rows - padding), slice(None)
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(None), slice(padding, columns - padding)


def _bins(borders: np.ndarray, side: int) -> np.ndarray:
    middles = (borders[:-1] + borders[1:]) / 2
    return np.clip(middles * BINS / side, 0, BINS - 1).astype(int)


class PictureBatches(IterableDataset):
    """Batches of consecutive scenes whose pictures have one size, so that no image token is padding."""

    def __init__(
        self,
        seeds: Sequence[tuple[int, int]],
        batch_size: int,
        turns: int,
        processor: Any,
        crowd: int = 1,
    ):
        """Takes the first seed of every batch with the seed of its size, and the `crowd` of the scenes."""
        self.seeds, self.batch_size, self.turns, self.processor = seeds, batch_size, turns, processor
        self.crowd = crowd

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Batches; see `make_batch`."""
        worker = get_worker_info()  # workers alternate, so that batches stay in order
        for first, size_seed in self.seeds[worker.id :: worker.num_workers] if worker else self.seeds:
            size = sample_size(np.random.default_rng([size_seed, 5]))
            scenes = [scene(seed, size, self.crowd) for seed in range(first, first + self.batch_size)]
            yield make_batch(scenes, self.turns, self.processor)


def make_batch(scenes: Sequence[Scene], turns: int, processor: Any) -> dict[str, Tensor]:
    """Pictures of one size with questions.

    Returns:
        pixel_values (B, K, 3, H, W), image_sizes (B, 2), patches (B, K, P, len(LABELS)), input_ids and labels
        (B, L), tile, patch and bins of the layout, nouns and referents.
    """
    tokenizer = processor.tokenizer
    tiles = tiling(scenes[0].height, scenes[0].width)
    where = layout(tiles)
    images = processor.image_processor([render(s) for s in scenes], return_tensors="pt")
    patches = torch.stack([patch_labels(s, tiles) for s in scenes])
    questions = [ask(s, turns) for s in scenes]
    text = encode_conversations(questions, tokenizer, len(where.tile))
    packed = torch.where(where.tile[:, None] < 0, 0, patches[:, where.tile, where.patch])
    nouns = noun_referents(text["input_ids"], text["labels"], packed, tokenizer)
    return {**images, "patches": patches, **text, **vars(where), **nouns}


def patch_labels(scene: Scene, tiles: Tiling) -> Tensor:
    """Indices into LABELS, from 1, of the object that covers a patch most; 0: none. (K, P, len(LABELS))."""
    thumbnail = [np.arange(GRID + 1) * side / GRID for side in tiles.size]
    grid = [tiles.patch_borders(axis) for axis in (0, 1)]
    values = [
        [
            1 + LABELS["shape"].index(t.shape),
            1 + LABELS["color"].index(t.color),
            1 + LABELS["texture"].index(t.texture),
            1 + LABELS["size"].index(t.size),
            1 + LABELS["mark"].index(t.mark if len(t.mark) == 1 else "-"),
            1 + LABELS["word"].index(t.mark if len(t.mark) > 1 else "-"),
        ]
        for t in scene.things
    ]
    labels = []
    for borders in (thumbnail, grid):
        covers = np.stack([coverage_of_cells(t, *tiles.size, *borders) for t in scene.things])
        owner, is_covered = covers.argmax(0), covers.max(0) > 0.1
        found = np.where(is_covered[..., None], np.array(values)[owner], 0)
        rows, columns = (n // GRID for n in found.shape[:2])
        found = found.reshape(rows, GRID, columns, GRID, -1).swapaxes(1, 2)
        labels.append(found.reshape(rows * columns, PATCHES, -1))
    return torch.from_numpy(np.concatenate(labels))


def noun_referents(ids: Tensor, labels: Tensor, packed: Tensor, tokenizer: Any) -> dict[str, Tensor]:
    """The nouns of the questions, and the image tokens that they refer to.

    "The small red circle" refers to the patches that are small, red and circle. The word of a sign and a
    character are nouns too, which refer to tiles alone. A noun without a referent is left out.

    Args:
        ids: (B, L).
        labels: (B, L), of the answers, which have no nouns.
        packed: (B, T, len(LABELS)) as in `patch_labels`, in the order of the image tokens.
        tokenizer: of the ids.

    Returns:
        `nouns` (N, 2), row and position of each, and `referents` (N, 2, T): weights in the thumbnail and in
        the tiles, which sum to 1 or are 0.
    """
    attributes = {}  # of a token: index and value of its label
    for i, table in enumerate(label_tokens(tokenizer, ids.device, LABELS)):
        attributes |= {int(token): (i, value) for value, token in enumerate(table) if token >= 0}
    any_object, digit, letter = first_tokens(tokenizer, ("object", "digit", "letter"))
    nouns, referents = [], []
    for row, (tokens, row_labels) in enumerate(zip(ids.tolist(), labels.tolist(), strict=True)):
        phrase: list[tuple[int, int]] = []  # attributes of the current noun phrase
        before = -1
        for position, (token, label) in enumerate(zip(tokens, row_labels, strict=True)):
            kind, value = attributes.get(token, (-1, 0))
            is_text = kind == WORD or (kind == MARK and before in (digit, letter))
            before = token
            if label != IGNORE_INDEX or (kind < 0 and token != any_object) or (kind == MARK and not is_text):
                phrase = []
                continue
            phrase += [(kind, value)] if kind >= 0 else []
            if is_text or token == any_object or kind == SHAPE:
                fits = torch.stack([packed[row, :, i] == value for i, value in phrase or [(0, -1)]]).all(0)
                weights = torch.stack([fits, fits]).float()
                weights[0, PATCHES:] = 0
                weights[1, :PATCHES] = 0
                weights[0] *= not is_text
                if weights.any():
                    nouns.append((row, position))
                    referents.append(weights / weights.sum(-1, keepdim=True).clamp_min(1))
                phrase = []
    none = torch.zeros(0, 2, packed.shape[1], device=ids.device)
    return {
        "nouns": torch.tensor(nouns, dtype=torch.long, device=ids.device).view(-1, 2),
        "referents": torch.stack(referents) if referents else none,
    }
