"""Anomaly scores: log-densities and calibrated p-values, of arrays and of files larger than memory.

A log-density alone says little about how unusual a sample is: it depends on units and dimensions. Its rank among
held-out scores does. With scores ``c_i`` of n samples that were not trained on, the conformal p-value of x is

    p = (1 + #{i : c_i ≤ log p(x)}) / (n + 1)

If x is from the same distribution as they are, ``P(p ≤ α) ≤ α`` for every α, however good or bad the flow is
(Vovk, Gammerman, Shafer 2005, *Algorithmic Learning in a Random World*); a better flow gives outliers smaller values.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pyrnode import files
from pyrnode.config import DataConfig
from pyrnode.data.chunks import Chunks, open_chunks
from pyrnode.data.readers import WHOLE, Part
from pyrnode.data.samples import Samples
from pyrnode.errors import CheckpointError, ConfigError, DataError, SolverError, unknown_name
from pyrnode.flow import Flow
from pyrnode.progress import progress_bar

CHUNK = 10_000
"""Samples that are in memory at a time."""

LEVELS = (0.05, 0.01, 0.001)
"""Levels at which a summary counts small p-values."""


@dataclass(frozen=True)
class Calibration:
    """Scores of held-out samples, from which p-values are taken.

    Args:
        scores: Log-densities in nats, ``(n,)``; kept in ascending order.

    Raises:
        DataError: There are none, or one is not finite.
    """

    scores: NDArray[np.float64]

    def __post_init__(self) -> None:
        scores = np.sort(np.asarray(self.scores, dtype=np.float64))
        bad = int((~np.isfinite(scores)).sum())
        if scores.ndim != 1 or len(scores) == 0 or bad:
            said = f"; {bad} are not: leave those samples out (a flow gives -inf outside of its columns' bounds)"
            wanted = f"expected (n,) finite numbers, n at least 1{said if bad else ''}"
            raise DataError(f"calibration scores of shape {scores.shape}: {wanted}")
        object.__setattr__(self, "scores", scores)

    def __repr__(self) -> str:
        return f"Calibration({len(self.scores)} scores, {self.scores[0]:g} to {self.scores[-1]:g})"

    def p_values(self, scores: ArrayLike | Tensor) -> NDArray[np.float64]:
        """Conformal p-values ``(m,)`` of log-densities ``(m,)``, from ``1/(n + 1)`` to 1; −inf has the smallest.

        Raises:
            DataError: A score is NaN. It has no rank, and a p-value of NaN would pass for an ordinary one wherever
                ``p <= level`` is asked: where a density could not be computed, say −inf.
        """
        scores = np.asarray(scores.detach().cpu() if isinstance(scores, Tensor) else scores, dtype=np.float64)
        if np.isnan(scores).any():
            raise DataError(f"score {int(np.isnan(scores).argmax())} is NaN: expected log-densities, -inf for none")
        below = np.searchsorted(self.scores, scores, side="right")
        p: NDArray[np.float64] = (1 + below) / (len(self.scores) + 1)
        return p

    def save(self, path: str | Path, flow: Flow) -> None:
        """Writes the scores, atomically, with the fingerprint of the flow that gave them."""
        scores = {"scores": torch.from_numpy(self.scores.copy())}
        files.write(path, "calibration", scores, {"model": fingerprint(flow)})

    @classmethod
    def load(cls, path: str | Path, flow: Flow) -> Calibration:
        """Reads what `save` wrote.

        Raises:
            CheckpointError: The file is missing, damaged, foreign, or of another flow.
        """
        tensors, description = files.read(path, "calibration")
        if description.get("model") != fingerprint(flow):
            raise CheckpointError(f"{path} was made with another model: calibrate again, with held-out samples")
        with files.converted(f"{path} is not a calibration: calibrate again, with held-out samples"):
            if tensors["scores"].dtype != torch.float64:
                raise CheckpointError(f"its scores are {tensors['scores'].dtype}: expected float64")
            return cls(tensors["scores"].numpy())


def calibration_path(run: str | Path) -> Path:
    """Where a run, or a model file, has its calibration."""
    run = Path(run)
    return run / "calibration.safetensors" if os.path.isdir(run) else run.with_suffix(".calibration.safetensors")


def fingerprint(flow: Flow) -> str:
    """A hash of what determines the flow's log-densities: shape, blocks, weights, solver, estimator of the trace."""
    shape = (flow.event_shape, flow.levels, flow.context_dim, flow.config.dtype, flow.config.flow.to_dict())
    columns = flow.config.columns.to_dict()
    times = [*(block.end_time for block in flow.blocks), *([columns] if columns else [])]
    digest = hashlib.sha256(repr((flow.solver, flow.divergence, shape, times)).encode())
    for name, value in sorted(flow.state_dict().items()):
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# -- scoring ---------------------------------------------------------------------------------------------------------


def check_unconditional(flow: Flow) -> None:
    """Raises `ConfigError` for a flow with a context, which files of samples do not have."""
    if flow.context_dim:
        raise ConfigError(
            f"this flow is conditional on {flow.context_dim} features, and scores of files know no context: use "
            "flow.log_prob(x, context) and Calibration, or RNODEDensity, whose p_values take one"
        )


@torch.no_grad()
def log_densities(flow: Flow, x: Tensor, context: Tensor | None = None) -> NDArray[np.float64]:
    """Log-densities ``(n,)`` in nats of samples ``(n, *event)``."""
    scores: NDArray[np.float64] = flow.log_prob(x, context).double().cpu().numpy()
    return scores


def scores_or_none(flow: Flow, x: Tensor) -> NDArray[np.float64]:
    """Log-densities ``(n,)`` of finite samples; −inf where the solve fails, or a value is beyond the flow's numbers.

    Which samples those are is found by halving: the others are scored as they are without them.
    """
    try:
        scores = log_densities(flow, x)
    except (SolverError, DataError) as error:
        if isinstance(error, DataError) and flow.levels is not None:
            raise  # a value that is no grey level is wrong, not unlikely
        if len(x) == 1:
            return np.full(1, -np.inf)
        return np.concatenate([scores_or_none(flow, half) for half in x.tensor_split(2)])
    return np.where(np.isnan(scores) | (scores == np.inf), -np.inf, scores)


Scored = Iterator[tuple[int, NDArray[np.float64]]]
"""First row and log-densities of each chunk."""


def scored(flow: Flow, chunks: Any, bar: Any, score: Callable[[Flow, Tensor], NDArray[np.float64]]) -> Scored:
    """First row and log-densities of each chunk."""
    for first, values in chunks:
        where = f"rows {first} to {first + len(values) - 1}"
        try:
            scores = score(flow, values)
        except SolverError as error:
            raise SolverError(f"in {where}: {error}", status=error.status, block=error.block) from error
        except DataError as error:
            raise DataError(f"in {where}: {error}") from error
        bar.update(len(values))
        yield first, scores


class Written(TypedDict, total=False):
    """How a delimited file is written; what is left out is recognised."""

    sep: str
    decimal: str
    header: bool | Literal["auto"]


def as_settings(written: Written) -> DataConfig:
    """The same as settings; `ConfigError` where a name is none of these, or a value does not fit."""
    for name in written:
        if name not in Written.__annotations__:
            raise ConfigError(unknown_name("argument", name, Written.__annotations__))
    return DataConfig(**written)


def open_for(flow: Flow, path: str | Path, size: int, config: DataConfig, part: Part = WHOLE) -> Chunks:
    """The chunks of a file that a flow is to score."""
    discrete = flow.levels is not None
    shape, names = flow.event_shape, flow.features
    return open_chunks(path, size, event_shape=shape, discrete=discrete, features=names, config=config, part=part)


def calibrate(
    flow: Flow,
    data: str | Path | Samples | Tensor,
    *,
    chunk: int = CHUNK,
    progress: bool = False,
    **written: Unpack[Written],
) -> Calibration:
    """Scores held-out samples.

    Args:
        flow: The flow.
        data: Samples that it was not trained on, like those that it will score: a file (as in `score_file`), a tensor
            ``(n, *event)``, or the test set of a `Splits`.
        chunk: Samples in memory at a time.
        progress: Show a progress bar.
        **written: How a ``.csv`` file is written, where that is not recognised: ``sep``, ``decimal``, ``header`` as in
            `DataConfig`.

    Raises:
        ConfigError: An argument of `written` is none, or does not fit.
        DataError: The samples do not fit.
        SolverError: A solve failed.
    """
    config = as_settings(written)
    check_unconditional(flow)
    chunks: Any
    if isinstance(data, (str, Path)):
        opened = open_for(flow, data, chunk, config)
        chunks, total = opened, opened.about() if progress else None
    elif isinstance(data, Samples):
        batches = data.batches(torch.arange(len(data), device="cpu"), chunk)
        chunks, total = zip(range(0, len(data), chunk), (batch.x for batch in batches), strict=True), len(data)
    else:
        x, _ = flow.admit(data)
        chunks, total = ((first, x[first : first + chunk]) for first in range(0, len(x), chunk)), len(x)
    with progress_bar(total, "calibrate", unit="sample", show=progress) as bar:
        scores = [part for _, part in scored(flow, chunks, bar, log_densities)]
    return Calibration(np.concatenate(scores) if scores else np.empty(0))


@dataclass(frozen=True)
class Summary:
    """What `score_file` did.

    Attributes:
        samples: Samples scored.
        mean: Mean log-density of those that have one, nats; NaN where none has.
        below: For each of `LEVELS`, how many p-values are at most that; empty without a calibration.
        calibration: Number of calibration scores; 0 without.
        impossible: Samples of log-density −inf: a value is outside of its column's bounds or beyond the flow's numbers,
            or their solve failed.
    """

    samples: int
    mean: float
    below: dict[float, int]
    calibration: int
    impossible: int = 0

    def __str__(self) -> str:
        lines = [f"{self.samples} samples, mean log-density {self.mean:.4f} nats"]
        if self.impossible:
            what = "failed or are out of all range, or of their columns' bounds"
            lines.append(f"{self.impossible} of them {what}: log_prob -inf, outside that mean")
        for level, count in self.below.items():
            if level * (self.calibration + 1) < 1:
                lines.append(
                    f"p ≤ {level:g}: needs {round(1 / level) - 1} calibration samples, there are {self.calibration}"
                )
            else:
                lines.append(
                    f"p ≤ {level:g}: {count}, where {level * self.samples:.1f} are expected of ordinary samples"
                )
        return "\n".join(lines)


def score_file(
    flow: Flow,
    data: str | Path,
    out: str | Path,
    *,
    calibration: Calibration | None = None,
    chunk: int = CHUNK,
    progress: bool = False,
    **written: Unpack[Written],
) -> Summary:
    """Scores the samples of a file, chunk by chunk, so that neither the file nor the scores need to fit in memory.

    Args:
        flow: The flow.
        data: ``.npy`` (mapped), ``.csv``, ``.tsv`` or ``.parquet`` (read by row group) file of samples.
        out: ``.csv``, ``.json`` (a list of objects) or ``.parquet`` file to write: ``row`` (from 0), ``log_prob``
            (nats) and, with a calibration, ``p_value``. It appears when it is complete. A sample whose solve fails, or
            whose values are out of their columns' bounds or beyond the flow's numbers, has the log-density −inf (in
            JSON ``null``, which knows no infinity) and the smallest p-value.
        calibration: Held-out scores.
        chunk: Samples in memory at a time.
        progress: Show a progress bar.
        **written: How a ``.csv`` file is written, where that is not recognised: ``sep``, ``decimal``, ``header`` as in
            `DataConfig`.

    Raises:
        DataError: The file cannot be read, or a row does not fit; it is named.
        ConfigError: `out` is of an unknown kind, or an argument of `written` is none, or does not fit.
        CheckpointError: `out` cannot be written; what was there before is untouched.
    """
    check_targets(data, out)
    check_unconditional(flow)
    chunks = open_for(flow, data, chunk, as_settings(written))
    with progress_bar(chunks.about() if progress else None, "score", unit="sample", show=progress) as bar:
        return write_scores(scored(flow, chunks, bar, scores_or_none), out, calibration)


def check_targets(data: str | Path, out: str | Path) -> None:
    """Raises `ConfigError` where scores would take the place of the samples."""
    if Path(out).resolve() == Path(data).resolve():
        raise ConfigError(f"out = {str(out)!r} is the file of the samples: name another one")


def write_scores(found: Scored, out: str | Path, calibration: Calibration | None) -> Summary:
    """Writes log-densities, and their p-values, as they come; arguments and errors as in `score_file`."""
    count, impossible, total, below = 0, 0, 0.0, dict.fromkeys(LEVELS if calibration is not None else (), 0)
    with _writer(Path(out)) as write:
        for first, scores in found:
            columns: dict[str, NDArray[Any]] = {"row": np.arange(first, first + len(scores)), "log_prob": scores}
            if calibration is not None:
                columns["p_value"] = p = calibration.p_values(scores)
                below = {level: number + int((p <= level).sum()) for level, number in below.items()}
            write(columns)
            possible = scores[np.isfinite(scores)]
            count, total = count + len(scores), total + float(possible.sum())
            impossible += len(scores) - len(possible)
    mean = total / (count - impossible) if count > impossible else math.nan
    return Summary(count, mean, below, 0 if calibration is None else len(calibration.scores), impossible)


# -- writing ---------------------------------------------------------------------------------------------------------

Columns = dict[str, NDArray[Any]]


@contextmanager
def _writer(path: Path) -> Iterator[Callable[[Columns], None]]:
    """Takes columns chunk by chunk, and writes each of them at once."""
    writers = {".csv": _csv_writer, ".json": _json_writer, ".parquet": _parquet_writer}
    if path.suffix.lower() not in writers:
        raise ConfigError(unknown_name(f"kind of file of {path}:", path.suffix, writers))
    with files.replacing(path) as file, writers[path.suffix.lower()](file) as write:
        yield write


@contextmanager
def _csv_writer(file: Any) -> Iterator[Callable[[Columns], None]]:
    def write(columns: Columns) -> None:
        if file.tell() == 0:
            file.write((",".join(columns) + "\n").encode())
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        file.write("".join(",".join(map(repr, row)) + "\n" for row in rows).encode())

    yield write


@contextmanager
def _json_writer(file: Any) -> Iterator[Callable[[Columns], None]]:
    def write(columns: Columns) -> None:
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        lines = ",\n".join(files.to_json(dict(zip(columns, row, strict=True))) for row in rows)
        file.write(((",\n" if file.tell() else "[\n") + lines).encode())

    yield write
    file.write(b"\n]\n")


@contextmanager
def _parquet_writer(file: Any) -> Iterator[Callable[[Columns], None]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError("writing parquet needs pyarrow: pip install pyarrow") from error
    writer: Any = None

    def write(columns: Columns) -> None:
        nonlocal writer
        table = pa.table(columns)
        if writer is None:
            writer = pq.ParquetWriter(file, table.schema)
        writer.write_table(table)

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()
