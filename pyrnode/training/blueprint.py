"""How a flow is built for data: its shapes, its names, and the transforms that are taken from the training samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from pyrnode.bounded import centred, check_near
from pyrnode.config import Config
from pyrnode.data import MappedSamples, Splits
from pyrnode.data.arrays import column
from pyrnode.data.frames import said
from pyrnode.data.samples import TensorSamples
from pyrnode.distributed import World, alone
from pyrnode.dynamics import Dynamics, ModuleDynamics
from pyrnode.edges import Edges
from pyrnode.embedding import Embedding, Given, Recipe
from pyrnode.errors import ConfigError, DataError
from pyrnode.flow import Flow, outset
from pyrnode.parts import check_memory
from pyrnode.radial import Radial
from pyrnode.transforms import CHOSEN_ON, Chain, Standardize, Transform, Whiten

_DRAWN = 20_000
"""Draws of discrete samples that their standardisation is taken from, where there are fewer samples."""

_NUMBERS = 2**26
"""Numbers of all draws together, at most: half a gigabyte."""

_COPIES = 4
"""How often training keeps each weight, at least: itself, its gradient, and Adam's two means."""

_PIECE = 2**16
"""Samples that are looked at at a time."""

_ROWS = 8
"""Contexts that an embedding is tried on: the first two may be the same one, which hides what mixes rows."""

_UNITS = 100
"""Units in the last place that contexts must differ by, somewhere, once they are in the flow's numbers."""

_HEAVY = 0.1
"""Nats per dimension that drawing in tails must bring the untrained flow: below it, it is many modes that look like
tails, which are harder to tell apart when they are drawn together (docs/training.md)."""

UNSAVED = (
    "the run has no model file: its embedding was given as a module, or by what has no name, or settings that are no "
    "plain values; give a function or class at the top level of a module (docs/conditional.md)"
)


class Blueprint:
    """What flows for some data have in common.

    Args:
        splits: Data.
        dynamics: The user's own dynamics by event shape.
        embedding: The user's network between contexts and blocks.

    Attributes:
        saved: Whether a file can describe these flows.

    Raises:
        ConfigError: The embedding is none, or has no contexts.
        DataError: There are contexts that only an embedding could take.
    """

    def __init__(
        self,
        splits: Splits,
        dynamics: Callable[[tuple[int, ...]], nn.Module] | None = None,
        embedding: Given | Recipe | None = None,
    ) -> None:
        self._splits, self._data_dtype, self._dynamics = splits, _data_dtype(splits), dynamics
        made = embedding is None or isinstance(embedding, Recipe)
        self._recipe = cast(Recipe | None, embedding) if made else Recipe.of(cast(Given, embedding))
        self._width: int | None = None
        self.saved = dynamics is None and (self._recipe is None or self._recipe.described() is not None)
        shape = splits.context_shape
        if self._recipe is not None and shape == (0,):
            raise ConfigError("embedding is given, but no context: it is what the embedding takes")
        if self._recipe is None and len(shape) > 1:
            raise DataError(
                f"contexts of shape {shape}: a flow takes vectors, (n, m); pass embedding=, a network that makes a "
                "vector of each, or context.reshape(len(context), -1)"
            )

    def fitted(self, config: Config, world: World = alone) -> Flow:
        """An untrained flow, with the transforms of the training samples, which the processes look at together.

        Raises:
            ConfigError: There is no room for its training.
            DataError: A sample is too far away to compute with.
        """
        splits = self._splits
        if self._dynamics is None:
            shape = config.flow.state_shape(splits.event_shape)
            check_memory(config, shape, self._features(config), copies=_COPIES)
        flow = self.build(config, *_standardised(config, splits, world))
        if flow.embedding is not None and splits.train.context is not None:
            _check_resolved(splits.train.context, flow.reference.dtype)
            few = splits.train.context[:_ROWS]
            flow.embedding.check(cast(Tensor, flow.condition(few, len(few))))
        for part in (splits.train, splits.validation):
            if splits.levels is None and isinstance(part, TensorSamples):
                _check_near_enough(flow, part, splits.name)
        return flow

    def build(self, config: Config, transform: Chain | None = None, context_transform: Chain | None = None) -> Flow:
        """An untrained flow; without transforms, one that weights are loaded into."""
        splits = self._splits
        if self._width is None:
            self._width = self._features(config)
        return Flow.build(
            config,
            splits.event_shape,
            levels=splits.levels,
            transform=transform,
            context_dim=self._width,
            context_transform=context_transform,
            data_dtype=self._data_dtype,
            features=said(splits.features),
            context_features=said(splits.context_features),
            dynamics=None if self._dynamics is None else _wrapped(self._dynamics, self._width),
            embedding=self._recipe,
            context_shape=splits.context_shape,
        )

    @torch.inference_mode(False)
    def _features(self, config: Config) -> int:
        """Number of features that the blocks take of a context."""
        if self._recipe is None:
            return self._splits.context_dim
        dtype = getattr(torch, config.dtype)
        return Embedding.build(self._recipe, self._splits.context_shape, dtype, config.seed).width


def _check_near_enough(flow: Flow, samples: TensorSamples, name: str) -> None:
    """Raises `DataError` where a sample is so far from zero that its square is none in the flow's numbers."""
    most, chosen = math.sqrt(torch.finfo(flow.reference.dtype).max / flow.dim), flow.config.flow.standardize

    def away(x: Tensor) -> Tensor:
        return flow.transformed(x)[0].flatten(1).abs().amax(1)

    with torch.no_grad():
        for x in samples.tensor().split(_PIECE):
            y = away(x)
            if not bool((y < most).all()):
                row = int((~(y < most)).nonzero()[0])
                value, where = x[row].flatten(), "in an image"
                worst = int(value.abs().argmax())
                if x.ndim == 2:  # the column without whose value it were nearest, wherever the transforms take it
                    without = value.repeat(len(value), 1)
                    without.diagonal().copy_(x.median(0).values)
                    worst = int(away(without).nan_to_num(nan=math.inf).argmin())
                    where = f"in column {column(worst, flow.features)}"
                remedy = ", or take standardize = 'auto'" if chosen == "none" else ""
                raise DataError(
                    f"{name} has {float(value[worst]):g} {where}, which is {float(y[row]):.2g} where the flow computes "
                    f"(standardize = {chosen!r}), and its square is no number in {flow.config.dtype}: leave such rows "
                    f"out{remedy}"
                )


def _check_resolved(context: Tensor, dtype: torch.dtype) -> None:
    """Raises `DataError` where contexts differ, but by so little that an embedding would see rounding.

    Vectors are standardised before they are rounded, other shapes are not.
    """
    if context.ndim == 2:
        return
    c = context[:CHOSEN_ON].flatten(1)
    low, high = c.amin(0).double(), c.amax(0).double()
    size, spread = torch.maximum(low.abs(), high.abs()), high - low
    differ = spread > 0
    if bool(differ.any()) and bool((spread <= _UNITS * torch.finfo(dtype).eps * size)[differ].all()):
        raise DataError(
            f"the contexts differ by {float(spread.max()):.2g} at values of {float(size.max()):.2g}, which is rounding "
            f"in {str(dtype).removeprefix('torch.')}: subtract their mean, in float64, and divide by their spread"
        )


def _standardised(config: Config, splits: Splits, world: World) -> tuple[Chain | None, Chain | None]:
    """The transforms of data and contexts that are taken from the training samples; `None` where they need none."""
    train, transform, context_transform = splits.train, None, None
    first = outset(config, splits.event_shape, splits.levels, splits.features, splits.context_features)
    if splits.levels is None:
        check_near(train, first, splits.name, splits.features)
    if Chain(first).turns > 1:
        few = train.first(CHOSEN_ON)
        first = centred(first, few.x, few.weight)
        transform = Chain(first)
    if config.flow.standardizes(splits.event_shape, splits.levels):
        begin = Chain(first)
        if isinstance(train, MappedSamples) and splits.levels is None:
            found = _to_standard_mapped(config, splits, train, begin, world)
        else:
            found = _to_standard(config, splits, begin)
        transform = Chain([*begin.transforms, *found])
    if config.flow.scales_features and train.context is not None and train.context.ndim == 2:
        context_transform = Chain([Standardize.fit_context(train.context)])
    return transform, context_transform


def _to_standard(config: Config, splits: Splits, begin: Chain) -> Iterator[Transform]:
    """Takes the training samples to mean 0 and variance 1, and on their principal axes where that is asked for.

    Args:
        config: Settings.
        splits: Data. Of discrete data the first samples, each under several draws of its noise where there are few.
        begin: What they go through before.
    """
    train, copies = splits.train, 1
    if splits.levels is None:
        x, weight = train.tensor(), train.weight
    else:
        dim = math.prod(splits.event_shape)
        few = train.first(min(CHOSEN_ON, max(1, _NUMBERS // dim)))
        x, weight = few.x, few.weight
        copies = max(1, min(math.ceil(_DRAWN / len(few)), _NUMBERS // (len(few) * dim)))
    noise = torch.Generator("cpu").manual_seed(config.seed)
    y = torch.cat([begin(begin.unwrapped(x)[: len(x)], noise)[0] for _ in range(copies)])
    weights = None if weight is None else weight.repeat(copies)
    if config.flow.opens(splits.event_shape, splits.levels):
        yield (edges := Edges.fit(y[:CHOSEN_ON], None if weight is None else weight[:CHOSEN_ON]))
        y = edges(y)[0]
    yield (scale := _pooled(config, Standardize.fit(y, weights)))
    if config.flow.whitens(splits.event_shape):
        y = scale(y)[0]
        few = y[: len(x)]  # no two of which are draws of one sample
        yield from _axes(config, splits, few, weight, lambda shrinkage: Whiten.fit(y, weights, shrinkage=shrinkage))


def _pooled(config: Config, scale: Standardize) -> Standardize:
    return scale.by_channel() if config.flow.standardize == "channels" else scale


def _axes(
    config: Config, splits: Splits, few: Tensor, weight: Tensor | None, fit: Callable[[float], Whiten]
) -> Iterator[Transform]:
    """The whitening, by `fit` with the shrinkage that is best of some of the samples; and what draws their tails in."""
    auto = config.flow.standardize == "auto"
    shrinkage = Whiten.best_shrinkage(few, weight) if auto else 0.0
    yield (whiten := Whiten.identity(few.shape[1], few.device) if shrinkage == 1 else fit(shrinkage))
    if config.flow.draws_in(splits.event_shape):
        y, weight = whiten(few[:CHOSEN_ON])[0], None if weight is None else weight[:CHOSEN_ON]
        yield Radial.identity() if auto and Radial.gain(y, weight) < _HEAVY else Radial.fit(y, weight)


def _to_standard_mapped(
    config: Config, splits: Splits, train: MappedSamples, begin: Chain, world: World
) -> Iterator[Transform]:
    """The same of samples that are not in memory: from sums over pieces of the file, which the processes divide."""
    few = train.first(CHOSEN_ON)
    if config.flow.opens(splits.event_shape, splits.levels):
        yield (edges := Edges.fit(begin(begin.unwrapped(few.x)[: len(few)])[0], few.weight))
        begin = Chain([*begin.transforms, edges])

    def mean(values: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The mean over the samples of what gives a sum over a piece's samples and their weights."""

        def here() -> tuple[Tensor, Tensor]:
            """The sums of this process, added up in place: what stays between large pieces would cut the heap up."""
            total, weights = torch.zeros(2, dtype=torch.float64, device="cpu").unbind()
            for piece in train.pieces(world.rank, world.size):
                weight = torch.ones(len(piece), dtype=torch.float64, device="cpu")
                weight = weight if piece.weight is None else piece.weight
                found = values(begin(begin.unwrapped(piece.x)[: len(piece)])[0].double(), weight)
                total = found if total.ndim == 0 else total.add_(found)
                weights.add_(weight.sum())
            return total, weights

        sums = [(total, weight) for total, weight in world.gathered(here) if total.ndim]
        whole = torch.stack([total for total, _ in sums]).sum(0)
        return whole / torch.stack([weight for _, weight in sums]).sum()

    def weighed(x: Tensor, weight: Tensor) -> Tensor:
        return (weight.reshape(-1, *[1] * (x.ndim - 1)) * x).sum(0)

    def products(x: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = scale(x)[0]
        return (y * weight[:, None]).T @ y

    centre = mean(weighed)
    spread = mean(lambda x, weight: weighed((x - centre).square(), weight)).sqrt()
    yield (scale := _pooled(config, Standardize(centre, spread)))
    if config.flow.whitens(splits.event_shape):
        fit = partial(Whiten.of_covariance, mean(products))
        y = scale(begin(begin.unwrapped(few.x)[: len(few)])[0])[0]
        yield from _axes(config, splits, y, few.weight, lambda shrinkage: fit(shrinkage=shrinkage))


def _data_dtype(splits: Splits) -> torch.dtype | None:
    """The type that holds continuous data and contexts that are vectors; `None` where there are neither."""
    first = splits.train.first(1)
    given = [first.x] if splits.levels is None else []
    given += [] if first.context is None or first.context.ndim > 2 else [first.context]
    types = {x.dtype if x.is_floating_point() else torch.float64 for x in given}
    return torch.float64 if torch.float64 in types else next(iter(types), None)


def _wrapped(
    dynamics: Callable[[tuple[int, ...]], nn.Module], context_dim: int
) -> Callable[[tuple[int, ...]], Dynamics]:
    def make(shape: tuple[int, ...]) -> Dynamics:
        module = dynamics(shape)
        return module if isinstance(module, Dynamics) else ModuleDynamics(module, shape, context_dim)

    return make
