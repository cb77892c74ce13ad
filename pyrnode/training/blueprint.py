"""How a flow is built for data: its shapes, its names, and the transforms that are taken from the training samples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pyrnode.config import Config
from pyrnode.data import Splits
from pyrnode.dynamics import Dynamics, ModuleDynamics
from pyrnode.flow import Flow
from pyrnode.transforms import Chain, Standardize


class Blueprint:
    """What flows for some data have in common.

    Args:
        splits: Data.
        dynamics: The user's own dynamics by event shape.

    Attributes:
        make: The same, wrapped as `Dynamics`; `None` where the settings say what the dynamics are.
    """

    def __init__(self, splits: Splits, dynamics: Callable[[tuple[int, ...]], nn.Module] | None) -> None:
        self._splits, self._data_dtype = splits, _data_dtype(splits)
        self.make = None if dynamics is None else _wrapped(dynamics, splits.context_dim)

    def fitted(self, config: Config) -> Flow:
        """An untrained flow, with the transforms of the training samples."""
        return self.build(config, *_standardised(config, self._splits))

    def build(self, config: Config, transform: Chain | None = None, context_transform: Chain | None = None) -> Flow:
        """An untrained flow; without transforms, one that weights are loaded into."""
        splits = self._splits
        return Flow.build(
            config,
            splits.event_shape,
            levels=splits.levels,
            transform=transform,
            context_dim=splits.context_dim,
            context_transform=context_transform,
            data_dtype=self._data_dtype,
            features=splits.features,
            context_features=splits.context_features,
            dynamics=self.make,
        )


def _standardised(config: Config, splits: Splits) -> tuple[Chain | None, Chain | None]:
    """The transforms of data and contexts that are taken from the training samples; `None` where they need none."""
    train, transform, context_transform = splits.train, None, None
    if config.flow.standardize and splits.levels is None:
        transform = Chain([Standardize.fit(train.tensor(), train.weight)])
    if config.flow.standardize and train.context is not None:
        context_transform = Chain([Standardize.fit_context(train.context)])
    return transform, context_transform


def _data_dtype(splits: Splits) -> torch.dtype | None:
    """The type that holds continuous data and contexts; `None` where there are neither."""
    first = splits.train.first(1)
    given = [first.x] if splits.levels is None else []
    given += [] if first.context is None else [first.context]
    types = {x.dtype if x.is_floating_point() else torch.float64 for x in given}
    return torch.float64 if torch.float64 in types else next(iter(types), None)


def _wrapped(
    dynamics: Callable[[tuple[int, ...]], nn.Module], context_dim: int
) -> Callable[[tuple[int, ...]], Dynamics]:
    def make(shape: tuple[int, ...]) -> Dynamics:
        module = dynamics(shape)
        return module if isinstance(module, Dynamics) else ModuleDynamics(module, shape, context_dim)

    return make
