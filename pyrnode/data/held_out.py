"""Validation samples of the user's own: rows that fit the samples which are trained on, and are never among those."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyrnode.config import DataConfig
from pyrnode.data import images
from pyrnode.data.arrays import array_tensor, bad_value, check_channels, check_levels, computable, numbers
from pyrnode.data.files import SUFFIXES
from pyrnode.data.frames import Names, is_frame, ordering, read_frame
from pyrnode.data.readers import SUFFIXES as READ
from pyrnode.data.readers import kind, open_file, read_npz
from pyrnode.data.samples import DatasetSamples, Samples, Source, TensorSamples
from pyrnode.errors import DataError

_WHAT, _CONTEXT = "validation", "validation_context"


def with_validation(source: Source, validation: Any, context: Any, config: DataConfig) -> Source:
    """The source with validation samples of the user's own, in the place of a share of its samples.

    Args:
        source: What is trained on, with its context, if there is one.
        validation: The rows: an array, a tensor, a data frame, the path of a file or of a folder of images, or a torch
            data set.
        context: Their context, where the source has one.
        config: How a delimited file is read.

    Raises:
        DataError: They do not fit the source, or are of no use; the message says what to do.
    """
    if source.validation is not None:
        raise DataError(f"{source.name} has validation samples of its own: leave validation out")
    samples, names = _samples(validation, source, config)
    if (order := ordering(names, source.features, _WHAT)) is not None:
        samples = TensorSamples(samples.tensor()[:, order])
    return replace(source, validation=samples.carrying(context=_context(context, len(samples), source)))


def _samples(validation: Any, source: Source, config: DataConfig) -> tuple[Samples, Names | None]:
    """The rows, checked, in the columns' order as given, and the names of the columns, if they have some."""
    if isinstance(validation, Dataset):
        read = DatasetSamples(validation, levels=source.levels)
        return _as_read(read, (len(read), *read.event_shape), read.dtype, source), None
    if isinstance(validation, (str, os.PathLike)) and (folder := Path(validation).expanduser()).is_dir():
        found = images.folder_source(folder, config)
        if found.test is not None:
            raise DataError(f"{_WHAT} = {str(validation)!r} has train/ and test/ in it: name one of them")
        return _as_read(found.samples, (len(found.samples), *found.event_shape), torch.uint8, source), None
    values, names = _read(validation, config)
    values = values.unsqueeze(1) if values.ndim == 3 else values
    if values.ndim > 1 and not len(values):
        raise DataError(f"{_WHAT} is empty: shape {tuple(values.shape)}; give it rows, or leave it out")
    if values.ndim == 4 and source.levels is not None:
        check_channels(tuple(values.shape[1:]), _WHAT)
    _check_shape(tuple(values.shape), source)
    return TensorSamples(_checked(values, names, source)), names


def _as_read(samples: Samples, shape: tuple[int, ...], dtype: torch.dtype, source: Source) -> Samples:
    """Samples that have been checked one by one, or will be when they are read; of the source's shape and kind."""
    _check_shape(shape, source)
    if dtype.is_floating_point != (source.levels is None):
        raise DataError(f"{_WHAT} has items of type {dtype}, {_expected(source)}")
    return samples


def _read(validation: Any, config: DataConfig) -> tuple[Tensor, Names | None]:
    if is_frame(validation):
        array, names = read_frame(validation, _WHAT)
        return array_tensor(array, _WHAT), names
    if not isinstance(validation, (str, os.PathLike)):
        return array_tensor(validation, _WHAT), None
    path = Path(validation).expanduser()
    if not path.exists():
        raise DataError(f"{_WHAT} = {str(validation)!r}: there is no file or folder of that name; pass rows, or a path")
    if kind(path) == ".npz" and len(arrays := read_npz(path)) == 1:
        return array_tensor(next(iter(arrays.values())), str(path)), None
    if kind(path) not in READ:
        raise DataError(f"{_WHAT} = {str(validation)!r}: expected one of {', '.join(SUFFIXES)}, with rows alone")
    reader = open_file(path, config)
    return array_tensor(reader.whole(), str(path)), reader.names


def _checked(values: Tensor, names: Names | None, source: Source) -> Tensor:
    """Values of the right shape in the source's kind: integers of its levels, or floating-point numbers."""
    if source.levels is None:
        values = values if values.is_floating_point() else values.double()
        if not computable(values):
            raise bad_value(values, _WHAT, names or source.features, 0)
        return values
    if values.is_floating_point():
        raise DataError(f"{_WHAT} holds floating-point values, {_expected(source)}")
    check_levels(values, _WHAT, source.levels)
    return values.to(torch.uint8 if source.levels <= 256 else torch.int32)


def _expected(source: Source) -> str:
    kinds = "floating-point numbers" if source.levels is None else f"integers 0 .. {source.levels - 1}"
    return f"and {source.name} {kinds}: pass it as {source.name} is"


def _check_shape(shape: tuple[int, ...], source: Source) -> None:
    if shape[1:] != source.event_shape:
        expected = f"(n, {', '.join(map(str, source.event_shape))})"
        raise DataError(f"{_WHAT} has shape {shape}: expected {expected}, the shape of what is trained on")


def _context(context: Any, count: int, source: Source) -> Tensor | None:
    """The rows' context, checked, with its columns in the order of the source's."""
    if source.context is None:
        if context is not None:
            raise DataError(f"{_CONTEXT} is given, but no context for {source.name}: give both, or neither")
        return None
    shape = (count, *source.context.shape[1:])
    if context is None:
        raise DataError(
            f"{source.name} has a context, so pass that of the validation rows, too: {_CONTEXT} of shape {shape}"
        )
    names = None
    if is_frame(context):
        context, names = read_frame(context, _CONTEXT)
    values = numbers(context, _CONTEXT).detach().cpu()
    if tuple(values.shape) != shape:
        raise DataError(f"{_CONTEXT} has shape {tuple(values.shape)}: expected {shape}, a row for each")
    if not computable(values):
        raise bad_value(values, _CONTEXT, names or source.context_features, 0)
    order = ordering(names, source.context_features, _CONTEXT)
    values = values if order is None else values[:, order]
    return values.to(source.context.dtype)
