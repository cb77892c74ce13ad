"""The base of the synthetic densities, and what they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pyrnode.errors import DataError


class Density(ABC):
    """A density on ``R^d`` that can be sampled.

    Attributes:
        name: Its name.
        description: A line about it.
        bounds: Window that holds nearly all of its mass: ``(xmin, xmax, ymin, ymax)``, or ``(xmin, xmax)`` for d = 1.
        exact: Whether `log_prob` and `entropy` are there.
    """

    exact: bool = True

    def __init__(self, name: str, description: str, bounds: tuple[float, ...]) -> None:
        self.name = name
        self.description = description
        self.bounds = bounds

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape ``(d,)`` of one sample."""
        return (len(self.bounds) // 2,)

    def sample(self, n: int, *, seed: int | torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """Independent samples.

        Args:
            n: Number of samples.
            seed: A seed, or a generator (on the CPU) to draw from.
            dtype: Type of the samples; the draws are made in double precision whatever it is.

        Returns:
            Tensor ``(n, d)``.
        """
        if n < 0:
            raise DataError(f"n = {n}: expected at least 0")
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        return self._sample(n, generator).to(dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats, evaluated in double precision.

        Args:
            x: Points ``(n, d)``, floating-point.

        Returns:
            Tensor ``(n,)`` of the type and on the device of `x`; ``-inf`` where the density is zero.

        Raises:
            DataError: `x` is not of shape ``(n, d)``, or the density has no closed form (`exact` is false).
        """
        if not self.exact:
            raise DataError(f"{self.name} has no closed form")
        (dim,) = self.event_shape
        if x.ndim != 2 or x.shape[1] != dim or not x.is_floating_point():
            raise DataError(f"x has shape {tuple(x.shape)} and type {x.dtype}: expected floats (n, {dim})")
        parts = [self._log_prob(chunk) for chunk in x.detach().to(torch.float64).split(self._rows)]
        return torch.cat(parts).to(x.dtype)

    def entropy(self) -> float:
        """Differential entropy in nats, by closed form or by quadrature to 1e-6; kept after the first call."""
        if not self.exact:
            raise DataError(f"{self.name} has no closed form")
        return self._entropy

    @abstractmethod
    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Samples ``(n, d)`` in double precision."""

    @abstractmethod
    def _log_prob(self, x: Tensor) -> Tensor:
        """Log-density ``(n,)`` of `x` ``(n, d)``, in double precision."""

    def _prob(self, x: Tensor) -> Tensor:
        """Density ``(n,)`` of `x`, in double precision; for where small values do not matter."""
        return self._log_prob(x).exp()

    @property
    @abstractmethod
    def scale(self) -> float:
        """Smallest length over which the density varies."""

    @property
    def _rows(self) -> int:
        """Points that are evaluated at once."""
        return 2**16

    @cached_property
    def _entropy(self) -> float:
        """``−∫ p log p`` by the trapezoidal rule, which converges exponentially for smooth densities on all of R^d."""
        margin, step = 6 * self.scale, self.scale / 3
        axes = [
            torch.arange(low - margin, high + margin, step, dtype=torch.float64, device="cpu")
            for low, high in zip(self.bounds[::2], self.bounds[1::2], strict=True)
        ]
        grid = torch.cartesian_prod(*axes).reshape(-1, len(axes))
        return sum(float(torch.special.entr(self._prob(x)).sum()) for x in grid.split(self._rows)) * step ** len(axes)


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal draws in double precision."""
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def gauss_legendre(low: float, high: float, *, panels: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of a composite rule with 16 nodes in each panel."""
    x, w = np.polynomial.legendre.leggauss(16)
    edges = np.linspace(low, high, panels + 1)
    half = np.diff(edges)[:, None] / 2
    nodes = (edges[:-1, None] + half * (x + 1)).ravel()
    return torch.from_numpy(nodes), torch.from_numpy((half * w).ravel())
