"""Files of samples to be scored, of which one chunk is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from pyrnode.config import DataConfig
from pyrnode.data.arrays import array_tensor
from pyrnode.data.frames import Names, ordering
from pyrnode.data.readers import SUFFIXES, WHOLE, Part, Reader, kind, open_file
from pyrnode.errors import DataError, unknown_name
from pyrnode.settings import whole


class Chunks:
    """Samples of a file, checked, in chunks; each iteration is a pass over the file.

    Yields the number of a chunk's first row, and the chunk, ``(<=size, *event)``.

    Attributes:
        rows: Number of samples, where the file says it (a ``.csv`` does not).
        names: Names of the columns, where the file has some.
    """

    def __init__(
        self,
        reader: Reader,
        size: int,
        event_shape: tuple[int, ...],
        discrete: bool,
        features: Names | None,
        part: Part,
    ) -> None:
        self.rows, self.names, self._part = reader.rows, reader.names, part
        self._order = ordering(reader.names, features, str(reader.path))
        self._reader, self._size, self._event_shape, self._discrete = reader, size, event_shape, discrete

    def about(self) -> int | None:
        """Number of samples, or about how many, for a bar; `None` where not even that is known."""
        return self._reader.about()

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        first = None
        for first, array in self._reader.chunks(self._size, self._part):
            values = self._checked(array_tensor(array, str(self._reader.path)), first)
            yield first, values if self._order is None else values[:, self._order]
        if first is None and self._part.number == 0:
            raise DataError(f"{self._reader.path} has no samples")

    def _checked(self, values: Tensor, first: int) -> Tensor:
        path = self._reader.path
        if values.ndim == 3 and len(self._event_shape) == 3:
            values = values.unsqueeze(1)
        if tuple(values.shape[1:]) != self._event_shape:
            raise DataError(
                f"{path} has samples of shape {tuple(values.shape[1:])}; the flow models {self._event_shape}: give it "
                "the columns of its training data, in the same order, and no others"
            )
        if not values.is_floating_point():
            return values if self._discrete else values.double()
        bad = ~torch.isfinite(values).flatten(1).all(1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            place = ""
            if values.ndim == 2:
                place = f", column {int((~torch.isfinite(values[row])).nonzero()[0])}"
            raise DataError(f"{path}: row {first + row}{place} is NaN, empty or infinite: remove or fill it")
        if self._discrete:
            raise DataError(
                f"{path} holds floating-point values; the flow models discrete ones: expected integers (for images, "
                "the uint8 values themselves, not divided by 255)"
            )
        return values


_ANY = DataConfig()


def open_chunks(
    path: str | Path,
    size: int,
    *,
    event_shape: tuple[int, ...],
    discrete: bool = False,
    features: Names | None = None,
    config: DataConfig = _ANY,
    part: Part = WHOLE,
) -> Chunks:
    """Opens a file of samples.

    Args:
        path: A ``.npy`` array ``(n, d)``, ``(n, H, W)`` or ``(n, C, H, W)``, or a table: ``.csv`` or ``.tsv`` (with or
            without a line of names, also as ``.csv.gz``) or ``.parquet``.
        size: Samples in a chunk.
        event_shape: Shape that a sample must have.
        discrete: The values must be integers.
        features: Names of the columns that the model was trained on: the file's are put in their order.
        config: How a ``.csv`` is to be read: ``sep``, ``decimal``, ``header``.
        part: Which of the chunks; there may be none, unless it has the first.

    Returns:
        The chunks. Continuous values are float32 or float64, as the file has them (integers become float64); discrete
        ones uint8 or int64.

    Raises:
        DataError: The file is missing, of an unknown kind, truncated, or of another width; on reading, also a row that
            has NaN or text. The message names the file, and the row counted from 0.
        ConfigError: `size` is no whole number, or not positive.
    """
    path = Path(path)
    size = whole(size, "chunk", 1, "number of samples")
    if kind(path) not in SUFFIXES:
        known = f"known: {', '.join(sorted(s for s in SUFFIXES if not s.endswith('.gz')))}, .csv.gz, .tsv.gz"
        raise DataError(unknown_name(f"kind of file of {path}:", kind(path), SUFFIXES, listing=known))
    if not path.is_file():
        raise DataError(f"{path} does not exist, or is not a file")
    return Chunks(open_file(path, config), size, event_shape, discrete, features, part)
