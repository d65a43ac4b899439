"""Rows that cannot be trained on: named in a file that all processes of a run share, and counted."""

import json
import logging
from pathlib import Path

from train.stops import TooManyBroken

log = logging.getLogger("train.broken")
TOLD = 20  # rows that are named in messages; the file names all


class Broken:
    """Why which rows are left out, up to a limit."""

    def __init__(self, tolerated: int, file: Path, first: bool = True):
        """Takes up what the file holds.

        Args:
            tolerated: rows that may be left out by all processes together.
            file: a JSON line a row.
            first: whether this process is the one that names what every process finds.
        """
        self._tolerated, self._file, self._first = tolerated, file, first
        self._rows: dict[int, str] = {}
        self._read = 0
        self._refresh()

    def __contains__(self, row: int) -> bool:
        return row in self._rows

    def __len__(self) -> int:
        self._refresh()
        return len(self._rows)

    def add(self, row: int, why: ValueError, by_all: bool = False) -> None:
        """Leaves a row out.

        Args:
            row: its index in the file.
            why: what is wrong with it.
            by_all: whether every process finds this, so that one alone names it.
        """
        if row in self._rows:
            return
        self._rows[row] = str(why)
        if by_all and not self._first:
            return
        if len(self._rows) <= min(self._tolerated, TOLD):
            log.warning("row %d is left out: %s", row, why)
        with self._file.open("a") as file:
            file.write(json.dumps({"row": row, "why": str(why)}) + "\n")

    def check(self) -> None:
        """Raises TooManyBroken where more rows are broken than allowed."""
        if len(self) > self._tolerated:
            raise TooManyBroken(
                f"{len(self)} rows are broken, skip_broken={self._tolerated} are allowed: {self.told()}; "
                f"all are named in {self._file}"
            )

    def told(self) -> str:
        """The first rows and what is wrong with them."""
        return "; ".join(f"row {row}: {why}" for row, why in sorted(self._rows.items())[:TOLD])

    def _refresh(self) -> None:
        """Reads what other processes have found."""
        if not self._file.exists():
            return
        with self._file.open() as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith("\n"):
                    break  # being written
                self._read += len(line.encode())
                found = json.loads(line)
                self._rows.setdefault(found["row"], found["why"])
