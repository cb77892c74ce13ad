"""Files read in chunks, for data larger than memory: ``.npy`` (mapped), ``.csv`` and ``.parquet``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyrnode.data.arrays import array_tensor
from pyrnode.data.tables import _is_number
from pyrnode.errors import ConfigError, DataError, unknown_name

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Chunks:
    """Samples of a file, of which one chunk is in memory at a time.

    Attributes:
        rows: Number of samples, where the file says it (a ``.csv`` does not).
        read: Starts a pass: first row of each chunk and the chunk, ``(<=size, *event)``.
    """

    rows: int | None
    read: Callable[[], Iterator[tuple[int, Tensor]]]

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        return self.read()


def open_chunks(path: str | Path, size: int, *, event_shape: tuple[int, ...], discrete: bool = False) -> Chunks:
    """Opens a file of samples.

    Args:
        path: A ``.npy`` array ``(n, d)``, ``(n, H, W)`` or ``(n, C, H, W)``, or a table: ``.csv`` (with or without a
            line of names) or ``.parquet``.
        size: Samples in a chunk.
        event_shape: Shape that a sample must have.
        discrete: The values must be integers.

    Returns:
        The chunks. Continuous values are float32 or float64, as the file has them (integers and text become float64);
        discrete ones uint8 or int64.

    Raises:
        DataError: The file is missing, of an unknown kind, truncated, or of another width; on reading, also a row that
            has NaN or text. The message names the file, and the row counted from 0.
        ConfigError: `size` is not positive.
    """
    path = Path(path)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ConfigError(f"chunk = {size!r}: expected a positive number of samples")
    readers = {".npy": _numpy, ".csv": _csv, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise DataError(unknown_name(f"kind of file of {path}:", path.suffix, readers))
    if not path.is_file():
        raise DataError(f"{path} does not exist, or is not a file")
    rows, start = readers[path.suffix.lower()](path, size, discrete)

    def read() -> Iterator[tuple[int, Tensor]]:
        first = 0
        for values in start():
            yield first, _checked(values, first, path, event_shape, discrete)
            first += len(values)
        if first == 0:
            raise DataError(f"{path} has no samples")

    return Chunks(rows, read)


Opened = tuple[int | None, Callable[[], Iterator[Tensor]]]


def _checked(values: Tensor, first: int, path: Path, event_shape: tuple[int, ...], discrete: bool) -> Tensor:
    if values.ndim == 3 and len(event_shape) == 3:
        values = values.unsqueeze(1)
    if tuple(values.shape[1:]) != event_shape:
        raise DataError(
            f"{path} has samples of shape {tuple(values.shape[1:])}; the flow models {event_shape}: give it the "
            "columns of its training data, in the same order, and no others"
        )
    if discrete:
        if values.is_floating_point():
            raise DataError(f"{path} holds floating-point values; the flow models discrete ones: expected integers")
        return values
    if not values.is_floating_point():
        return values.double()
    bad = ~torch.isfinite(values).flatten(1).all(1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        place = ""
        if values.ndim == 2:
            place = f", column {int((~torch.isfinite(values[row])).nonzero()[0])}"
        raise DataError(f"{path}: row {first + row}{place} is NaN, empty or infinite: remove or fill it")
    return values


def _numpy(path: Path, size: int, discrete: bool) -> Opened:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is not a .npy file of numbers, or truncated ({error})") from error
    if array.ndim < 2:
        raise DataError(f"{path} has shape {array.shape}: expected (n, d), or (n, C, H, W) for images")

    def read() -> Iterator[Tensor]:
        for start in range(0, len(array), size):
            yield array_tensor(array[start : start + size], str(path))

    return len(array), read


def _csv(path: Path, size: int, discrete: bool) -> Opened:
    import pandas as pd

    def failed(error: Exception) -> DataError:
        return DataError(f"{path} cannot be read as comma-separated values ({error})")

    try:
        head = pd.read_csv(path, header=None, nrows=1, dtype=str, keep_default_na=False)
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{path} is empty") from error
    except (pd.errors.ParserError, OSError, UnicodeDecodeError) as error:
        raise failed(error) from error
    named = not all(_is_number(cell) for cell in head.iloc[0])

    def read() -> Iterator[Tensor]:
        first = 0
        try:
            with pd.read_csv(path, header=0 if named else None, skipinitialspace=True, chunksize=size) as frames:
                for frame in frames:
                    if not isinstance(frame.index, pd.RangeIndex):  # pandas took the first fields for names of the rows
                        raise DataError(f"{path}: its rows have more fields than its line of names")
                    if len(frame):  # a file with nothing but names gives an empty one
                        yield _frame_tensor(frame, first, path, discrete)
                    first += len(frame)
        except (pd.errors.ParserError, OSError, UnicodeDecodeError) as error:
            raise failed(error) from error

    return None, read


def _parquet(path: Path, size: int, discrete: bool) -> Opened:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from error

    def failed(error: Exception) -> DataError:
        return DataError(f"{path} is not a parquet file, or truncated ({error})")

    def opened() -> Any:
        return pq.ParquetFile(path, memory_map=True, pre_buffer=False)

    try:
        with opened() as file:
            rows = int(file.metadata.num_rows)
    except (OSError, ValueError) as error:  # pyarrow's errors are among these
        raise failed(error) from error

    def read() -> Iterator[Tensor]:
        first = 0
        try:
            with opened() as file:
                for batch in file.iter_batches(batch_size=size):
                    frame = batch.to_pandas()
                    yield _frame_tensor(frame, first, path, discrete)
                    first += len(frame)
        except DataError:  # is a ValueError too
            raise
        except (OSError, ValueError) as error:
            raise failed(error) from error

    return rows, read


def _frame_tensor(frame: pd.DataFrame, first: int, path: Path, discrete: bool) -> Tensor:
    """A chunk of a table, ``(n, d)``: float32 if all columns are, integers where they are asked for, else float64."""
    import pandas as pd

    for position, name in enumerate(frame.columns):
        values = frame.iloc[:, position]
        if values.dtype.kind not in "iuf":
            numbers = pd.to_numeric(values.astype(str), errors="coerce")
            row = int((numbers.isna() & values.notna()).to_numpy().argmax())
            raise DataError(
                f"{path}: row {first + row}, column {str(name)!r} is not a number ({values.iloc[row]!r}): remove or "
                "encode it"
            )
    if discrete and all(dtype.kind in "iu" for dtype in frame.dtypes):
        return torch.from_numpy(frame.to_numpy(dtype=np.int64).copy())
    single = all(str(dtype).lower() == "float32" for dtype in frame.dtypes)
    array = frame.to_numpy(dtype=np.float32 if single else np.float64, na_value=np.nan)
    return torch.from_numpy(np.array(array, order="C"))
