"""Large tables where they lie: files that are mapped, of which the rows that are asked for are in memory, no others.

What is mapped belongs to the system, which shares it between the processes of a machine and gives it up where memory is
short. A ``.npy`` file is mapped as it is. Text and Parquet have no rows that can be picked, so they are written out,
once, piece by piece, to the folder for temporary files, where other processes and later runs find them.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrnode.config import DataConfig
from pyrnode.data.arrays import array_tensor, bad_value, check_channels, check_levels, computable, constant_column
from pyrnode.data.frames import Names, said
from pyrnode.data.readers import NumpyReader, Reader
from pyrnode.data.samples import Batch, Samples
from pyrnode.errors import DataError

LARGE = 2**28
"""Bytes of a file from which on it is not read as a whole."""

_PIECE = 2**22
"""Bytes of samples that are looked at at a time."""


class MappedSamples(Samples):
    """Samples of a mapped file, read when they are asked for.

    Args:
        values: All samples of the file, ``(n, *event)``, in memory that is mapped.
        indices: Which of them belong to this set, in which order; default all.
    """

    def __init__(self, values: Tensor, indices: Tensor | None = None) -> None:
        self._values = values
        short = len(values) < 2**31  # indices are all that there is of it in memory
        self._indices = indices.int() if indices is not None and short else indices

    def __len__(self) -> int:
        return len(self._values) if self._indices is None else len(self._indices)

    def __repr__(self) -> str:
        kind = str(self._values.dtype).removeprefix("torch.")
        return f"MappedSamples({len(self)} of {tuple(self._values.shape)} {kind})"

    def _take(self, indices: Tensor) -> MappedSamples:
        return MappedSamples(self._values, self._rows(indices))

    def _rows(self, indices: Tensor) -> Tensor:
        """The rows of the file of some of the samples."""
        return indices if self._indices is None else self._indices[indices].long()

    def _batches(self, order: Tensor, batch_size: int, workers: int) -> Iterator[Tensor]:
        for chunk in order.split(batch_size):
            yield self._values[self._rows(chunk)]

    def pieces(self, number: int, of: int) -> Iterator[Batch]:
        """Every `of`-th piece of the samples from that `number` on, in the order of the file, which reads it once."""
        size = max(1, _PIECE // max(1, self._values[0].nbytes))
        every = torch.arange(len(self), device="cpu") if self._indices is None else self._indices.argsort()
        for rows in every.split(size)[number::of]:
            yield next(self.batches(rows, size))


def large(path: Path) -> bool:
    """Whether a file is not read as a whole."""
    return path.is_file() and path.stat().st_size > LARGE


def mapped(reader: Reader, config: DataConfig) -> Tensor | None:
    """All samples of a large file, mapped and checked; `None` where it must be read as a whole to be of use.

    Raises:
        DataError: As in `check_array`.
    """
    path, what = reader.path, str(reader.path)
    if isinstance(reader, NumpyReader):
        values = reader.mapped()
        usable = ("f4", "f8", "u1") if config.levels is None or config.levels <= 256 else ("f4", "f8")
        if values.dtype.str[1:] not in usable or not values.dtype.isnative:
            return None
        tensor = torch.from_numpy(values)
        tensor = tensor.unsqueeze(1) if tensor.ndim == 3 else tensor
        if tensor.ndim not in (2, 4) or (tensor.dtype == torch.uint8) != (
            tensor.ndim == 4 or config.levels is not None
        ):
            return None  # for the messages of who reads it as a whole
    elif config.levels is not None or (spooled := _spooled(path, reader, config)) is None:
        return None
    else:
        tensor = torch.from_numpy(spooled)
    _check(tensor, what, config.levels, said(reader.names))
    return tensor


def _check(values: Tensor, what: str, levels: int | None, names: Names | None) -> None:
    """`check_array`, piece by piece."""
    size = max(1, _PIECE // max(1, values[0].nbytes))
    if values.ndim == 4:
        check_channels(tuple(values.shape[1:]), what)
    varies = torch.zeros(values.shape[1:], dtype=torch.bool, device="cpu")
    for first in range(0, len(values), size):
        part = values[first : first + size]
        if part.dtype == torch.uint8:
            check_levels(part, what, levels or 256)
            continue
        if not computable(part):
            raise bad_value(part, what, names, first)
        varies |= (part != values[0]).any(0)
    if values.ndim == 2 and values.is_floating_point() and not bool(varies.all()):
        raise constant_column(values, int((~varies).nonzero()[0]), int((~varies).sum()), what, names)


# -- what has to be written out --------------------------------------------------------------------------------------


def _spooled(path: Path, reader: Reader, config: DataConfig) -> np.ndarray[Any, np.dtype[Any]] | None:
    """A table's numbers, written out and mapped; `None` where they are whole numbers, which are read as a whole."""
    size = 100_000
    first = next((values for _, values in reader.chunks(size)), None)
    if first is None or (first.dtype.kind != "f" and path.suffix == ".parquet"):
        return None
    dtype = np.dtype(np.float32 if first.dtype == np.float32 else np.float64)
    state = path.stat()
    key = (str(path.resolve()), state.st_size, state.st_mtime_ns, dtype.str, config.sep, config.decimal, config.header)
    place = _folder() / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.bin"
    columns = first.shape[1]
    if not place.is_file():
        part = place.with_name(f"{place.name}.{secrets.token_hex(8)}")
        try:
            with part.open("wb") as file:
                for _, values in reader.chunks(size):
                    array_tensor(values, str(path)).numpy().astype(dtype, copy=False).tofile(file)
            os.replace(part, place)
        except OSError as error:
            raise DataError(
                f"{path} is written out to {place.parent}, to be mapped, and that failed ({error.strerror or error}): "
                "name another folder with TMPDIR, or save it as .npy"
            ) from error
        finally:
            part.unlink(missing_ok=True)
    rows = place.stat().st_size // (columns * dtype.itemsize)
    return np.memmap(place, dtype, "c", 0, (rows, columns))


def _folder() -> Path:
    """The user's own folder for what is written out."""
    folder = Path(tempfile.gettempdir()) / f"pyrnode-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        raise DataError(f"{folder} is another user's: name another folder with TMPDIR")
    return folder
