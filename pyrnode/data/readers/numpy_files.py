"""``.npy`` and ``.npz`` files. Python objects in them are refused, not unpickled: that can run code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pyrnode.data.readers.base import Array, Reader, reading
from pyrnode.errors import DataError


class NumpyReader(Reader):
    """A ``.npy`` file, which is mapped: what is not asked for is not read.

    Raises:
        DataError: It is not one of numbers, truncated, or has fewer than two axes.
    """

    def __init__(self, path: Path) -> None:
        with _reading(path):
            self._array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
        if self._array.ndim < 2:
            raise DataError(
                f"{path} has shape {self._array.shape}: expected (n, d), or (n, H, W) or (n, C, H, W) for images; for "
                "one feature, reshape it to (n, 1)"
            )
        super().__init__(path, rows=len(self._array), names=None)

    def chunks(self, size: int) -> Iterator[tuple[int, Array]]:
        for first in range(0, len(self._array), size):
            yield first, self._array[first : first + size]

    def whole(self) -> Array:
        return np.array(self._array)


def read_npz(path: Path) -> dict[str, Array]:
    """The arrays of a ``.npz`` file by name, in memory."""
    with _reading(path), path.open("rb") as file:  # numpy itself leaves a damaged file open
        content = np.load(file, allow_pickle=False)
        return {"": content} if isinstance(content, np.ndarray) else {name: content[name] for name in content.files}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    kind = f"{path.suffix.lower()} file of numbers"
    try:
        with reading(path, f"cannot be read: it is not a {kind}, or truncated"):
            yield
    except DataError as error:
        if "pickle" in str(error.__cause__) or "Python objects" in str(error.__cause__):
            raise DataError(
                f"{path} is not a {kind}: it is not a numpy file, or holds Python objects, which pyrnode does not "
                "unpickle; save numbers"
            ) from error
        raise
