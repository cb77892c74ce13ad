"""``.npy`` and ``.npz`` files. Python objects in them are refused, not unpickled: that can run code."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from pyrnode.data.readers.base import WHOLE, Array, Part, Reader, reading
from pyrnode.errors import DataError

_MAGIC = np.lib.format.MAGIC_PREFIX
_RATIO, _SMALL = 100, 2**26
"""How many times its size an archive may hold, and how many bytes of any: more is no data (deflate: 1032)."""


class NumpyReader(Reader):
    """A ``.npy`` file, which is mapped: what is not asked for is not read.

    Raises:
        DataError: It is not one of numbers, truncated, or has fewer than two axes.
    """

    def __init__(self, path: Path) -> None:
        with _reading(path), path.open("rb") as file:
            shape, order, dtype = _header(file, path.stat().st_size)
            self._array: Array
            self._start, self._order = file.tell(), order
            if math.prod(shape):
                self._array = np.memmap(path, dtype, "r", file.tell(), shape, order)
            else:  # nothing cannot be mapped
                self._array = np.empty(shape, dtype)
        if self._array.ndim < 2:
            raise DataError(
                f"{path} has shape {self._array.shape}: expected (n, d), or (n, H, W) or (n, C, H, W) for images; for "
                "one feature, reshape it to (n, 1)"
            )
        super().__init__(path, rows=len(self._array), names=None)

    def chunks(self, size: int, part: Part = WHOLE) -> Iterator[tuple[int, Array]]:
        for first in range(part.number * size, len(self._array), part.of * size):
            yield first, self._array[first : first + size]

    def whole(self) -> Array:
        return np.array(self._array)

    def mapped(self) -> Array:
        """All samples, in memory that is mapped; what is written to it stays in this process."""
        return np.memmap(self.path, self._array.dtype, "c", self._start, self._array.shape, self._order)


def read_npz(path: Path) -> dict[str, Array]:
    """The arrays of a ``.npz`` file by name, in memory."""
    with _reading(path), path.open("rb") as file:
        single = file.read(len(_MAGIC)) == _MAGIC
    if single:
        return {"": NumpyReader(path).whole()}
    with _reading(path), zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        if sum(info.file_size for info in infos) > _RATIO * path.stat().st_size + _SMALL:
            raise ValueError("it claims to hold many times what it has compressed")
        return {info.filename.removesuffix(".npy"): _member(archive, info) for info in infos}


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    """An array of an archive, for which as much is allocated as is there."""
    with archive.open(info) as file:
        content = io.BytesIO(file.read(info.file_size + 1))
    size = content.getbuffer().nbytes
    if size > info.file_size:
        raise ValueError(f"{info.filename} is longer than it claims")
    shape, order, dtype = _header(content, size)
    return np.ndarray(shape, dtype, content.getbuffer(), content.tell(), order=order).copy()


def _header(file: IO[bytes], size: int) -> tuple[tuple[int, ...], Any, np.dtype[Any]]:
    """Shape, order and type of the array in a file, once it is there in full and of numbers."""
    start = file.read(len(_MAGIC))
    if start and start != _MAGIC:
        raise ValueError("no numpy file")
    file.seek(0)
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of the format, which is for names of fields")
    try:
        shape, fortran, dtype = read(file)
    except MemoryError as error:  # Python's parser, of brackets in brackets
        raise ValueError("its header is no description of an array") from error
    if dtype.hasobject:
        raise ValueError("Python objects")
    if (
        dtype.itemsize == 0
        or any(length < 0 for length in shape)
        or math.prod(shape) * dtype.itemsize > size - file.tell()
    ):
        raise ValueError(f"shape {shape} of {dtype} is more than the {size - file.tell()} bytes that follow")
    return shape, "F" if fortran else "C", dtype


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    kind = f"{path.suffix.lower()} file of numbers"
    try:
        with reading(path, f"cannot be read: it is not a {kind}, or truncated"):
            yield
    except DataError as error:
        if any(said in str(error.__cause__) for said in ("Python objects", "no numpy file")):
            raise DataError(
                f"{path} is not a {kind}: it is not a numpy file, or holds Python objects, which pyrnode does not "
                "unpickle; save numbers"
            ) from error
        raise
