"""``.csv`` and ``.tsv`` files: pandas turns cells into numbers; what it would guess, `dialect` decides."""

from __future__ import annotations

import gzip
import io
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from pyrnode.config import DataConfig
from pyrnode.data.readers.base import WHOLE, Array, Part, TableReader, frame_array, not_a_number, reading
from pyrnode.data.readers.dialect import MISSING, SEPARATORS, Row, fields, hint, length_of_first, recognise
from pyrnode.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

_BUFFER = 2**16
"""Bytes that pandas gets at a time; its own 256 kB are more than a chunk of most tables."""

_HEAD_LINES, _HEAD_CHARACTERS = 100, 2**15
"""How much of a file is looked at to recognise its dialect; but always three lines."""

_BLOCK = 2**20
"""Bytes that are looked through at a time for line ends."""

_LONGEST_LINE = 2**26
"""Characters of a line; a file without line ends would be read into memory whole."""


class DelimitedReader(TableReader):
    """A ``.csv`` or ``.tsv`` file, or one compressed by gzip.

    No column is ever an index. A row that is shorter than the first has empty places, a longer one is an error.

    Args:
        path: The file.
        config: ``sep``, ``decimal`` and ``header``, where the file leaves them open.

    Raises:
        DataError: It is empty, not text in UTF-8, can be read in two ways, or has columns that share or lack a name.
    """

    def __init__(self, path: Path, config: DataConfig) -> None:
        self.path, self._separated = path, "comma"
        if path.name.lower().endswith((".tsv", ".tsv.gz")) and config.sep == "auto":
            config = DataConfig(sep="\t", decimal=config.decimal, header=config.header)
        with self._reading(), self._open() as file:
            head = _Head(file, path, blank=" \t\r\n" if config.sep == " " else " \r\n")
        if not head.lines:
            raise DataError(f"{path} is empty")
        with self._reading():
            self.dialect = recognise(head.lines, config, str(path))
            rows = fields(head.lines, self.dialect.sep)
        self._separated = SEPARATORS[self.dialect.sep]
        self._start, self._line = 0, 0  # where the rows begin: bytes, and lines before them
        if self.dialect.header:
            self._start, self._line = head.ends[length_of_first(head.lines, self.dialect.sep) - 1]
        names = self._names(rows[0], rows[1:]) if self.dialect.header else None
        super().__init__(path, len(rows[0]), rows=None, names=names)

    def _names(self, first: Row, body: list[Row]) -> tuple[str, ...] | None:
        names = [name.strip() for name in first]
        if not names[0]:
            raise DataError(
                f"{self.path}: the first column has no name, so it is likely a row index; write the file without it "
                "(pandas: index=False), or name it"
            )
        if body and len(body[0]) > len(names):
            end = f", and end in {self.dialect.sep!r}" if body[0][-1] == "" else ""
            raise DataError(
                f"{self.path}: its rows have more fields than its line of names: {len(body[0])}{end}, and {len(names)} "
                f"(read with {self.dialect}). A row index needs a name, or to be left out (pandas: index=False); a "
                "decimal comma needs another separator, or decimal=','"
            )
        for i, name in enumerate(names):
            if not name:
                raise DataError(
                    f"{self.path}: column {i} has no name; if its lines end in {self.dialect.sep!r}, remove that"
                )
            if name in names[:i]:
                raise DataError(f"{self.path}: columns {names.index(name)} and {i} are both called {name!r}")
        return tuple(names)

    def about(self) -> int | None:
        """The lines after that of names, blank ones too."""
        with self._reading(), self._open() as file:
            file.seek(self._start)
            lines, last = 0, b"\n"
            while block := file.read(_BLOCK):
                lines, last = lines + block.count(b"\n"), block[-1:]
        return lines + (last != b"\n")

    def _open(self) -> IO[bytes]:
        compressed = self.path.suffix.lower() == ".gz"
        return cast("IO[bytes]", gzip.open(self.path, "rb")) if compressed else self.path.open("rb")

    def _reading(self) -> AbstractContextManager[None]:
        return reading(self.path, f"cannot be read as {self._separated}-separated values")

    def chunks(self, size: int, part: Part = WHOLE) -> Iterator[tuple[int, Array]]:
        import pandas as pd

        first = 0
        with self._reading(), self._open() as file:
            file.seek(self._start)
            try:
                for number, frame in enumerate(self._frames(file, size)):
                    if not isinstance(frame.index, pd.RangeIndex):  # pandas took the first fields for names of the rows
                        raise DataError(f"{self.path}: its rows have more fields than its first line")
                    if len(frame) and part.has(number):  # a file with nothing but names gives an empty one
                        yield first, self._array(frame, first)
                    first += len(frame)
            except pd.errors.EmptyDataError:  # nothing but a line of names
                return
            except pd.errors.ParserError as error:
                raise self._failed(error) from error
            except UnicodeDecodeError as error:
                raise not_utf8(self.path, error) from error

    def _frames(self, file: IO[bytes], size: int) -> Iterator[pd.DataFrame]:
        import pandas as pd

        return cast(
            "Iterator[pd.DataFrame]",
            pd.read_csv(
                _Bytes(file),
                sep=r"\s+" if self.dialect.sep == " " else self.dialect.sep,
                decimal=self.dialect.decimal,
                header=None,
                names=list(range(self.columns)),
                na_values=sorted(MISSING),
                keep_default_na=False,
                skipinitialspace=True,
                chunksize=size,
                low_memory=False,  # else pandas guesses the type of a column several times in one chunk
            ),
        )

    def _array(self, frame: pd.DataFrame, first: int) -> Array:
        for i in range(self.columns):
            if frame[i].dtype.kind not in "iuf":
                frame[i] = self._numbers(list(frame[i].array), first, i)
        return frame_array(frame, str(self.path), first=first)

    def _numbers(self, cells: list[Any], first: int, column: int) -> Array:
        """A column that pandas did not take for numbers: some have more digits than it knows, others are none."""
        values = np.empty(len(cells))
        for row, cell in enumerate(cells):
            text = str(cell).strip()
            if text in MISSING:
                values[row] = np.nan
            elif self.dialect.number(text):
                values[row] = float(text.replace(self.dialect.decimal, "."))
            else:
                name = self.names[column] if self.names else str(column)
                more = f" (read with {self.dialect}; {hint(text, self.dialect)})"
                raise not_a_number(str(self.path), first + row, name, cell, more)
        return values

    def _failed(self, error: Exception) -> DataError:
        failure = f"{self.path} cannot be read as {self._separated}-separated values"
        if found := re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", str(error)):
            expected, line, saw = map(int, found.groups())
            return DataError(f"{failure}: line {self._line + line} has {saw} fields, not {expected} ({self.dialect})")
        return DataError(f"{failure} ({' '.join(str(error).split())})")


class _Head:
    """The first lines of a file, without blank ones: those that have none but the `blank` characters.

    Attributes:
        lines: The lines, as text.
        ends: Where each of them ends: bytes, and lines with the blank ones.
    """

    def __init__(self, file: IO[bytes], path: Path, *, blank: str) -> None:
        self.lines: list[str] = []
        self.ends: list[tuple[int, int]] = []
        size = number = 0
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        try:
            while len(self.lines) < 3 or (size < _HEAD_CHARACTERS and len(self.lines) < _HEAD_LINES):
                line = text.readline(_LONGEST_LINE)
                if not line:
                    break
                if len(line) == _LONGEST_LINE or "\0" in line:
                    raise not_utf8(path, "its first lines have no end" if "\0" not in line else "it has zero bytes")
                size, number = size + len(line.encode()), number + 1
                if number == 1:
                    line = line.removeprefix("\ufeff")  # the mark that Windows begins a file with
                if line.strip(blank):
                    self.lines.append(line)
                    self.ends.append((size, number))
        except UnicodeDecodeError as error:
            raise not_utf8(path, error) from error
        finally:
            text.detach()


def not_utf8(path: Path, problem: object) -> DataError:
    """The error of a file that is no text in UTF-8; says what it is by its first bytes, or likely is."""
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start[:2]:
        remedy = f"it is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {path.name}"
    elif start.startswith((b"\x1f\x8b", b"PK", b"PAR1")):
        kind = {b"\x1f": "is compressed by gzip: name it .csv.gz", b"PK": "is an Excel or zip file: save it as text"}
        remedy = "it " + kind.get(start[:1], kind.get(start[:2], "is a parquet file: name it .parquet"))
    else:
        remedy = (
            f"it is not text in UTF-8: {problem}. If it is in Latin-1 (Windows-1252), convert it: "
            f"iconv -f WINDOWS-1252 -t UTF-8 {path.name}"
        )
    return DataError(f"{path} cannot be read as comma-separated values: {remedy}")


class _Bytes:
    """A binary file as pandas takes it without decoding it first, which would cost twice the time and memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        return self._file.read(min(size, _BUFFER))

    def __iter__(self) -> Iterator[bytes]:  # pandas asks whether it is there
        return iter(self._file)
