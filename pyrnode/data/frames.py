"""Data frames, of pandas, polars, Arrow and whatever else has columns with names: their numbers, and which is which."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyrnode.data.readers.base import Array, frame_array
from pyrnode.data.readers.dialect import counts
from pyrnode.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

Names = tuple[str, ...]


def is_frame(data: Any) -> bool:
    """Whether something is a table whose columns have names."""
    if (pandas := sys.modules.get("pandas")) and isinstance(data, pandas.DataFrame):
        return True
    named = hasattr(data, "columns") or hasattr(data, "column_names")
    return named and any(hasattr(data, name) for name in ("__dataframe__", "to_pandas", "to_numpy"))


def read_frame(data: Any, what: str) -> tuple[Array, Names]:
    """The rows of a data frame, ``(n, d)``, and the names of its columns.

    Raises:
        DataError: A cell is no number, two columns share a name, or it cannot be read.
    """
    frame = _pandas(data, what)
    names = tuple(str(name).strip() for name in frame.columns)
    check_distinct(names, what)
    return frame_array(frame.set_axis(names, axis=1), what), names


def said(names: Names | None) -> Names | None:
    """Names that say something; `None` where they count the columns, as pandas does where there are none."""
    return None if names is None or counts(list(names)) else names


def _pandas(data: Any, what: str) -> pd.DataFrame:
    try:
        import pandas as pd
    except ImportError as error:
        raise DataError(f"{what}: reading data frames needs pandas: pip install pandas") from error
    if isinstance(data, pd.DataFrame):
        return data
    names = list(getattr(data, "column_names", None) or data.columns)
    try:
        if hasattr(data, "to_pandas"):
            try:
                return pd.DataFrame(data.to_pandas())
            except ImportError:  # polars goes through pyarrow
                pass
        if hasattr(data, "to_numpy"):
            return pd.DataFrame(np.asarray(data.to_numpy()), columns=names)
        return pd.api.interchange.from_dataframe(data)
    except Exception as error:  # whatever another library raises
        message = " ".join(str(error).split())
        raise DataError(f"{what} of type {type(data).__name__} cannot be read as a table ({message})") from error


def check_distinct(names: Sequence[str], what: str) -> None:
    """Raises `DataError` where two columns have one name."""
    for i, name in enumerate(names):
        if name in names[:i]:
            raise DataError(f"{what}: columns {names.index(name)} and {i} are both called {name!r}")


def ordering(names: Names | None, features: Names | None, what: str) -> list[int] | None:
    """Where the columns of a model are found in a table.

    Args:
        names: The table's columns; `None` if they have no names.
        features: The columns that the model was trained on; `None` if they had no names.
        what: What the table is called in messages.

    Returns:
        The positions in the table of the model's columns; `None` where they count by position, as they stand.

    Raises:
        DataError: The names are others.
    """
    if names is None or names == features:
        return None
    if said(names) is None and (features is None or set(names) != set(features)):
        return None
    if features is None:  # numbers in another order count from 0, any other names say nothing
        features = tuple(str(i) for i in range(len(names)))
        return [names.index(name) for name in features] if set(names) == set(features) else None
    others = {
        "missing": [name for name in features if name not in names],
        "superfluous": [name for name in names if name not in features],
    }
    if any(others.values()):
        listed = "; ".join(f"{kind}: {_listed(some)}" for kind, some in others.items() if some)
        raise DataError(
            f"{what} has other columns than the model was trained on ({listed}): give it those, in any order, or "
            "numbers without names, which count by position"
        )
    return [names.index(name) for name in features]


def _listed(names: Sequence[str]) -> str:
    return ", ".join([*map(repr, names[:8]), *(["…"] if len(names) > 8 else [])])


def columns_of(data: Any, features: Names | None, what: str) -> Any:
    """The numbers of a data frame with its columns in the order of `features`; what is no data frame stays as it is."""
    if not is_frame(data):
        return data
    values, names = read_frame(data, what)
    order = ordering(names, features, what)
    return values if order is None else values[:, order]
