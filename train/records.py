"""The rows of a JSON array or a JSONL file, each read when it is asked for.

A file of LLaVA's is a gigabyte of JSON in one array. It is mapped into memory, looked through once for where
its rows begin and end, and never parsed as a whole.
"""

import json
import mmap
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PIECES = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)  # strings, so that theirs do not count
BLANKS = re.compile(rb"[\s,]*")


class Records:
    """A sequence of rows; `rows[i]` parses one.

    Rows that are no JSON raise ValueError where they are asked for, not here.
    """

    def __init__(self, path: Path):
        """Finds the rows.

        Args:
            path: of a JSON array, or of JSON objects, one a line.

        Raises:
            ValueError: there is no such file, it is empty, or its brackets do not close.
        """
        self.path = path
        if not path.is_file():
            raise ValueError(f"data={path} is no file; it must be a JSON or JSONL of conversations")
        if not path.stat().st_size:
            raise ValueError(f"data={path} is empty")
        self._map()
        self._starts, self._ends = array("Q"), array("Q")
        first = BLANKS.match(self._bytes).end()
        for start, end in self._array() if self._bytes[first : first + 1] == b"[" else self._lines():
            self._starts.append(start)
            self._ends.append(end)
        if not self._starts:
            raise ValueError(f"data={path} holds no rows")

    def _map(self) -> None:
        with self.path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __getstate__(self) -> dict[str, Any]:
        """A process that is started for loading maps the file by itself."""
        return {k: v for k, v in vars(self).items() if k != "_bytes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Maps the file again."""
        vars(self).update(state)
        self._map()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> Any:
        """Row i, parsed.

        Raises:
            ValueError: it is no JSON.
        """
        return json.loads(self._bytes[self._starts[i] : self._ends[i]])

    def _lines(self) -> Iterator[tuple[int, int]]:
        """Where the lines begin and end that are not blank."""
        start = 0
        while start < len(self._bytes):
            end = self._bytes.find(b"\n", start)
            end = len(self._bytes) if end < 0 else end
            if self._bytes[start:end].strip():
                yield start, end
            start = end + 1

    def _array(self) -> Iterator[tuple[int, int]]:
        """Where the objects of one array begin and end."""
        depth = start = behind = 0
        for piece in PIECES.finditer(self._bytes):
            mark = piece[0]
            if mark in (b"[", b"{"):
                depth += 1
                if depth <= 2:
                    start = piece.start()
                    self._only_blanks(behind, start)
                    behind = piece.end()
            elif mark in (b"]", b"}"):
                depth -= 1
                if depth <= 1:
                    behind = piece.end()
                if depth == 1:
                    yield start, behind
                if depth == 0:
                    break
        if depth:
            raise ValueError(f"data={self.path} ends within its array: is it whole?")
        self._only_blanks(behind, len(self._bytes))

    def _only_blanks(self, start: int, end: int) -> None:
        """Raises ValueError for anything but blanks and commas between rows."""
        at = BLANKS.match(self._bytes, start).end()
        if at < end:
            found = self._bytes[at : min(end, at + 20)].decode(errors="replace")
            raise ValueError(f"data={self.path} is no array of objects: byte {at} begins {found!r}")
