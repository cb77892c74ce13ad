"""``.parquet`` files, by row group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pyrnode.data.readers.base import WHOLE, Array, Part, TableReader, frame_array, reading
from pyrnode.errors import DataError


class ParquetReader(TableReader):
    """A ``.parquet`` file. The index that pandas stores with a data frame is not one of its columns.

    Raises:
        DataError: It is not one, truncated, or pyarrow is not there.
    """

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise DataError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from error
        self.path = path
        with self._reading(), self._open() as file:
            rows = int(file.metadata.num_rows)
            columns = file.schema_arrow.empty_table().to_pandas().columns
        names = [str(name).strip() for name in columns]
        if len(set(names)) < len(names):
            raise DataError(f"{path}: two columns have one name, among {', '.join(map(repr, names))}")
        super().__init__(path, len(names), rows=rows, names=tuple(names))

    def _open(self) -> Any:
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(self.path, memory_map=True, pre_buffer=False)

    def _reading(self) -> AbstractContextManager[None]:
        return reading(self.path, "cannot be read: it is not a parquet file, or truncated")

    def chunks(self, size: int, part: Part = WHOLE) -> Iterator[tuple[int, Array]]:
        first = 0
        with self._reading(), self._open() as file:
            for number, batch in enumerate(file.iter_batches(batch_size=size)):
                if batch.num_rows and part.has(number):
                    yield first, frame_array(batch.to_pandas(), str(self.path), first=first)
                first += batch.num_rows
