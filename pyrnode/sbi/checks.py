"""Whether to believe a posterior: ranks of true parameters among its samples, in three ways, none of which needs truth.

If ``q(θ | x)`` is the posterior, the parameters that a simulation came from are like one more sample of it: their rank
among L samples is any of 0 to L with the same probability. What is ranked makes the difference:

* a coordinate θ_i: simulation-based calibration (SBC; Talts et al. 2018, arXiv 1804.06788);
* the density, log q(θ | x): expected coverage of the regions of highest density (Hermans et al. 2022,
  arXiv 2110.06581);
* the distance to a point that is drawn by itself (TARP; Lemos et al. 2023, arXiv 2302.03026): from samples alone, and
  for enough points uniform ranks are not only necessary but sufficient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrnode.errors import ConfigError, DataError
from pyrnode.flow import Flow
from pyrnode.seeds import generator, seeded
from pyrnode.settings import whole


@dataclass(frozen=True)
class Ranks:
    """Ranks of true parameters among samples of posteriors, each spread within its share of (0, 1).

    Attributes:
        values: ``(n, d + 2)``: by coordinate, then of the density, then of the distance; uniform if all is right.
        names: What the columns are.
        log_prob: log q at the true parameters, nats, ``(n,)``: the held-out score, which ranks alone do not replace.
    """

    values: Tensor
    names: tuple[str, ...]
    log_prob: Tensor

    def coverage(self, level: float) -> float:
        """How many of the truths the regions of highest density hold that should hold this share of them."""
        return float((self.values[:, -2] >= 1 - level).double().mean())

    def distances(self) -> dict[str, float]:
        """How far each column's distribution is from the uniform one, ``max |F_n(u) − u|``.

        Of right ones it is below ``sqrt(log(2/α)/(2n))`` with a probability of at least 1 − α: 0.078 for 300 and 5 %.
        """
        ordered, n = self.values.double().sort(0).values, len(self.values)
        above = torch.arange(1, n + 1, dtype=torch.float64, device="cpu")[:, None] / n
        found = torch.maximum((above - ordered).abs(), (ordered - above + 1 / n).abs()).amax(0)
        return dict(zip(self.names, found.tolist(), strict=True))


@torch.no_grad()
def ranks(
    posterior: Any, theta: Tensor, x: Tensor, *, draws: int = 99, names: Sequence[str] | None = None, seed: int = 0
) -> Ranks:
    """Ranks of the parameters that simulations came from among samples of their posteriors.

        found = pyrnode.sbi.ranks(flow, theta, x)               # fresh simulations, none that were trained on
        pyrnode.comparisons.calibration_plot(found.values, names=found.names)

    Args:
        posterior: A conditional flow, or an estimator of sbi's, ours or another: nothing is rejected.
        theta: Parameters ``(n, d)``, drawn from the prior.
        x: An observation of each, ``(n, *shape)``.
        draws: Samples of each posterior.
        names: Names of the parameters.
        seed: Seed of the samples, of TARP's points, and of the place within a rank's share.

    Raises:
        DataError: The shapes do not fit.
        ConfigError: `draws` is no positive number, or there are not d names.
    """
    count = whole(draws, "draws", 1)
    if theta.ndim != 2 or len(theta) != len(x) or not len(theta):
        raise DataError(f"parameters of shape {tuple(theta.shape)}, observations of {tuple(x.shape)}: expected (n, d)")
    n, d = theta.shape
    labels = [f"θ{i}" for i in range(1, d + 1)] if names is None else list(names)
    if len(labels) != d:
        raise ConfigError(f"{len(labels)} names for {d} parameters: give one for each")
    drawn, log_true, log_drawn = _drawn(posterior, theta, x, count, seed)
    random = generator(seed, "ranks")
    low, high = theta.amin(0), theta.amax(0)
    points = low + (high - low) * torch.rand(n, d, generator=random, dtype=theta.dtype, device="cpu")
    scale = theta.std(0).clamp(min=torch.finfo(theta.dtype).tiny)
    away, farther = (((values - points) / scale).norm(dim=-1) for values in (drawn, theta))
    below = [drawn < theta, (log_drawn < log_true)[..., None], (away < farther)[..., None]]
    found = torch.cat(below, 2).sum(0)
    spread = torch.rand(found.shape, generator=random, dtype=torch.float64, device="cpu")
    columns = (*[f"SBC {label}" for label in labels], "coverage", "TARP")
    return Ranks((found + spread) / (count + 1), columns, log_true)


def _drawn(posterior: Any, theta: Tensor, x: Tensor, draws: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Samples ``(draws, n, d)``, and log-densities of the truths, ``(n,)``, and of the samples, ``(draws, n)``."""
    if isinstance(posterior, Flow):
        drawn = posterior.sample(draws, x, seed=seed).transpose(0, 1).to(theta)
        density = posterior.distribution(x, validate_args=False)
        return drawn, density.log_prob(theta), density.log_prob(drawn)
    if not (hasattr(posterior, "sample") and hasattr(posterior, "log_prob")):
        kind = type(posterior).__name__
        raise ConfigError(f"posterior = {kind}: expected a conditional flow, or a density estimator of sbi")
    with seeded(seed):
        drawn = posterior.sample(torch.Size([draws]), x)
    if tuple(drawn.shape) != (draws, *theta.shape) or not math.isfinite(float(drawn.sum())):
        raise DataError(f"samples of shape {tuple(drawn.shape)}: expected {(draws, *theta.shape)}, and finite ones")
    return drawn, posterior.log_prob(theta[None], x)[0], posterior.log_prob(drawn, x)
