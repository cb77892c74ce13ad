"""Densities around curves in the plane, by quadrature along the curve."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from pyrnode.data.density import Density, gauss_legendre, normal

_CHUNK = 2**18
"""Most entries (points × quadrature nodes) of one intermediate array."""


class Curves(Density):
    """Curves with Gaussian noise: ``x = γ_k(t) + σξ``, the curve k uniform, ``t`` with a given density on an interval.

    The density is a one-dimensional integral over ``t``, taken by composite Gauss–Legendre quadrature (relative error
    below 1e-8 where there is any mass to speak of; far out, log p keeps at least three digits).

    Args:
        name: Its name.
        description: A line about it.
        bounds: Window for plots.
        std: Standard deviation σ of the noise.
        panels: Panels of 16 nodes in the quadrature of each curve.
    """

    interval: tuple[float, float]
    """Where ``t`` lives."""

    def __init__(self, name: str, description: str, bounds: tuple[float, ...], *, std: float, panels: int) -> None:
        super().__init__(name, description, bounds)
        self.std = std
        t, weight = gauss_legendre(*self.interval, panels=panels)
        curves = self._points(t)
        self._nodes = curves.flatten(0, 1)
        self._log_weight = (weight * self._parameter_density(t) / len(curves)).log().repeat(len(curves))

    @abstractmethod
    def _points(self, t: Tensor) -> Tensor:
        """Points ``γ_k(t)`` of all K curves: ``(K, n, 2)`` for `t` of shape ``(n,)``."""

    def _parameter_density(self, t: Tensor) -> Tensor:
        """Density of ``t``: uniform."""
        return torch.full_like(t, 1 / (self.interval[1] - self.interval[0]))

    def _parameter(self, u: Tensor) -> Tensor:
        """``t`` for a uniform `u` in [0, 1]: the inverse of its distribution function."""
        return self.interval[0] + (self.interval[1] - self.interval[0]) * u

    @property
    def scale(self) -> float:
        return self.std

    @property
    def _rows(self) -> int:
        return max(1, _CHUNK // len(self._nodes))

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        curves = self._points(self._parameter(torch.rand(n, generator=generator, dtype=torch.float64, device="cpu")))
        which = torch.randint(len(curves), (n,), generator=generator, device="cpu")
        points = curves[which, torch.arange(n, device="cpu")]
        return points + self.std * normal(points.shape, generator)

    def _log_prob(self, x: Tensor) -> Tensor:
        nodes, log_weight = self._nodes.to(x.device), self._log_weight.to(x.device)
        # |x − γ|² as a product of matrices; in double precision the cancellation costs 1e-14 of the largest square
        squares = x.square().sum(1, keepdim=True) - 2 * x @ nodes.T + nodes.square().sum(1)
        terms = log_weight - squares / (2 * self.std**2)
        return torch.logsumexp(terms, dim=1) - math.log(2 * math.pi * self.std**2)


class Moons(Curves):
    """Two interleaved half circles of radius 2 (scikit-learn's ``make_moons``, scaled by 2 and centred)."""

    interval = (0.0, math.pi)

    def _points(self, t: Tensor) -> Tensor:
        upper = torch.stack([2 * t.cos() - 1, 2 * t.sin() - 0.2], dim=1)
        lower = torch.stack([1 - 2 * t.cos(), 0.8 - 2 * t.sin()], dim=1)
        return torch.stack([upper, lower])


class SwissRoll(Curves):
    """The spiral ``(t cos t, t sin t)/5`` (scikit-learn's ``make_swiss_roll`` seen from above)."""

    interval = (1.5 * math.pi, 4.5 * math.pi)

    def _points(self, t: Tensor) -> Tensor:
        return torch.stack([t * t.cos(), t * t.sin()], dim=1)[None] / 5


class Spirals(Curves):
    """Two spiral arms, one the other rotated by half a turn, with uniform and Gaussian noise.

    ``x = ±((−t cos t, t sin t) + v)/3 + σξ`` with ``v`` uniform in ``[0, ½]²`` and ``t = 3π√u``. For given ``t`` the
    density is a product of two differences of normal distribution functions.
    """

    interval = (0.0, 3 * math.pi)
    _side = 1 / 6  # of the square of uniform noise, after the division by 3

    def _points(self, t: Tensor) -> Tensor:
        arm = torch.stack([-t * t.cos(), t * t.sin()], dim=1)[None] / 3 + self._side / 2
        return torch.cat([arm, -arm])  # centres of the squares

    def _parameter_density(self, t: Tensor) -> Tensor:
        return 2 * t / self.interval[1] ** 2

    def _parameter(self, u: Tensor) -> Tensor:
        return self.interval[1] * u.sqrt()

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        points = super()._sample(n, generator)
        return points + self._side * (
            torch.rand(points.shape, generator=generator, dtype=torch.float64, device="cpu") - 0.5
        )

    def _prob(self, x: Tensor) -> Tensor:
        u, v = self._offsets(x)
        return (_box(u, self._half) * _box(v, self._half)) @ self._log_weight.to(x.device).exp() / self._side**2

    def _log_prob(self, x: Tensor) -> Tensor:
        log_p = self._prob(x).log()
        if len(far := (log_p < math.log(1e-6)).nonzero().flatten()):  # where the difference in `_box` loses accuracy
            u, v = self._offsets(x[far])
            terms = self._log_weight.to(x.device) + _log_box(u, self._half) + _log_box(v, self._half)
            log_p[far] = torch.logsumexp(terms, dim=1) - 2 * math.log(self._side)
        return log_p

    @property
    def _half(self) -> float:
        return self._side / (2 * self.std)

    def _offsets(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Distances ``|x − γ|/σ`` to the nodes in either coordinate, ``(n, nodes)``."""
        nodes = self._nodes.to(x.device)
        return ((x[:, :1] - nodes[:, 0]) / self.std).abs_(), ((x[:, 1:] - nodes[:, 1]) / self.std).abs_()


def _box(u: Tensor, half: float) -> Tensor:
    """``Φ(u + half) − Φ(u − half)``, with an absolute error of 1e-16."""
    return (torch.erf((u + half) / math.sqrt(2)) - torch.erf((u - half) / math.sqrt(2))) / 2


def _log_box(u: Tensor, half: float) -> Tensor:
    """Logarithm of `_box` for ``u ≥ 0``: from scaled tails, so that the relative error is small."""
    near, far = (u - half) / math.sqrt(2), (u + half) / math.sqrt(2)
    tail = near.clamp(min=0)
    scaled = torch.special.erfcx(tail) - torch.special.erfcx(far) * (tail.square() - far.square()).exp()
    return torch.where(near > 0, (scaled / 2).log() - tail.square(), _box(u, half).log())
