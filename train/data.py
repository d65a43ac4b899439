"""The training data: rows of conversations as the dataset that the Trainer reads."""

import fcntl
import logging
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from llava_pitome import MergeConfig
from llava_pitome.image_io import image_size, open_image
from llava_pitome.models import hf_llava as llava
from train import export
from train.collator import image_inputs
from train.conversation import BrokenRow, Conversation, encode, parse_row
from train.image_counts import UNMERGED, ImageCounts, Size
from train.options import EMBEDDED_DATA, MAX_LENGTH, MAX_LENGTH_TILED, SCENES
from train.rows import BrokenRows, JsonRows, TooManyBrokenRows

log = logging.getLogger("train.data")
MAX_ENCODED = 100  # rows of which the longest is encoded before training
BROKEN = "broken.jsonl"  # in the output folder


class ConversationDataset(Dataset):
    """The rows that can be trained on, as ids, labels and pixel values.

    Attributes:
        indices: of these rows in the file.
        lengths: the approximate number of tokens of each, its images merged.
        broken: the other rows.
        grey_size: height and width of the image that batches of text alone are given.
    """

    def __init__(
        self,
        rows: JsonRows,
        folder: Path,
        processor: Any,
        counts: ImageCounts,
        max_length: int,
        broken: BrokenRows,
        configs: Sequence[MergeConfig] = (UNMERGED,),
    ):
        """Parses every row once, and checks that its images, with names relative to `folder`, exist.

        Where the model cuts images into tiles, their sizes are read too, from the headers of their files.

        Args:
            rows: of a file.
            folder: of the images.
            processor: the model's.
            counts: of the model's image tokens.
            max_length: tokens of a row, images unmerged; the rest is cut off.
            broken: records the rows that are left out.
            configs: of the run; `lengths` are means over them.

        Raises:
            TooManyBrokenRows: more than allowed, or all.
            ValueError: a config's budget does not fit an image, or the processor has no chat template that
                labels can be aligned with.
        """
        self._rows, self._folder, self._processor = rows, folder, processor
        self._counts, self._max_length, self.broken = counts, max_length, broken
        self.indices: list[int] = []
        self.lengths: list[int] = []
        alone: dict[Size, None] = {}  # sizes of images that are alone in their prompt
        num_long = 0
        for i in range(len(rows)):
            try:
                conversation = self._parse(i)
                sizes = self._sizes(conversation)
                unmerged = sum(self._tokens(conversation, sizes, [UNMERGED]))
            except BrokenRow as error:
                broken.add(i, error)
                continue
            merged = sum(self._tokens(conversation, sizes, configs))
            self.indices.append(i)
            self.lengths.append(conversation.length(round(merged)))
            num_long += unmerged > max_length
            if len(sizes) == 1:
                alone[sizes[0]] = None
        broken.check()
        if not self.indices:
            raise TooManyBrokenRows(f"every row of data={rows.path} is broken: {broken}")
        if num_long:
            log.warning(
                "%d rows have images of more than max_length=%d tokens without merging, which are cut off",
                num_long,
                max_length,
            )
        self.grey_size = counts.grey_size(configs, list(alone))
        longest = max(range(min(len(self), MAX_ENCODED)), key=self.lengths.__getitem__)
        self._encode_text(self._parse(self.indices[longest]))  # to raise early

    def _parse(self, i: int) -> Conversation:
        try:
            row = self._rows[i]
        except ValueError as error:
            raise BrokenRow(f"it is not JSON: {error}") from error
        return parse_row(row, self._folder)

    def _sizes(self, conversation: Conversation) -> list[Size]:
        """The sizes of its images, where the model needs them; else all are (0, 0)."""
        if self._counts.tiling is None:
            return [(0, 0)] * len(conversation.images)
        return [_read(image_size, file) for file in conversation.images]

    def _tokens(
        self, conversation: Conversation, sizes: Sequence[Size], configs: Sequence[MergeConfig]
    ) -> list[float]:
        """The tokens of each of a row's images, as a mean over merge configs.

        Raises:
            BrokenRow: an image fits none of the model's grids of tiles.
            ValueError: a budget does not fit an image.
        """
        found = []
        for file, size in zip(conversation.images, sizes):
            what = f"image {file} of {size[1]} x {size[0]} pixels"
            try:
                layout = self._counts.layout(size, len(sizes) == 1)
            except ValueError as error:
                raise BrokenRow(f"{what} cannot be cut into tiles: {error}") from error
            try:
                found.append(statistics.fmean(self._counts.tokens(config, layout) for config in configs))
            except ValueError as error:
                raise ValueError(f"{what}: {error}") from error
        return found

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
        images = [_read(open_image, file) for file in conversation.images]
        ids, labels = self._encode_text(conversation, [(image.height, image.width) for image in images])
        rows = {"input_ids": ids, "labels": labels}
        item: dict[str, Any] = {name: torch.tensor(row, device="cpu") for name, row in rows.items()}
        count = ids.count(self._processor.image_token_id)  # the others are cut off
        if count:
            item |= image_inputs(self._processor, images[:count])
        return item

    def _encode_text(
        self, conversation: Conversation, sizes: Sequence[Size] | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids and labels; `sizes` are those of the images as they were opened, by default by their headers.

        In models that encode an image alone in its prompt otherwise than several, a row of which only the
        first of several images would be left ends before it.
        """
        sizes = self._sizes(conversation) if sizes is None else sizes
        image_tokens = [int(n) for n in self._tokens(conversation, sizes, [UNMERGED])]
        ids, labels = encode(self._processor, conversation, self._max_length, image_tokens)
        placeholder, tiling = self._processor.image_token_id, self._counts.tiling
        if tiling is not None and tiling.has_single_tiles and ids.count(placeholder) == 1 < len(sizes):
            end = ids.index(placeholder)
            return ids[:end], labels[:end]
        return ids, labels


def _read(read: Callable[[Path], Any], file: Path) -> Any:
    """What `read` makes of an image's file.

    Raises:
        BrokenRow: it cannot be read.
    """
    try:
        return read(file)
    except ValueError as error:
        raise BrokenRow(f"image {file} cannot be read: {error}") from error


def json_rows(options: dict[str, Any]) -> tuple[JsonRows, Path]:
    """The rows of data=, and the folder that image names are relative to; embedded scenes are exported once.

    Raises:
        ValueError: data= is not a file of rows.
    """
    if options["data"] not in EMBEDDED_DATA:
        file = Path(options["data"])
        return JsonRows(file), Path(options["images"] or file.parent)
    scenes = options["scenes"] or SCENES
    folder = Path(options["output"]).parent / f"{options['data']}-{scenes}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # so that one process writes
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = folder / "conversations.json"
        if not file.exists():
            log.info("rendering %d scenes", scenes)
            export.write(folder, scenes, model=options["data"])
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
        ValueError: too many rows are broken, a budget does not fit an image, or labels cannot be aligned with
            the chat template.
    """
    file = Path(arguments.output_dir) / BROKEN
    with arguments.main_process_first(local=False):
        if arguments.process_index == 0:
            log.info("checking %d rows", len(rows))
            if not options["resume"]:
                file.unlink(missing_ok=True)
        return ConversationDataset(
            rows,
            folder,
            processor,
            ImageCounts.of(llava.find(model)),
            options["max_length"] or _max_length(model),
            BrokenRows(options["skip_broken"], file),
            configs,
        )


def _max_length(model: nn.Module) -> int:
    """Tokens of a row by default."""
    llm = llava.find(model).llava
    return MAX_LENGTH if llm.tiling is None else min(llm.llm.config.max_position_embeddings, MAX_LENGTH_TILED)
