"""Training data: the rows of a JSON file, which of them are broken, and the dataset for the Trainer."""

import fcntl
import json
import logging
import mmap
import re
import statistics
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from llava_pitome import MergeConfig
from llava_pitome.models import hf_llava as llava
from train import export
from train.conversation import BrokenRow, Conversation, encode, parse_row
from train.options import EMBEDDED, SCENES

log = logging.getLogger("train.data")
STRING_OR_BRACKET = re.compile(
    rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL
)  # brackets in strings are text
BLANKS = re.compile(rb"[\s,]*")
MAX_NAMED = 20  # broken rows in a message; the file names all
MAX_ENCODED = 100  # rows of which the longest is encoded before training
BROKEN = "broken.jsonl"  # in the output folder


class TooManyBrokenRows(ValueError):
    """More rows are broken than may be left out."""


class JsonRows(Sequence):
    """The rows of a JSON array or a JSONL file; `rows[i]` decodes one.

    The file, a gigabyte in LLaVA's case, is scanned once for where its rows are, and never decoded whole.
    The JSON loader of `datasets` decodes an array as a whole, and refuses a file for one malformed row.
    """

    def __init__(self, path: Path):
        """Locates the rows; a malformed one raises ValueError when it is read, not here.

        Args:
            path: of a JSON array of objects, or of JSON objects, one per line.

        Raises:
            ValueError: the file is missing, empty, or its brackets do not match.
        """
        self.path = path
        if not path.is_file():
            raise ValueError(f"data={path} is not a file; it must be a JSON or JSONL of conversations")
        if not path.stat().st_size:
            raise ValueError(f"data={path} is empty")
        self._starts, self._ends = array("Q"), array("Q")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            first = BLANKS.match(text).end()
            for start, end in self._array(text) if text[first : first + 1] == b"[" else _lines(text):
                self._starts.append(start)
                self._ends.append(end)
        if not self._starts:
            raise ValueError(f"data={path} has no rows")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> Any:
        """Row i, decoded.

        Raises:
            ValueError: it is not JSON.
        """
        with self.path.open("rb") as file:
            file.seek(self._starts[i])
            return json.loads(file.read(self._ends[i] - self._starts[i]))

    def _array(self, text: mmap.mmap) -> Iterator[tuple[int, int]]:
        """The spans of the objects in one array."""
        depth = start = last = 0
        for match in STRING_OR_BRACKET.finditer(text):
            if match[0] in (b"[", b"{"):
                depth += 1
                if depth <= 2:
                    start = match.start()
                    self._check_blank(text, last, start)
                    last = match.end()
            elif match[0] in (b"]", b"}"):
                depth -= 1
                if depth <= 1:
                    last = match.end()
                if depth == 1:
                    yield start, last
                if depth == 0:
                    break
        if depth:
            raise ValueError(f"data={self.path} ends within its array: the file is incomplete")
        self._check_blank(text, last, len(text))

    def _check_blank(self, text: mmap.mmap, start: int, end: int) -> None:
        """Raises ValueError for anything but blanks and commas between rows."""
        start = BLANKS.match(text, start).end()
        if start < end:
            found = text[start : min(end, start + 20)].decode(errors="replace")
            raise ValueError(f"data={self.path} is not an array of objects: at byte {start} is {found!r}")


def _lines(text: mmap.mmap) -> Iterator[tuple[int, int]]:
    """The spans of the lines that are not blank."""
    start = 0
    while line := text.readline():
        if line.strip():
            yield start, start + len(line)
        start += len(line)


class BrokenRows:
    """The rows that are left out and why, in a file that all processes of a run share."""

    def __init__(self, allowed: int, file: Path, is_first: bool = True):
        """Reads the rows that the file already names.

        Args:
            allowed: rows that all processes together may leave out.
            file: JSON objects, one per line and row.
            is_first: whether this process records the rows that every process finds.
        """
        self._allowed, self._file, self._is_first = allowed, file, is_first
        self._reasons: dict[int, str] = {}
        self._read()

    def __contains__(self, row: int) -> bool:
        return row in self._reasons

    def __len__(self) -> int:
        self._read()
        return len(self._reasons)

    def __str__(self) -> str:
        """The first rows, each with its reason."""
        return "; ".join(f"row {row}: {why}" for row, why in sorted(self._reasons.items())[:MAX_NAMED])

    def add(self, row: int, error: ValueError, found_by_all: bool = False) -> None:
        """Leaves a row out.

        Args:
            row: its index in the file of rows.
            error: what is wrong with it.
            found_by_all: whether every process finds it, so that one of them alone records it.
        """
        if row in self._reasons:
            return
        self._reasons[row] = str(error)
        if found_by_all and not self._is_first:
            return
        if len(self._reasons) <= min(self._allowed, MAX_NAMED):
            log.warning("row %d is left out: %s", row, error)
        with self._file.open("a") as file:
            file.write(json.dumps({"row": row, "why": str(error)}) + "\n")

    def check(self) -> None:
        """Raises TooManyBrokenRows if more rows are broken than allowed."""
        if len(self) > self._allowed:
            raise TooManyBrokenRows(
                f"{len(self)} rows are broken, skip_broken={self._allowed} are allowed: {self}; all are "
                f"named in {self._file}"
            )

    def _read(self) -> None:
        """Adds the rows that other processes have recorded."""
        if self._file.exists():
            for line in self._file.read_text().splitlines(keepends=True):
                if line.endswith("\n"):  # else it is being written
                    found = json.loads(line)
                    self._reasons.setdefault(found["row"], found["why"])


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
        """Parses every row once, and checks that its images exist.

        Args:
            rows: the file's.
            folder: image names are relative to it.
            processor: the model's.
            unmerged_tokens: of an image, for `max_length`.
            max_length: tokens of a row, images included; the rest is cut off.
            broken: records the rows that are left out.
            image_tokens: of an image after merging, for `lengths`; by default unmerged.

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
                broken.add(i, error, found_by_all=True)
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
        item: dict[str, Any] = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
        count = ids.count(self._processor.image_token_id)  # the others are cut off
        if count:
            images = [_read_image(file) for file in conversation.images[:count]]
            item["pixel_values"] = self._processor.image_processor(images, return_tensors="pt").pixel_values
        return item


def _read_image(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # as pillow raises
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
    """The rows that can be trained on; process 0 starts a new list of the broken ones, except on resume.

    Raises:
        ValueError: too many rows are broken, or labels cannot be aligned with the chat template.
    """
    parts, is_first = llava.find(model), arguments.process_index == 0
    file = Path(arguments.output_dir) / BROKEN
    with arguments.main_process_first(local=False):
        if is_first and not options["resume"]:
            file.unlink(missing_ok=True)
    log.info("checking %d rows", len(rows))
    return ConversationDataset(
        rows,
        folder,
        processor,
        parts.patches + parts.front,
        options["max_length"],
        BrokenRows(options["skip_broken"], file, is_first),
        round(statistics.mean(image_tokens(config, parts) for config in configs)),
    )


def image_tokens(config: MergeConfig, parts: Any) -> int:
    """Tokens of an image in the language model's prompt, class token included where the features hold it."""
    return config.tokens_at(parts.patches, parts.feature) + parts.front
