"""One reader for each format of file, for training, which takes it whole, and for scoring, which takes it in chunks."""

from __future__ import annotations

from pathlib import Path

from pyrnode.config import DataConfig
from pyrnode.data.readers.base import WHOLE, Array, Part, Reader, TableReader, frame_array
from pyrnode.data.readers.delimited import DelimitedReader
from pyrnode.data.readers.numpy_files import NumpyReader, read_npz
from pyrnode.data.readers.parquet import ParquetReader

__all__ = [
    "SUFFIXES",
    "WHOLE",
    "Array",
    "DelimitedReader",
    "NumpyReader",
    "ParquetReader",
    "Part",
    "Reader",
    "TableReader",
    "frame_array",
    "kind",
    "open_file",
    "read_npz",
]

SUFFIXES = (".npy", ".csv", ".tsv", ".parquet", ".csv.gz", ".tsv.gz")
"""Files that `open_file` reads."""

_ANY = DataConfig()


def kind(path: Path) -> str:
    """The suffix of a file in lower case, with what was compressed: ``.csv.gz``."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() + suffix if suffix == ".gz" else suffix


def open_file(path: Path, config: DataConfig = _ANY) -> Reader:
    """Opens a file of one of the `SUFFIXES`.

    Args:
        path: The file.
        config: How a delimited file is to be read: ``sep``, ``decimal``, ``header``.

    Raises:
        DataError: It is missing, damaged or empty.
    """
    if kind(path) == ".npy":
        return NumpyReader(path)
    return ParquetReader(path) if kind(path) == ".parquet" else DelimitedReader(path, config)
