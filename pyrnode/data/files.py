"""Samples of whole files (`SUFFIXES`) and of data frames, to be trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrnode.config import DataConfig
from pyrnode.data.arrays import array_tensor, check_array
from pyrnode.data.frames import Names, read_frame, said
from pyrnode.data.mapped import MappedSamples, large, mapped
from pyrnode.data.readers import SUFFIXES as READ
from pyrnode.data.readers import Array, DelimitedReader, NumpyReader, kind, open_file, read_npz
from pyrnode.data.samples import Source, TensorSamples
from pyrnode.errors import DataError

SUFFIXES = (".npy", ".npz", *(suffix for suffix in READ if suffix != ".npy"))
"""Files that `file_source` reads."""


def file_source(path: Path, config: DataConfig) -> Source:
    """The samples of a file.

    A ``.npz`` holds one array, or arrays ``train``, ``test`` and, if it likes, ``validation`` (or ``val``).
    A ``.csv`` may have a line of names; its numbers are float64 (integers too, unless ``config.levels`` is set); what
    ``config.sep``, ``config.decimal`` and ``config.header`` leave open, its first lines settle.
    """
    suffix = kind(path)
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown kind of file; expected {', '.join(SUFFIXES)} or a folder of images")
    if suffix == ".npz":
        return _archive_source(read_npz(path), path, config)
    reader = open_file(path, config)
    if large(path) and (values := mapped(reader, config)) is not None:
        levels = (config.levels or 256) if values.dtype == torch.uint8 else None
        name, shape = path.name[: -len(suffix)], tuple(values.shape[1:])
        return Source(name, MappedSamples(values), shape, levels, features=reader.names)
    array = reader.whole()
    if isinstance(reader, NumpyReader):
        return _array_source(array, path, config)
    if isinstance(reader, DelimitedReader) and config.levels is None:
        array = array.astype(np.float64, copy=False)
    return _table_source(path.name[: -len(suffix)], array, reader.names, str(path), config)


def frame_source(frame: Any, config: DataConfig) -> Source:
    """The rows of a data frame: float32 or integers (with ``config.levels``) if all columns are, else float64."""
    what = "the data frame"
    array, names = read_frame(frame, what)
    return _table_source("table", array, names, what, config)


def _table_source(name: str, array: Array, features: Names | None, what: str, config: DataConfig) -> Source:
    columns = array.shape[1]
    if not array.size:
        raise DataError(f"{what} is empty: {len(array)} rows, {columns} columns")
    shown = said(features) or tuple(f"x{i}" for i in range(columns))
    values, levels = check_array(array_tensor(array, what), what, config.levels, shown)
    return Source(name, TensorSamples(values), (columns,), levels, features=features)


def _array_source(array: Array, path: Path, config: DataConfig) -> Source:
    values, levels = check_array(array_tensor(array, str(path)), str(path), config.levels)
    return Source(path.stem, TensorSamples(values), tuple(values.shape[1:]), levels)


def _archive_source(arrays: dict[str, Array], path: Path, config: DataConfig) -> Source:
    if len(arrays) == 1:
        (array,) = arrays.values()
        return _array_source(array, path, config)
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
