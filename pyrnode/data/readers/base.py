"""What the readers of all formats share: the interface, and how the columns of a table become numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyrnode.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray[Any, np.dtype[Any]]


class Part(NamedTuple):
    """Every `of`-th chunk of a file, from the one of that `number` on, counted from 0."""

    number: int
    of: int

    def has(self, chunk: int) -> bool:
        """Whether the chunk of that number is one of them."""
        return chunk % self.of == self.number


WHOLE = Part(0, 1)
"""All of them."""


class Reader(ABC):
    """A file of samples that has been opened and looked at, but not read.

    Args:
        path: The file.
        rows: Number of samples, where the file says it.
        names: Names of the columns, where it has some.
    """

    def __init__(self, path: Path, *, rows: int | None, names: tuple[str, ...] | None) -> None:
        self.path, self.rows, self.names = path, rows, names

    def about(self) -> int | None:
        """Number of samples, or about how many: for the time left, and for nothing that must be right."""
        return self.rows

    @abstractmethod
    def chunks(self, size: int, part: Part = WHOLE) -> Iterator[tuple[int, Array]]:
        """One pass over the file.

        Args:
            size: Most samples in a chunk.
            part: Which of the chunks are wanted; the others are not made.

        Returns:
            An iterator over the number of a chunk's first row, from 0, and the chunk ``(<=size, *event)``; nothing but
            the chunk is in memory. No chunk is empty. Values of tables are int64 if all columns are whole numbers,
            float32 if all are that, else float64 (an empty cell is NaN).

        Raises:
            DataError: The file is damaged, or has what is not a number; on reaching it.
        """

    @abstractmethod
    def whole(self) -> Array:
        """All samples, ``(n, *event)``, of a type as in `chunks`."""


class TableReader(Reader):
    """A file of rows and columns."""

    def __init__(self, path: Path, columns: int, *, rows: int | None, names: tuple[str, ...] | None) -> None:
        super().__init__(path, rows=rows, names=names)
        self.columns = columns

    def whole(self) -> Array:
        parts = [values for _, values in self.chunks(max(1, _WHOLE_NUMBERS // max(1, self.columns)))]
        return np.concatenate(parts) if parts else np.empty((0, self.columns))


_WHOLE_NUMBERS = 2**22
"""Numbers that are converted at a time where a whole table is read: quick, yet small beside the table."""


@contextmanager
def reading(path: Path, failure: str) -> Iterator[None]:
    """Whatever goes wrong in another's parser is a `DataError` that says so: ``{path} {failure} ({its message})``."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:  # damaged files raise anything, down to SyntaxError and struct.error
        raise DataError(f"{path} {failure} ({' '.join(str(error).split())})") from error


def frame_array(frame: pd.DataFrame, what: str, *, first: int = 0) -> Array:
    """The rows of a data frame, ``(n, d)``, of a type as in `Reader.chunks`.

    Args:
        frame: The columns.
        what: What they are of, for messages.
        first: Number of the first row, for messages.

    Raises:
        DataError: A cell is text, a truth value, a date or the like.
    """
    for position, name in enumerate(frame.columns):
        _check_numbers(frame.iloc[:, position], str(name), what, first)
    if all(_fits_int64(frame.iloc[:, position]) for position in range(frame.shape[1])):
        return np.array(frame.to_numpy(dtype=np.int64), order="C")
    single = all(str(dtype).lower() == "float32" for dtype in frame.dtypes)
    return np.array(frame.to_numpy(dtype=np.float32 if single else np.float64, na_value=np.nan), order="C")


def _fits_int64(values: pd.Series[Any]) -> bool:
    whole = values.dtype.kind in "iu" and not bool(values.isna().any())
    return whole and (values.dtype.kind == "i" or not len(values) or int(values.max()) <= np.iinfo(np.int64).max)


def _check_numbers(values: pd.Series[Any], name: str, what: str, first: int) -> None:
    import pandas as pd

    if values.dtype.kind in "iuf" or not len(values):
        return
    column = f"{what}: column {name!r}"
    if values.dtype.kind == "b":
        raise DataError(f"{column} holds truth values, which have no density: drop it, or make it a context")
    if values.dtype.kind in "mM":
        raise DataError(f"{column} holds times ({values.dtype}): make numbers of it, such as seconds, or hour and day")
    numbers = pd.to_numeric(values.astype(str), errors="coerce")
    bad = (numbers.isna() & values.notna()).to_numpy()
    if values.dtype.kind == "O" and not bad.any() and not any(isinstance(cell, (str, bool)) for cell in values):
        raise DataError(f"{what}: column {name!r} has type {values.dtype}: convert it with .astype('float64')")
    if not bad.any():
        raise DataError(f"{column} holds numbers as text ({values.iloc[0]!r}): convert it with pandas.to_numeric")
    row = int(bad.argmax())
    raise not_a_number(what, first + row, name, values.iloc[row])


def not_a_number(what: str, row: int, name: str, cell: Any, hint: str = "") -> DataError:
    """The error of a cell that is not a number: either the cell is wrong, or the whole column is of another kind."""
    cell = cell.item() if isinstance(cell, np.generic) else cell
    shown = repr(cell if not isinstance(cell, str) or len(cell) <= 40 else cell[:39] + "…")
    return DataError(
        f"{what}: row {row}, column {name!r} is not a number ({shown}): correct it, or, where all of the column is of "
        f"another kind, drop it or make it a context, one column a class{hint}"
    )
