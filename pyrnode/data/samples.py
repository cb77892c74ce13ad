"""Sets of samples with random access, and their division into train, validation and test."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pyrnode.config import DataConfig
from pyrnode.data.arrays import check_item, item_tensor
from pyrnode.data.frames import ordering
from pyrnode.data.synthetic import Density
from pyrnode.errors import DataError
from pyrnode.seeds import Noise, Share, ShareNoise

MINIMUM = 10
"""Fewest samples that are worth splitting in three."""


@dataclass(frozen=True)
class Batch:
    """Samples with what belongs to each of them.

    Attributes:
        x: ``(batch, *event)``, in the values of the source.
        context: What they are conditional on, ``(batch, m)``, or ``(batch, *shape)`` for an embedding; `None` without
            one.
        weight: Their weights, ``(batch,)``, float64; `None` where all weigh alike.
        share: Which rows of a batch these are, where other processes have the rest of it; `None` for a whole one.
    """

    x: Tensor
    context: Tensor | None = None
    weight: Tensor | None = None
    share: Share | None = None

    def __len__(self) -> int:
        return len(self.x)

    def none(self) -> Batch:
        """No samples, like these."""
        context = None if self.context is None else self.context[:0]
        return Batch(self.x[:0], context, None if self.weight is None else self.weight[:0])

    @property
    def total(self) -> int:
        """Samples of the whole batch."""
        return len(self) if self.share is None else self.share.total

    def noise(self, generator: torch.Generator) -> Noise:
        """Where the samples' random numbers come from, if those of the whole batch come from `generator`."""
        return generator if self.share is None else ShareNoise(generator, self.share)


class Samples(ABC):
    """A set of samples with random access, in the values of the source: nothing is scaled or dequantised.

    Attributes:
        context: What the samples are conditional on, ``(n, m)``, or ``(n, *shape)`` for an embedding, on the CPU;
            `None` without one.
        weight: Their weights, ``(n,)``, positive and with mean 1, float64; `None` where all weigh alike.
    """

    context: Tensor | None = None
    weight: Tensor | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def _take(self, indices: Tensor) -> Samples:
        """`take`, without context and weights."""

    @abstractmethod
    def _batches(self, order: Tensor, batch_size: int, workers: int) -> Iterator[Tensor]:
        """The samples of `batches`, after its arguments have been checked."""

    def carrying(self, *, context: Tensor | None = None, weight: Tensor | None = None) -> Self:
        """The same samples with contexts ``(n, *shape)``, and with weights ``(n,)``, which are brought to mean 1.

        Raises:
            DataError: They are not one for each sample; a weight is not finite and positive.
        """
        count = len(self)
        if context is not None and (context.ndim < 2 or len(context) != count or not all(context.shape[1:])):
            raise DataError(f"contexts of shape {tuple(context.shape)}: expected ({count}, m), one for each sample")
        if weight is not None:
            weight = weight.double().cpu()
            if tuple(weight.shape) != (count,):
                raise DataError(f"weights of shape {tuple(weight.shape)}: expected one for each of {count} samples")
            if not bool((torch.isfinite(weight) & (weight > 0)).all()):
                raise DataError("weights must be finite and positive: leave out the samples of weight zero")
            weight = weight / weight.mean()
        new = copy.copy(self)
        new.context, new.weight = context, weight
        return new

    def take(self, indices: Tensor) -> Samples:
        """The samples with these indices, in this order, as a set of their own, with what belongs to them."""
        context = None if self.context is None else self.context[indices]
        weight = None if self.weight is None else self.weight[indices]
        return self._take(indices).carrying(context=context, weight=weight)

    def batches(self, order: Tensor, batch_size: int, *, workers: int = 0) -> Iterator[Batch]:
        """Batches of the samples ``order[0], order[1], …``; the last one may be smaller.

        Args:
            order: Indices of samples, int64, one-dimensional; any subset, any order, repeats allowed.
            batch_size: Most samples in one batch.
            workers: Loader processes, where the samples are not in memory; 0 loads in this process.

        Returns:
            An iterator over batches of at most `batch_size` samples: uint8 for images and discrete data (int32 from
            257 levels on), float32 or float64 for continuous data.

        Raises:
            DataError: An index is out of range, an argument is not usable, or a sample cannot be read.
        """
        if order.ndim != 1 or order.dtype != torch.int64:
            raise DataError(f"order: expected a one-dimensional int64 tensor, got {_kind(order)}")
        if len(order) and (int(order.min()) < 0 or int(order.max()) >= len(self)):
            raise DataError(f"order: indices {int(order.min())}..{int(order.max())} of {len(self)} samples")
        if batch_size < 1 or workers < 0:
            raise DataError(f"batch_size = {batch_size}, workers = {workers}: expected at least 1 and at least 0")
        return self._joined(order, batch_size, workers) if len(order) else iter(())

    def shares(self, order: Tensor, batch_size: int, share: Callable[[int], Share | None]) -> Iterator[Batch]:
        """`batches`, of each the rows that are this process's, of which there may be none.

        Args:
            order: As in `batches`.
            batch_size: As in `batches`.
            share: Which rows of a batch of so many they are; `None` for all.
        """
        for rows in order.split(batch_size):
            part = share(len(rows))
            taken = rows if part is None else rows[part.rows]
            found = next(self.batches(taken, batch_size), None)
            yield replace(found or self.first(1).none(), share=part)

    def _joined(self, order: Tensor, batch_size: int, workers: int) -> Iterator[Batch]:
        for rows, x in zip(order.split(batch_size), self._batches(order, batch_size, workers), strict=True):
            context = None if self.context is None else self.context[rows]
            yield Batch(x, context, None if self.weight is None else self.weight[rows])

    def first(self, count: int) -> Batch:
        """The first samples, at most `count`, as one batch."""
        return next(self.batches(torch.arange(min(count, len(self)), device="cpu"), count))

    def tensor(self) -> Tensor:
        """All samples in memory, ``(n, *event_shape)``."""
        return torch.cat([batch.x for batch in self.batches(torch.arange(len(self), device="cpu"), 1024)])


class TensorSamples(Samples):
    """Samples in memory.

    Args:
        values: The samples, ``(n, *event_shape)``, on the CPU.
    """

    def __init__(self, values: Tensor) -> None:
        if values.ndim < 2 or values.device.type != "cpu":
            raise DataError(f"samples: expected a tensor (n, *event_shape) on the CPU, got {_kind(values)}")
        self._values = values.detach()

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"TensorSamples({_kind(self._values)})"

    def _take(self, indices: Tensor) -> TensorSamples:
        return TensorSamples(self._values[indices])

    def _batches(self, order: Tensor, batch_size: int, workers: int) -> Iterator[Tensor]:
        for chunk in order.split(batch_size):
            yield self._values[chunk]

    def tensor(self) -> Tensor:
        return self._values


class DatasetSamples(Samples):
    """Samples that a map-style `torch.utils.data.Dataset` reads when they are asked for.

    An item is a tensor, an array or a PIL image, or a tuple that starts with one (labels are ignored). All must have
    the shape and type of the first; each is checked when it is read. Worker processes are spawned (never forked: a
    fork after Julia has started hangs) and are kept for the next pass. The loader draws no number from torch's global
    generator; a data set with random transforms of its own, however, cannot be resumed bit for bit.

    Args:
        dataset: The data set.
        indices: The items that belong to this set; default all of them.
        levels: Number of grey levels, for discrete data.

    Raises:
        DataError: The data set has no random access or no length, is empty, or its first item is of no use.
    """

    def __init__(self, dataset: Dataset[Any], *, indices: Tensor | None = None, levels: int | None = None) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise DataError(
                f"{type(dataset).__name__} has no random access: expected a map-style data set with __getitem__ and "
                "__len__; collect a stream into a tensor first"
            )
        size = len(cast(Sized, dataset))
        if size == 0:
            raise DataError(f"{type(dataset).__name__} is empty")
        self._indices = torch.arange(size, device="cpu") if indices is None else indices
        first = item_tensor(dataset[0], "item 0", levels)
        self._items = _Items(dataset, tuple(first.shape), first.dtype, levels)
        self._levels = levels
        self._loader: DataLoader[Tensor] | None = None
        self._sampler = _BatchSampler()
        self._busy = False

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self._items.shape

    @property
    def dtype(self) -> torch.dtype:
        """Type of the samples."""
        return self._items.dtype

    def __len__(self) -> int:
        return len(self._indices)

    def __repr__(self) -> str:
        return f"DatasetSamples({type(self._items.dataset).__name__}, {len(self)} of shape {self.event_shape})"

    def _take(self, indices: Tensor) -> DatasetSamples:
        return DatasetSamples(self._items.dataset, indices=self._indices[indices], levels=self._levels)

    def _batches(self, order: Tensor, batch_size: int, workers: int) -> Iterator[Tensor]:
        chunks = [chunk.tolist() for chunk in self._indices[order].split(batch_size)]
        if workers:
            yield from self._load_in_workers(chunks, workers)
        else:
            for chunk in chunks:
                yield _stack([self._items[i] for i in chunk])

    def _load_in_workers(self, chunks: list[list[int]], workers: int) -> Iterator[Tensor]:
        if self._busy:  # two passes over one set at once: the second gets processes of its own
            yield from self._start(_loader(self._items, _BatchSampler(chunks), workers, keep=False))
            return
        if self._loader is None or self._loader.num_workers != workers:
            self._loader = _loader(self._items, self._sampler, workers, keep=True)
        self._busy, self._sampler.batches = True, chunks
        try:
            yield from self._start(self._loader)
        except RuntimeError as error:
            raise DataError(
                f"the loader processes failed ({error}); use workers=0, and in a script keep the call under "
                '`if __name__ == "__main__":`'
            ) from error
        finally:
            self._busy = False

    def _start(self, loader: DataLoader[Tensor]) -> Iterator[Tensor]:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Got pickle error")  # it recommends to fork
                return iter(loader)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise DataError(
                f"{type(self._items.dataset).__name__} cannot be sent to loader processes ({error}); define it and its "
                "transforms at the top level of a module, or use workers=0"
            ) from error


class _Items:
    """The items of a data set as checked tensors; goes to the loader processes."""

    def __init__(self, dataset: Dataset[Any], shape: tuple[int, ...], dtype: torch.dtype, levels: int | None) -> None:
        self.dataset, self.shape, self.dtype, self.levels = dataset, shape, dtype, levels

    def __getitem__(self, index: int) -> Tensor:
        value = item_tensor(self.dataset[index], f"item {index}", self.levels)
        return check_item(value, f"item {index}", self.shape, self.dtype)

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))


class _BatchSampler:
    """Batches of indices that can be replaced between two passes of the same loader processes."""

    def __init__(self, batches: list[list[int]] | None = None) -> None:
        self.batches = batches or []

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _loader(items: _Items, sampler: _BatchSampler, workers: int, *, keep: bool) -> DataLoader[Tensor]:
    return DataLoader(
        cast("Dataset[Tensor]", items),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_stack,
        multiprocessing_context="spawn",
        persistent_workers=keep,
        generator=torch.Generator(),  # otherwise each pass would advance torch's global generator
    )


def _stack(items: list[Tensor]) -> Tensor:
    return torch.stack(items)


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


@dataclass(frozen=True)
class Splits:
    """Train, validation and test samples of one source.

    Args:
        name: What the source is called in reports.
        train: Samples to fit.
        validation: Samples for model selection.
        test: Samples for the final report, and nothing else.
        event_shape: ``(d,)`` for vectors, ``(C, H, W)`` for images.
        levels: Number of grey levels of discrete data (values ``0 .. levels-1``); `None` for continuous data.
        density: The true density, where the data is synthetic.
        features: Names of the columns of a table; `None` where they have none.
        context_features: The same of the contexts.

    Where the density is conditional, all three carry contexts (`Samples.carrying`).
    """

    name: str
    train: Samples
    validation: Samples
    test: Samples
    event_shape: tuple[int, ...]
    levels: int | None = None
    density: Density | None = None
    features: tuple[str, ...] | None = None
    context_features: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for part in ("train", "validation", "test"):
            count = len(getattr(self, part))
            if count == 0:
                raise DataError(f"{self.name}: the {part} split is empty; give more samples or a larger share")
            context = getattr(self, part).context
            given, expected = (None if x is None else (count, *x.shape[1:]) for x in (context, self.train.context))
            if given != expected:
                raise DataError(f"{self.name}: contexts of shape {given} in the {part} split: expected {expected}")

    def ordered(self, features: tuple[str, ...] | None, context_features: tuple[str, ...] | None) -> Splits:
        """The same with the columns in the order of a model's; `DataError` if they are others."""
        order = ordering(self.features, features, self.name)
        context_order = ordering(self.context_features, context_features, f"the context of {self.name}")
        if order is None and context_order is None:
            return self
        parts = {name: getattr(self, name) for name in ("train", "validation", "test")}
        for name, samples in parts.items():
            values = samples if order is None else TensorSamples(samples.tensor()[:, order])
            context = samples.context
            if context is not None and context_order is not None:
                context = context[:, context_order]
            parts[name] = values.carrying(context=context, weight=samples.weight)
        names = self.features if order is None else features
        context_names = self.context_features if context_order is None else context_features
        return replace(self, **parts, features=names, context_features=context_names)

    @property
    def context_shape(self) -> tuple[int, ...]:
        """Shape of one context, ``(m,)`` where it is a vector; ``(0,)`` without one."""
        return (0,) if self.train.context is None else tuple(self.train.context.shape[1:])

    @property
    def context_dim(self) -> int:
        """Number of features of the context; 0 without one."""
        return math.prod(self.context_shape)

    @property
    def is_image(self) -> bool:
        """Whether a sample is an image ``(C, H, W)``."""
        return len(self.event_shape) == 3


@dataclass(frozen=True)
class Source:
    """What a reader hands over to be split: the samples, and what is known about them.

    `validation` and `test` are the source's own, where it has them; `context` ``(n, *shape)`` belongs to the samples,
    and `context_features` are the names of its columns.
    """

    name: str
    samples: Samples
    event_shape: tuple[int, ...]
    levels: int | None = None
    density: Density | None = None
    features: tuple[str, ...] | None = None
    validation: Samples | None = None
    test: Samples | None = None
    context: Tensor | None = None
    context_features: tuple[str, ...] | None = None

    def split(self, config: DataConfig) -> Splits:
        """Divides the samples by a permutation that depends on the number of samples and ``config.split_seed`` alone.

        The permutation starts with the test samples (unless the source has its own), then validation, then train.
        """
        n = len(self.samples)
        if n < MINIMUM:
            raise DataError(f"{self.name}: {n} samples; expected at least {MINIMUM}")
        n_test = 0 if self.test else max(1, round(config.test * n))
        n_validation = 0 if self.validation else max(1, round(config.validation * n))
        if n_test + n_validation >= n:
            raise DataError(
                f"{self.name}: validation = {config.validation} and test = {config.test} leave no training sample"
            )
        order = torch.randperm(n, generator=torch.Generator().manual_seed(config.split_seed), device="cpu")
        test, validation, train = order.tensor_split([n_test, n_test + n_validation])
        train = train[: config.limit]
        samples = self.samples.carrying(context=self.context)
        return Splits(
            name=self.name,
            train=samples.take(train),
            validation=self.validation or samples.take(validation),
            test=self.test or samples.take(test),
            event_shape=self.event_shape,
            levels=self.levels,
            density=self.density,
            features=self.features,
            context_features=self.context_features,
        )
