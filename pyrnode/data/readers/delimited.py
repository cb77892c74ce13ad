"""``.csv`` files: pandas turns the cells into numbers; what it would guess about columns and names is decided here."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

from pyrnode.data.readers.base import Array, TableReader, frame_array, reading
from pyrnode.errors import DataError

_BUFFER = 2**16
"""Bytes that pandas gets at a time; its own 256 kB are more than a chunk of most tables."""


class DelimitedReader(TableReader):
    """A ``.csv`` file.

    Args:
        path: The file.
        header: Whether the first line has the names of the columns; `None` takes it for names if it is not all numbers.

    Raises:
        DataError: It is empty, not text, or its first column has no name, as a row index has none.
    """

    def __init__(self, path: Path, *, header: bool | None = None) -> None:
        self.path = path
        with self._reading(), path.open(encoding="utf-8", newline="") as file:
            lines = _Lines(file)
            first = lines.next_fields()
            start = lines.bytes
            second = lines.next_fields()
        if first is None:
            raise DataError(f"{path} is empty")
        names = None
        self._start = 0  # where the first row begins, in bytes
        if header is True or (header is None and not all(map(_is_number, first))):
            names, self._start = tuple(first), start
            if not names[0].strip():
                raise DataError(
                    f"{path}: the first column has no name, so it is likely a row index; write the file without it "
                    "(pandas: index=False), or name it"
                )
            if second is not None and len(second) > len(first):
                raise DataError(
                    f"{path}: its rows have more fields than its line of names: {len(second)} and {len(first)}"
                )
        super().__init__(path, len(first), rows=None, names=names)

    def _reading(self) -> AbstractContextManager[None]:
        return reading(self.path, "cannot be read as comma-separated values")

    def chunks(self, size: int) -> Iterator[tuple[int, Array]]:
        import pandas as pd

        first = 0
        with self._reading(), self.path.open("rb") as file:
            file.seek(self._start)
            try:
                frames = pd.read_csv(
                    _Bytes(file),
                    header=None,
                    names=list(self.names or range(self.columns)),
                    skipinitialspace=True,
                    chunksize=size,
                    low_memory=False,  # else pandas guesses the type of a column several times in one chunk
                )
            except pd.errors.EmptyDataError:  # nothing but a line of names
                return
            for frame in frames:
                if not isinstance(frame.index, pd.RangeIndex):  # pandas took the first fields for names of the rows
                    raise DataError(f"{self.path}: its rows have more fields than its line of names")
                if len(frame):
                    yield first, frame_array(frame, str(self.path), first=first)
                    first += len(frame)


class _Lines:
    """The lines of a text, as lists of fields; counts the bytes that they had. Blank lines are passed over."""

    def __init__(self, file: IO[str]) -> None:
        self.bytes = 0
        self._fields = csv.reader(self._counted(file), skipinitialspace=True)

    def _counted(self, file: IO[str]) -> Iterator[str]:
        for line in file:
            text = line if self.bytes else line.removeprefix("\ufeff")  # the mark that Windows begins a file with
            self.bytes += len(line.encode())
            yield text

    def next_fields(self) -> list[str] | None:
        return next((fields for fields in self._fields if fields), None)


class _Bytes:
    """A binary file as pandas takes it without decoding it first, which would cost twice the time and memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        return self._file.read(min(size, _BUFFER))

    def __iter__(self) -> Iterator[bytes]:  # pandas asks whether it is there
        return iter(self._file)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
