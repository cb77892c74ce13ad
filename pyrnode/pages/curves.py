"""The curves of runs, thinned out so that a page of many long runs stays light."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyrnode.pages.markup import finite
from pyrnode.pages.reading import Story
from pyrnode.runs import Record

Array = np.ndarray[Any, np.dtype[np.float64]]
Columns = dict[str, Array]

_POINTS = 30_000
_FEWEST, _MOST = 150, 1200
"""Points of a curve: so many for all runs together, and between these for each."""

TRAIN = ("nll", "E", "n", "nfe", "grad_norm", "learning_rate")
CHECKED = ("validation", "disagreement", "step_size")


def table(records: Sequence[Record], keys: Sequence[str]) -> Columns:
    """Columns ``step``, ``seconds`` and `keys` of records; what is missing or not finite is NaN."""

    def column(key: str) -> Array:
        values = [finite(record.get(key)) for record in records]
        return np.array([np.nan if value is None else value for value in values], dtype=np.float64)

    return {key: column(key) for key in ("step", "seconds", *keys)}


def thinned(columns: Columns, width: int) -> Columns:
    """Means over `width` steps at a time; of runs of one length the points are at the same steps.

    Args:
        columns: A column ``step`` and others, ``(n,)``.
        width: Steps that become a point; 1 leaves everything as it is.
    """
    steps = columns["step"]
    if width <= 1 or not len(steps):
        return columns
    bucket = (np.maximum(steps, 1) - 1).astype(np.int64) // width
    _, place = np.unique(bucket, return_inverse=True)
    result = {}
    for key, values in columns.items():
        there = np.isfinite(values)
        count = np.bincount(place[there], minlength=place.max() + 1)
        total = np.bincount(place[there], weights=values[there], minlength=place.max() + 1)
        result[key] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return result


def _width(lengths: Sequence[int], last: Sequence[float]) -> int:
    """Steps that become a point, so that all curves together have a number of points that a browser draws at once."""
    points = min(_MOST, max(_FEWEST, _POINTS // max(len(lengths), 1)))
    if max(lengths, default=0) <= points:
        return 1
    return int(np.ceil(max(last) / points))


def of_runs(stories: Sequence[Story]) -> tuple[list[dict[str, Columns]], int]:
    """The curves of each run, by table (``train``, ``checked``); and how many steps became a point."""
    raw = [{"train": table(s.steps, TRAIN), "checked": table(s.validations, CHECKED)} for s in stories]
    widths = {}
    for kind in ("train", "checked"):
        steps = [columns[kind]["step"] for columns in raw]
        widths[kind] = _width([len(s) for s in steps], [float(s.max()) if len(s) else 1.0 for s in steps])
    curves = [{kind: thinned(columns[kind], widths[kind]) for kind in columns} for columns in raw]
    return curves, widths["train"]


def plain_columns(columns: Columns) -> dict[str, list[float | None]]:
    """Columns as JSON has them, to six digits."""
    return {
        key: [float(f"{value:.6g}") if np.isfinite(value) else None for value in values.tolist()]
        for key, values in columns.items()
    }


def chosen(columns: Columns, key: str, count: int) -> list[tuple[float, float]]:
    """Some of a curve's points, evenly spread, first and last among them: steps and values."""
    there = np.flatnonzero(np.isfinite(columns[key]))
    if len(there) > count:
        there = there[np.unique(np.linspace(0, len(there) - 1, count).round().astype(np.int64))]
    return [(float(columns["step"][i]), float(columns[key][i])) for i in there]
