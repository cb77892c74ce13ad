"""What two examples share: networks that make vectors of observations, and exact posteriors on a grid.

They stand in a module of their own, so that a run's model file can name them: ``pyrnode.load(run, embedding=...)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyrnode import Flow


def convolutional(channels: int = 16, features: int = 16) -> nn.Module:
    """Of images ``(1, 12, 12)``, whose pixels are of the order of 1."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.SiLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(36 * channels, features),
    )


class Recurrent(nn.Module):
    """Of time series ``(time, columns)``: the last state of gated recurrent units."""

    def __init__(self, columns: int = 1, features: int = 24) -> None:
        super().__init__()
        self.cells = nn.GRU(columns, features, batch_first=True)

    def forward(self, series: Tensor) -> Tensor:
        return self.cells(series)[1][-1]


def exact_posterior(
    log_likelihood: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, cells: int, n: int
) -> tuple[Tensor, Tensor]:
    """Samples of a posterior under a uniform prior on a box, by a grid.

    Args:
        log_likelihood: Of parameters ``(k, d)``, ``(k,)``.
        low, high: Corners of the box, ``(d,)``.
        cells: Cells of the grid along each parameter.
        n: Number of samples.

    Returns:
        Samples ``(n, d)``, each anywhere in its cell, and their log-densities in nats, ``(n,)``.
    """
    centres = (torch.arange(cells) + 0.5) / cells
    unit = torch.cartesian_prod(*[centres] * len(low))
    values = log_likelihood(low + (high - low) * unit).double()
    volume = (high - low).double().prod() / len(unit)
    evidence = values.logsumexp(0) + volume.log()
    chosen = torch.multinomial((values - values.max()).exp(), n, replacement=True)
    theta = low + (high - low) * (unit[chosen] + (torch.rand(n, len(low)) - 0.5) / cells)
    return theta, log_likelihood(theta).double() - evidence


def gap(log_p: Tensor, log_q: Tensor) -> tuple[float, float]:
    """Mean of log p − log q over samples of p, the Kullback-Leibler divergence, and its standard error, in nats."""
    difference = log_p - log_q
    return float(difference.mean()), float(difference.std() / math.sqrt(len(difference)))


@torch.no_grad()
def gaps(
    flow: Flow, observed: Tensor, exact: list[tuple[Tensor, Tensor]], low: Tensor, high: Tensor
) -> dict[str, float]:
    """How far flow and prior are from exact posteriors, in nats: the mean over the observations, each with its own."""
    prior = -(high - low).log().sum()
    return {
        "flow": sum(gap(p, flow.log_prob(theta, x))[0] for x, (theta, p) in zip(observed, exact, strict=True))
        / len(exact),
        "prior": sum(gap(p, prior)[0] for _, p in exact) / len(exact),
    }
