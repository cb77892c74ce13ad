"""One reader for each format of file, for training, which takes it whole, and for scoring, which takes it in chunks."""

from __future__ import annotations

from pathlib import Path

from pyrnode.data.readers.base import Array, Reader, TableReader, frame_array
from pyrnode.data.readers.delimited import DelimitedReader
from pyrnode.data.readers.numpy_files import NumpyReader, read_npz
from pyrnode.data.readers.parquet import ParquetReader

__all__ = [
    "SUFFIXES",
    "Array",
    "DelimitedReader",
    "NumpyReader",
    "ParquetReader",
    "Reader",
    "TableReader",
    "frame_array",
    "open_file",
    "read_npz",
]

SUFFIXES = (".npy", ".csv", ".parquet")
"""Files that `open_file` reads."""


def open_file(path: Path) -> Reader:
    """Opens a file of one of the `SUFFIXES`.

    Raises:
        DataError: It is missing, damaged or empty.
    """
    readers: dict[str, type[NumpyReader] | type[DelimitedReader] | type[ParquetReader]] = {
        ".npy": NumpyReader,
        ".csv": DelimitedReader,
        ".parquet": ParquetReader,
    }
    return readers[path.suffix.lower()](path)
