"""The rows of a JSON file, and which of them are broken."""

import json
import logging
import mmap
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger("train.rows")
STRING_OR_BRACKET = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
BLANKS = re.compile(rb"[\s,]*")
MAX_NAMED = 20  # broken rows in a message; the file names all


class TooManyBrokenRows(ValueError):
    """More rows are broken than may be left out."""


class JsonRows(Sequence):
    """The rows of a JSON array or a JSONL file; `rows[i]` decodes one.

    The file, a gigabyte in LLaVA's case, is scanned once for where its rows are, and never decoded whole.
    The JSON loader of `datasets` decodes an array as a whole, and refuses a file for one malformed row.
    """

    def __init__(self, path: Path):
        """Locates the rows in an array of objects, or in lines; malformed ones raise when they are read.

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

    def __init__(self, allowed: int, file: Path):
        """Reads the rows that the JSONL file names already; all processes may leave out `allowed` rows."""
        self._allowed, self._file = allowed, file
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

    def add(self, row: int, error: ValueError) -> None:
        """Leaves a row out, by its index in the file of rows, because of an error."""
        if row in self._reasons:
            return
        self._reasons[row] = str(error)
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
