"""The training data: rows of conversations as the dataset that the Trainer reads."""

import fcntl
import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import Dataset

from llava_pitome import MergeConfig
from llava_pitome.image_io import open_image
from llava_pitome.models import hf_llava as llava
from train import export
from train.conversation import BrokenRow, Conversation, encode, parse_row
from train.options import EMBEDDED, SCENES
from train.rows import BrokenRows, JsonRows, TooManyBrokenRows

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger("train.data")
MAX_ENCODED = 100  # rows of which the longest is encoded before training
BROKEN = "broken.jsonl"  # in the output folder


class ConversationDataset(Dataset):
    """The rows that can be trained on, as ids, labels and pixel values.

    Attributes:
        indices: of these rows in the file.
        lengths: the approximate number of tokens of each.
        broken: the other rows.
    """

    def __init__(
        self,
        rows: JsonRows,
        folder: Path,
        processor: Any,
        unmerged_tokens: int,
        max_length: int,
        broken: BrokenRows,
        image_tokens: int | None = None,
    ):
        """Parses every row once, and checks that its images, with names relative to `folder`, exist.

        Args:
            rows: of a file.
            folder: of the images.
            processor: the model's.
            unmerged_tokens: tokens of an image without merging.
            max_length: tokens of a row, images unmerged; the rest is cut off.
            broken: records the rows that are left out.
            image_tokens: tokens of an image, for `lengths`; unmerged by default.

        Raises:
            TooManyBrokenRows: more than allowed, or all.
            ValueError: the processor has no chat template that labels can be aligned with.
        """
        self._rows, self._folder, self._processor = rows, folder, processor
        self._unmerged_tokens, self._max_length, self.broken = unmerged_tokens, max_length, broken
        self.indices: list[int] = []
        self.lengths: list[int] = []
        for i in range(len(rows)):
            try:
                conversation = self._parse(i)
            except BrokenRow as error:
                broken.add(i, error)
            else:
                self.indices.append(i)
                self.lengths.append(conversation.length(image_tokens or unmerged_tokens))
        broken.check()
        if not self.indices:
            raise TooManyBrokenRows(f"every row of data={rows.path} is broken: {broken}")
        longest = max(range(min(len(self), MAX_ENCODED)), key=self.lengths.__getitem__)
        encode(processor, self._parse(self.indices[longest]), max_length, unmerged_tokens)  # to raise early

    def _parse(self, i: int) -> Conversation:
        try:
            row = self._rows[i]
        except ValueError as error:
            raise BrokenRow(f"it is not JSON: {error}") from error
        return parse_row(row, self._folder)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Item i: input_ids and labels (T,), and pixel_values (images, 3, H, W).

        A row whose image proves unreadable is left out, and the next row takes its place.

        Raises:
            TooManyBrokenRows: more than allowed, or all.
        """
        for j in (*range(i, len(self)), *range(i)):
            if self.indices[j] in self.broken:
                continue
            try:
                return self._encode(j)
            except BrokenRow as error:
                self.broken.add(self.indices[j], error)
                self.broken.check()
        raise TooManyBrokenRows(f"no row of data={self._rows.path} can be read: {self.broken}")

    def _encode(self, i: int) -> dict[str, Any]:
        conversation = self._parse(self.indices[i])
        ids, labels = encode(self._processor, conversation, self._max_length, self._unmerged_tokens)
        rows = {"input_ids": ids, "labels": labels}
        item: dict[str, Any] = {name: torch.tensor(row, device="cpu") for name, row in rows.items()}
        count = ids.count(self._processor.image_token_id)  # the others are cut off
        if count:
            images = [_read_image(file) for file in conversation.images[:count]]
            item["pixel_values"] = self._processor.image_processor(images, return_tensors="pt").pixel_values
        return item


def _read_image(file: Path) -> "Image.Image":
    try:
        return open_image(file)
    except ValueError as error:
        raise BrokenRow(f"image {file} cannot be read: {error}") from error


def json_rows(options: dict[str, Any]) -> tuple[JsonRows, Path]:
    """The rows of data=, and the folder that image names are relative to; embedded scenes are exported once.

    Raises:
        ValueError: data= is not a file of rows.
    """
    if options["data"] != EMBEDDED:
        file = Path(options["data"])
        return JsonRows(file), Path(options["images"] or file.parent)
    scenes = options["scenes"] or SCENES
    folder = Path(options["output"]).parent / f"embedded-{scenes}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # so that one process writes
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = folder / "conversations.json"
        if not file.exists():
            log.info("rendering %d scenes", scenes)
            export.write(folder, scenes)
    return JsonRows(file), folder


def make_dataset(
    options: dict[str, Any],
    configs: Sequence[MergeConfig],
    rows: JsonRows,
    folder: Path,
    processor: Any,
    model: nn.Module,
    arguments: Any,
) -> ConversationDataset:
    """The rows that can be trained on; the first process records the broken ones before the others start.

    Raises:
        ValueError: too many rows are broken, or labels cannot be aligned with the chat template.
    """
    parts = llava.find(model)
    file = Path(arguments.output_dir) / BROKEN
    merged_tokens = round(statistics.mean(image_tokens(config, parts) for config in configs))
    with arguments.main_process_first(local=False):
        if arguments.process_index == 0:
            log.info("checking %d rows", len(rows))
            if not options["resume"]:
                file.unlink(missing_ok=True)
        return ConversationDataset(
            rows,
            folder,
            processor,
            parts.patches + parts.num_feature_prefix_tokens,
            options["max_length"],
            BrokenRows(options["skip_broken"], file),
            merged_tokens,
        )


def image_tokens(config: MergeConfig, parts: Any) -> int:
    """Tokens of an image in the language model's prompt, class token included where the features hold it."""
    return config.tokens_at(parts.patches, parts.num_feature_layers) + parts.num_feature_prefix_tokens
