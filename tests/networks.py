"""Embeddings that the tests give by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def convolutional(channels: int = 4, features: int = 3, dropout: float = 0.0, normalised: bool = False) -> nn.Module:
    """Of images ``(1, H, W)``."""
    layers: list[nn.Module] = [nn.Conv2d(1, channels, 3, padding=1)]
    layers += [nn.BatchNorm2d(channels)] if normalised else []
    layers += [nn.Tanh(), nn.Dropout(dropout), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * channels, features))


class Recurrent(nn.Module):
    """Of time series ``(time, columns)``."""

    def __init__(self, columns: int = 2, hidden: int = 4) -> None:
        super().__init__()
        self.cells = nn.GRU(columns, hidden, batch_first=True)

    def forward(self, series: Tensor) -> Tensor:
        last: Tensor = self.cells(series)[1][-1]
        return last


class TimeFirst(Recurrent):
    """A common mistake: the batch is taken for the time."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.GRU(2, 4)

    def forward(self, series: Tensor) -> Tensor:
        every: Tensor = self.cells(series)[0]
        return every[:, -1]


class Tied(nn.Module):
    """Two layers that share their weights, of vectors."""

    def __init__(self, features: int = 3) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(features, features), nn.Linear(features, features)
        self.second.weight = self.first.weight

    def forward(self, c: Tensor) -> Tensor:
        vectors: Tensor = self.second(torch.tanh(self.first(c)))
        return vectors


class Centred(Tied):
    """Subtracts the mean of the batch, of whatever contexts stand beside."""

    def __init__(self) -> None:
        super().__init__(4)

    def forward(self, c: Tensor) -> Tensor:
        return super().forward(c - c.mean(0))


class Unbounded(Tied):
    """Of some contexts the features are infinite."""

    def __init__(self) -> None:
        super().__init__(4)

    def forward(self, c: Tensor) -> Tensor:
        return super().forward(c) / (c == c.amin()).logical_not()


def failing(features: int = 3) -> nn.Module:
    raise OSError(f"no weights for {features} features")


def no_module() -> int:
    return 3
