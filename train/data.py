"""Rows as a training set: checked before training, read one at a time, broken ones within a limit."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from train.broken import Broken
from train.conversations import BrokenRow, Talk, read
from train.encoding import IGNORED, encode
from train.records import Records
from train.stops import TooManyBroken

TRIED = 100  # rows from which one is encoded before training


class Conversations(Dataset):
    """Rows that can be trained on, as ids, labels and pictures.

    Attributes:
        sound: the index in the file of every row that is left.
        lengths: of each of them, roughly how many tokens it has.
        broken: the others.
    """

    def __init__(
        self,
        rows: Records,
        folder: Path,
        processor: Any,
        patches: int,
        longest: int,
        broken: Broken,
        picture: int | None = None,
    ):
        """Looks at every row, and at whether its pictures are there.

        Args:
            rows: of a file.
            folder: that image names start from.
            processor: the model's.
            patches: placeholders of a picture that does not merge.
            longest: tokens of a conversation, pictures included; what is beyond is cut off.
            broken: counts rows that have to be left out.
            picture: tokens of a picture that arrive, for lengths; as unmerged where not given.

        Raises:
            TooManyBroken: more than allowed, or all.
            ValueError: the processor writes no conversations that labels can follow.
        """
        self._rows, self._folder, self._processor = rows, folder, processor
        self._patches, self._longest, self.broken = patches, longest, broken
        self.sound: list[int] = []
        self.lengths: list[int] = []
        for i in range(len(rows)):
            try:
                talk = self._talk(i)
            except BrokenRow as error:
                broken.add(i, error, by_all=True)
            else:
                self.sound.append(i)
                self.lengths.append(talk.length(patches if picture is None else picture))
        broken.check()
        if not self.sound:
            raise TooManyBroken(f"every row of data={rows.path} is broken: {broken.told()}")
        longer = max(range(min(len(self), TRIED)), key=self.lengths.__getitem__)
        encode(
            processor, self._talk(self.sound[longer]), longest, patches
        )  # raises for what cannot be followed

    def _talk(self, i: int) -> Talk:
        try:
            row = self._rows[i]
        except ValueError as error:
            raise BrokenRow(f"it is no JSON: {error}") from error
        return read(row, self._folder)

    def __len__(self) -> int:
        return len(self.sound)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Row i: input_ids and labels (T,), and its pictures (n, 3, H, W).

        One whose picture turns out to be unreadable is left out, and the next one stands in.

        Raises:
            TooManyBroken: more than allowed, or all.
        """
        for j in (*range(i, len(self)), *range(i)):
            if self.sound[j] in self.broken:
                continue
            try:
                return self._item(j)
            except BrokenRow as error:
                self.broken.add(self.sound[j], error)
                self.broken.check()
        raise TooManyBroken(f"no row of data={self._rows.path} can be read: {self.broken.told()}")

    def _item(self, i: int) -> dict[str, Any]:
        talk = self._talk(self.sound[i])
        ids, labels = encode(self._processor, talk, self._longest, self._patches)
        item: dict[str, Any] = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
        seen = ids.count(self._processor.image_token_id)  # others are beyond the longest row
        if seen:
            pictures = [_picture(file) for file in talk.images[:seen]]
            item["pixel_values"] = self._processor.image_processor(pictures, return_tensors="pt").pixel_values
        return item


class Collate:
    """Rows as a batch, padded on the right."""

    def __init__(self, processor: Any):
        """Takes sizes and ids from a processor."""
        self._padding = processor.tokenizer.pad_token_id
        self._image = processor.image_token_id
        self._processor = processor

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels (B, T) and pixel_values (I, 3, H, W) of rows.

        A batch of words alone gets a grey picture behind the end of its first row, which no word can see and
        nothing is learnt from: the vision tower runs in every step of every process, as ZeRO and
        DistributedDataParallel need it.
        """
        ids, labels = [item["input_ids"] for item in items], [item["labels"] for item in items]
        mask = [torch.ones_like(row) for row in ids]
        pixels = [item["pixel_values"] for item in items if "pixel_values" in item]
        if not pixels:
            ids[0] = torch.cat([ids[0], ids[0].new_tensor([self._image])])
            labels[0] = torch.cat([labels[0], labels[0].new_tensor([IGNORED])])
            mask[0] = torch.ones_like(ids[0])
            grey = Image.new("RGB", (32, 32), (122, 116, 104))
            pixels = [self._processor.image_processor([grey], return_tensors="pt").pixel_values]
        return {
            "input_ids": pad_sequence(ids, True, self._padding),
            "attention_mask": pad_sequence(mask, True, 0),
            "labels": pad_sequence(labels, True, IGNORED),
            "pixel_values": torch.cat(pixels),
        }


def _picture(file: Path) -> Image.Image:
    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # as pillow raises
        raise BrokenRow(f"image {file} cannot be read: {error}") from error
