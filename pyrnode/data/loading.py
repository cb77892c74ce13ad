"""`load`: from whatever the user has to train, validation and test samples."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyrnode.config import DataConfig
from pyrnode.data import files, images, maf, mapped, synthetic
from pyrnode.data.arrays import (
    array_tensor,
    bad_value,
    check_array,
    check_not_scaled_pixels,
    check_varies,
    computable,
    numbers,
)
from pyrnode.data.frames import Names, is_frame, read_frame
from pyrnode.data.held_out import with_validation
from pyrnode.data.samples import DatasetSamples, Source, Splits, TensorSamples
from pyrnode.errors import DataError, unknown_name

_DEFAULT = DataConfig()

sources: dict[str, str] = {
    **images.NAMES,
    **{name: density.description for name, density in synthetic.DENSITIES.items()},
    **maf.NAMES,
}
"""Names that `load` knows, each with a line about it."""


def load(
    data: Any,
    *,
    config: DataConfig = _DEFAULT,
    context: Any = None,
    validation: Any = None,
    validation_context: Any = None,
    check: Callable[[Source | Splits], None] | None = None,
) -> Splits:
    """Reads data and splits it into train, validation and test.

    The split depends on ``config.split_seed`` and the number of samples alone, so that it is the same on every machine.
    A source's own test set stays the test set; validation is then a share of the training samples. A source without one
    gives shares of all its samples to validation and test. ``config.limit`` caps the training samples afterwards.

    Args:
        data: One of: a name in `sources`; the path of a ``.npy``, ``.npz``, ``.csv``, ``.tsv`` or ``.parquet`` file or
            of a folder of images; an array or tensor (``(n, d)`` vectors, ``(n, H, W)`` or ``(n, C, H, W)`` images); a
            data frame of pandas, polars or Arrow; a map-style `torch.utils.data.Dataset`; a `synthetic.Density`; a
            `Splits`, which is returned as it is. ``None`` and ``""`` stand for ``config.name``.
        config: Folder of downloaded sets, shares, seed and limits. With ``config.levels``, integers are discrete
            values ``0 .. levels-1``; uint8 images have 256 levels by default.
        context: What the density is conditional on, ``(n, m)`` numbers: an array, tensor or data frame with a row for
            each sample; divided as the samples are. For an embedding ``(n, *shape)``, images or time series.
        validation: Validation samples of your own, in place of a share of the data: rows of the same shape and kind as
            an array, a tensor, a data frame, the path of a file or folder, or a data set. They come in an order that
            depends on ``config.split_seed``, since of many rows the first ones stand for all.
        validation_context: Their context, where there is a `context`.
        check: Is given the samples before they are divided, in the order of the source, and raises what it has against
            them.

    Returns:
        The samples, in the values and the type of the source.

    Raises:
        DataError: The data is missing, unreadable, or not fit to train on; the message says what to do.

    Example:
        >>> import torch
        >>> splits = load(torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)))
        >>> len(splits.train), splits.event_shape, splits.train.tensor().dtype
        (800, (3,), torch.float32)
    """
    if isinstance(data, Splits):
        if context is not None:
            raise DataError("Splits have contexts of their own: make them of samples.carrying(context=...)")
        if validation is not None or validation_context is not None:
            raise DataError("Splits have validation samples of their own: leave validation out")
        if check is not None:
            check(data)
        return data
    if data is None or (isinstance(data, str) and not data):
        data = config.name
        if not data:
            raise DataError("no data: pass a name, a path or an array, or set data.name (see pyrnode.data.sources)")
    source = _source(data, config)
    if context is not None:
        values, names = _context(context, source)
        source = replace(source, context=values, context_features=names)
    if validation is not None:
        source = with_validation(source, validation, validation_context, config)
    elif validation_context is not None:
        raise DataError("validation_context is given, but no validation: pass the rows that it belongs to")
    if check is not None:
        check(source)
    if validation is not None and source.validation is not None:
        rows = torch.Generator().manual_seed(config.split_seed)
        order = torch.randperm(len(source.validation), generator=rows, device="cpu")
        source = replace(source, validation=source.validation.take(order))
    splits = source.split(config)
    if splits.levels is None and not splits.is_image and isinstance(splits.train, TensorSamples):
        check_varies(splits.train.tensor(), f"{splits.name} (training split)", splits.features)
    return splits


def leaves_files(data: Any, config: DataConfig) -> bool:
    """Whether `load` may leave files of that data on a disk, which one process then does for the others."""
    name = config.name if data is None or (isinstance(data, str) and not data) else data
    if isinstance(name, str) and name in sources:
        return name in images.DOWNLOADED
    return isinstance(name, (str, os.PathLike)) and mapped.large(Path(name).expanduser())


def _source(data: Any, config: DataConfig) -> Source:
    if isinstance(data, str):
        if data in sources:
            return _named(data, config)
        path = Path(data).expanduser()
        if not path.exists() and not path.suffix and path.name == data:
            raise DataError(f"{unknown_name('data set', data, sources)}; and there is no file or folder of that name")
        return _from_path(path, config)
    if isinstance(data, os.PathLike):
        return _from_path(Path(data).expanduser(), config)
    if isinstance(data, synthetic.Density):
        return _from_density(data, config)
    if isinstance(data, Dataset):
        return _from_dataset(data, config)
    if is_frame(data):
        return files.frame_source(data, config)
    if isinstance(data, (Tensor, np.ndarray)):
        return _from_array(data, config)
    hint = "; make an array of it: numpy.array(data)" if isinstance(data, (list, tuple)) else ""
    hint = "; of one column, take data.to_frame()" if hasattr(data, "to_frame") else hint
    raise DataError(
        f"cannot load a {type(data).__name__}: expected a name, a path, an array, a tensor, a data frame, a torch data "
        f"set, a synthetic density or Splits{hint}"
    )


def _context(context: Any, source: Source) -> tuple[Tensor, Names | None]:
    """A context for the samples of a source, checked, and the names of its features, if it has some."""
    if source.validation is not None or source.test is not None:
        raise DataError(
            f"{source.name} has a test set of its own, which a context cannot be divided for: pass the samples as one "
            "array, or Splits of samples.carrying(context=...)"
        )
    names = None
    if is_frame(context):
        context, names = read_frame(context, "the context")
    values = numbers(context, "the context").detach().cpu()
    if values.ndim == 1:
        raise DataError(
            f"the context has shape {tuple(values.shape)}: pass context[:, None] for one feature, or "
            "torch.nn.functional.one_hot(context) for classes"
        )
    if values.ndim < 2 or len(values) != len(source.samples) or not all(values.shape[1:]):
        raise DataError(f"the context has shape {tuple(values.shape)}: expected ({len(source.samples)}, m)")
    kept = values.ndim > 2 or values.dtype in (torch.float32, torch.float64)  # images of bytes stay small
    values = values if kept else values.double()
    if not computable(values):
        raise bad_value(values, "the context", names, 0)
    return values, names


def _named(name: str, config: DataConfig) -> Source:
    folder = _folder(config)
    reader: Callable[[str, Path, DataConfig], Source]
    if name in synthetic.DENSITIES:
        return _from_density(synthetic.DENSITIES[name], config)
    reader = images.named_source if name in images.NAMES else maf.named_source
    return reader(name, folder, config)


def _folder(config: DataConfig) -> Path:
    return Path(config.dir or os.environ.get("PYRNODE_DATA") or "data").expanduser()


def labels(name: str, *, config: DataConfig = _DEFAULT) -> Splits:
    """The classes of the images of a named set, ``(n, 1)`` integers, ordered and split as `load` does.

    Raises:
        DataError: The set has no classes here, or is missing.
    """
    return images.labels(name, _folder(config), config)


def _from_path(path: Path, config: DataConfig) -> Source:
    if not path.exists():
        raise DataError(f"{path} does not exist")
    return images.folder_source(path, config) if path.is_dir() else files.file_source(path, config)


def _from_density(density: synthetic.Density, config: DataConfig) -> Source:
    if config.levels is not None:
        raise DataError(f"{density.name} is continuous: leave levels = {config.levels} unset")
    samples = TensorSamples(density.sample(config.samples, seed=config.split_seed))
    return Source(density.name, samples, density.event_shape, density=density)


def _from_dataset(dataset: Dataset[Any], config: DataConfig) -> Source:
    name = type(dataset).__name__
    samples = DatasetSamples(dataset, levels=config.levels)
    shape, levels = samples.event_shape, config.levels
    if not samples.dtype.is_floating_point:
        levels = levels or 256
    elif len(shape) == 3:
        check_not_scaled_pixels(samples.first(10).x, name)
    return Source(name, samples, shape, levels)


def _from_array(array: Any, config: DataConfig) -> Source:
    what = "the tensor" if isinstance(array, Tensor) else "the array"
    values, levels = check_array(array_tensor(array, what), what, config.levels)
    return Source("array", TensorSamples(values), tuple(values.shape[1:]), levels)
