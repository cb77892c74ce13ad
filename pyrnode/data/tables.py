"""Tables and arrays in files: ``.npy``, ``.npz``, ``.csv``, ``.parquet``, and pandas data frames."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pyrnode.config import DataConfig
from pyrnode.data.arrays import array_tensor, check_array
from pyrnode.data.samples import Source, TensorSamples
from pyrnode.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".npy", ".npz", ".csv", ".parquet")
"""Files that `file_source` reads."""


def file_source(path: Path, config: DataConfig) -> Source:
    """The samples of a file.

    A ``.npz`` holds one array, or arrays ``train``, ``test`` and, if it likes, ``validation`` (or ``val``).
    A ``.csv`` may have a line of names; its numbers are float64 (integers too, unless ``config.levels`` is set).
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown kind of file; expected {', '.join(SUFFIXES)} or a folder of images")
    if suffix in (".npy", ".npz"):
        arrays = read_numpy(path)
        return _array_source(arrays, path, config)
    frame = read_csv(path, header="auto") if suffix == ".csv" else read_parquet(path)
    if suffix == ".csv" and config.levels is None:
        frame = frame.astype({c: np.float64 for c in frame.columns if frame[c].dtype.kind in "iu"})
    return frame_source(frame, str(path), config)


def read_numpy(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of a ``.npy`` (under the name ``""``) or ``.npz`` file; pickled objects are refused, not read."""
    try:
        with path.open("rb") as file:  # numpy itself leaves a damaged file open
            content = np.load(file, allow_pickle=False)
            if isinstance(content, np.ndarray):
                return {"": content}
            return {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        if "pickle" in str(error):
            raise DataError(
                f"{path} is not a numpy file, or holds Python objects, which pyrnode does not unpickle; save numbers"
            ) from error
        raise DataError(f"{path} cannot be read ({error}); it may be truncated") from error


def _array_source(arrays: dict[str, np.ndarray[Any, Any]], path: Path, config: DataConfig) -> Source:
    if len(arrays) == 1:
        (array,) = arrays.values()
        values, levels = check_array(array_tensor(array, str(path)), str(path), config.levels)
        return Source(path.stem, TensorSamples(values), tuple(values.shape[1:]), levels)
    validation = "val" if "val" in arrays else "validation"
    if not {"train", "test"} <= set(arrays) <= {"train", "test", validation}:
        raise DataError(
            f"{path} has arrays {', '.join(sorted(arrays)) or '(none)'}: expected one, or train, test and, optionally, "
            "validation"
        )
    parts: dict[str, Tensor] = {}
    levels = None
    for name, array in arrays.items():
        parts[name], levels = check_array(array_tensor(array, f"{path} [{name}]"), f"{path} [{name}]", config.levels)
    train = parts["train"]
    for name, values in parts.items():
        if values.shape[1:] != train.shape[1:] or values.dtype != train.dtype:
            raise DataError(f"{path}: {name} and train differ in shape or type: {values.shape} and {train.shape}")
    return Source(
        path.stem,
        TensorSamples(train),
        tuple(train.shape[1:]),
        levels,
        test=TensorSamples(parts["test"]),
        validation=TensorSamples(parts[validation]) if validation in parts else None,
    )


def read_csv(path: Path, *, header: str) -> pd.DataFrame:
    """A comma-separated file; ``header="auto"`` takes a first line that is not all numbers for names."""
    import pandas as pd

    try:
        if header == "auto":
            first = pd.read_csv(path, header=None, nrows=1, dtype=str, keep_default_na=False).iloc[0]
            named = not all(_is_number(cell) for cell in first)
            frame = pd.read_csv(path, header=0 if named else None, skipinitialspace=True, low_memory=False)
            if named and str(first.iloc[0]).strip() == "":
                raise DataError(
                    f"{path}: the first column has no name, so it is likely a row index; write the file without it "
                    "(pandas: index=False), or name it"
                )
            return frame
        return pd.read_csv(path, index_col=False, low_memory=False)
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{path} is empty") from error
    except (pd.errors.ParserError, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as comma-separated values ({error})") from error


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def read_parquet(path: Path) -> pd.DataFrame:
    """A parquet file."""
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from error
    except (OSError, ValueError) as error:  # pyarrow's errors are among these
        raise DataError(f"{path} cannot be read ({error}); it may be truncated") from error


def frame_source(frame: pd.DataFrame, what: str, config: DataConfig) -> Source:
    """The rows of a data frame: float32 or integers (with ``config.levels``) if all columns are, else float64."""
    features = tuple(f"x{c}" if isinstance(c, int) else str(c) for c in frame.columns)
    if frame.empty:
        raise DataError(f"{what} is empty: {len(frame)} rows, {len(features)} columns")
    for i, name in enumerate(features):
        _check_numeric(frame.iloc[:, i], name, what)
    kinds = [dtype.kind for dtype in frame.dtypes]
    if all(kind in "iu" for kind in kinds) and not bool(frame.isna().to_numpy().any()):
        array = frame.to_numpy(dtype=np.int64)
    else:
        single = all(str(dtype).lower() == "float32" for dtype in frame.dtypes)
        array = frame.to_numpy(dtype=np.float32 if single else np.float64, na_value=np.nan)
    values, levels = check_array(array_tensor(array, what), what, config.levels, features)
    name = Path(what).stem if what.endswith((".csv", ".parquet")) else "table"
    return Source(name, TensorSamples(values), (len(features),), levels, features=features)


def _check_numeric(values: pd.Series[Any], name: str, what: str) -> None:
    import pandas as pd

    if values.dtype.kind in "iuf":
        return
    text = pd.to_numeric(values, errors="coerce") if values.dtype.kind not in "cbmM" else None
    bad = values[text.isna() & values.notna()] if text is not None else values
    example = f", e.g. {bad.iloc[0]!r} in row {values.index.get_loc(bad.index[0])}" if len(bad) else ""
    raise DataError(f"{what}: column {name!r} is not numeric ({values.dtype}{example}); remove or encode it")
