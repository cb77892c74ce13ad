"""Synthetic densities in one and two dimensions, each with its exact log-density.

The geometry is that of FFJORD's toy data (``lib/toy_data.py``), with two differences: samples fall on the parts of a
density at random rather than in equal numbers, which makes them independent; and `Pinwheel` twists by the radius.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from pyrnode.data.curves import Moons, Spirals, SwissRoll
from pyrnode.data.density import Density, gauss_legendre, normal
from pyrnode.errors import DataError, unknown_name

__all__ = [
    "DENSITIES",
    "Checkerboard",
    "Circles",
    "Density",
    "GaussianMixture",
    "Moons",
    "Pinwheel",
    "Spirals",
    "SwissRoll",
    "density",
]


class GaussianMixture(Density):
    """Isotropic Gaussians of one width, with equal weights.

    Args:
        name: Its name.
        description: A line about it.
        bounds: Window for plots.
        means: Centres ``(k, d)``.
        std: Standard deviation of each.
    """

    def __init__(self, name: str, description: str, bounds: tuple[float, ...], *, means: Tensor, std: float) -> None:
        super().__init__(name, description, bounds)
        self.means, self.std = means.to(torch.float64), std

    @property
    def scale(self) -> float:
        return self.std

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        centres = self.means[torch.randint(len(self.means), (n,), generator=generator, device="cpu")]
        return centres + self.std * normal(centres.shape, generator)

    def _log_prob(self, x: Tensor) -> Tensor:
        squares = ((x[:, None] - self.means.to(x.device)) / self.std).square().sum(dim=-1)
        log_norm = x.shape[1] * math.log(self.std * math.sqrt(2 * math.pi)) + math.log(len(self.means))
        return torch.logsumexp(-squares / 2, dim=1) - log_norm


class Circles(Density):
    """Concentric circles, equally likely, with Gaussian noise.

    The density of a noisy circle of radius R is ``exp(−(r² + R²)/2σ²) I₀(rR/σ²) / 2πσ²``.

    Args:
        name: Its name.
        description: A line about it.
        bounds: Window for plots.
        radii: Radii of the circles.
        std: Standard deviation of the noise.
    """

    def __init__(
        self, name: str, description: str, bounds: tuple[float, ...], *, radii: tuple[float, ...], std: float
    ) -> None:
        super().__init__(name, description, bounds)
        self.radii, self.std = torch.tensor(radii, dtype=torch.float64, device="cpu"), std

    @property
    def scale(self) -> float:
        return self.std

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        radius = self.radii[torch.randint(len(self.radii), (n,), generator=generator, device="cpu")]
        angle = 2 * math.pi * torch.rand(n, generator=generator, dtype=torch.float64, device="cpu")
        points = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
        return points + self.std * normal(points.shape, generator)

    def _log_prob(self, x: Tensor) -> Tensor:
        return self._log_radial(torch.linalg.vector_norm(x, dim=1))

    def _log_radial(self, r: Tensor) -> Tensor:
        r, radii, variance = r[:, None], self.radii.to(r.device), self.std**2
        terms = -((r - radii) ** 2) / (2 * variance) + torch.special.i0e(r * radii / variance).log()
        return torch.logsumexp(terms, dim=1) - math.log(2 * math.pi * variance * len(radii))

    @cached_property
    def _entropy(self) -> float:
        """One-dimensional: ``−∫ p(r) log p(r) 2πr dr`` by Gauss–Legendre quadrature."""
        r, weight = gauss_legendre(0.0, float(self.radii.max()) + 12 * self.std, panels=200)
        return float((2 * math.pi * r * weight * torch.special.entr(self._log_radial(r).exp())).sum())


class Checkerboard(Density):
    """Uniform on the eight dark squares, of side 2, of a 4×4 board."""

    def __init__(self, name: str, description: str) -> None:
        super().__init__(name, description, (-4.0, 4.0, -4.0, 4.0))

    @property
    def scale(self) -> float:
        return 2.0

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        column = torch.randint(4, (n,), generator=generator, device="cpu")
        row = 2 * torch.randint(2, (n,), generator=generator, device="cpu") + column % 2
        corner = torch.stack([column, row], dim=1).to(torch.float64)
        return 2 * (corner + torch.rand(n, 2, generator=generator, dtype=torch.float64, device="cpu")) - 4

    def _log_prob(self, x: Tensor) -> Tensor:
        square = ((x + 4) / 2).floor()
        dark = (square.sum(dim=1) % 2 == 0) & (square >= 0).all(dim=1) & (square < 4).all(dim=1)
        inside = torch.full_like(x[:, 0], -math.log(32))
        return torch.where(dark, inside, torch.full_like(inside, -math.inf))

    @cached_property
    def _entropy(self) -> float:
        return math.log(32)


class Pinwheel(Density):
    """Five Gaussian blades, each twisted about the centre.

    A blade is ``2 R(−θ_k − ¼ exp(|s|)) s`` with ``s = (1 + 0.3ξ₁, 0.1ξ₂)`` and a rotation R. The angle depends on the
    radius, which a rotation keeps, so that the map can be inverted and preserves area. (FFJORD takes the angle from
    ``s₁`` in place of ``|s|``, which looks the same, but folds the plane over in places: there is no closed form.)
    """

    radial_std, tangential_std, rate, blades = 0.3, 0.1, 0.25, 5

    def __init__(self, name: str, description: str) -> None:
        super().__init__(name, description, (-4.0, 4.0, -4.0, 4.0))

    @property
    def scale(self) -> float:
        return self.tangential_std

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        blade = torch.randint(self.blades, (n,), generator=generator, device="cpu")
        noise = normal((n, 2), generator)
        s = torch.stack([1 + self.radial_std * noise[:, 0], self.tangential_std * noise[:, 1]], dim=1)
        radius = torch.linalg.vector_norm(s, dim=1)
        return 2 * _rotate(s, self._twist(radius) - 2 * math.pi * blade / self.blades)

    def _twist(self, radius: Tensor) -> Tensor:
        return -self.rate * radius.exp()  # clockwise, as FFJORD's

    def _log_prob(self, x: Tensor) -> Tensor:
        flat = _rotate(x / 2, -self._twist(torch.linalg.vector_norm(x / 2, dim=1)))
        terms = []
        for blade in range(self.blades):
            s = _rotate(flat, torch.full_like(flat[:, 0], 2 * math.pi * blade / self.blades))
            terms.append(-(((s[:, 0] - 1) / self.radial_std) ** 2 + (s[:, 1] / self.tangential_std) ** 2) / 2)
        norm = 2 * math.pi * self.radial_std * self.tangential_std * self.blades * 4  # 4: the scaling by 2
        return torch.logsumexp(torch.stack(terms), dim=0) - math.log(norm)

    @cached_property
    def _entropy(self) -> float:
        """The twist keeps areas, so the entropy is that of the untwisted blades, by quadrature, plus the scaling's."""
        step = self.tangential_std / 3
        axis = torch.arange(-3.6, 3.6, step, dtype=torch.float64, device="cpu")
        s = torch.cartesian_prod(axis, axis)
        radius = torch.linalg.vector_norm(s, dim=1)
        twisted = 2 * _rotate(s, self._twist(radius))
        return float(torch.special.entr(self._log_prob(twisted).exp()).sum()) * step**2 * 4


def _rotate(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos * x[:, 0] - sin * x[:, 1], sin * x[:, 0] + cos * x[:, 1]], dim=1)


def _ring_of_means(count: int, radius: float) -> Tensor:
    angle = 2 * math.pi * torch.arange(count, dtype=torch.float64, device="cpu") / count
    return radius * torch.stack([angle.cos(), angle.sin()], dim=1)


def _square(side: float) -> tuple[float, ...]:
    return (-side, side, -side, side)


DENSITIES: dict[str, Density] = {
    density.name: density
    for density in (
        GaussianMixture(
            "8gaussians",
            "eight Gaussians on a circle (2-D)",
            _square(4.5),
            means=_ring_of_means(8, 4 / 1.414),
            std=0.5 / 1.414,
        ),
        Spirals("2spirals", "two spiral arms (2-D)", _square(4.5), std=0.1, panels=36),
        Checkerboard("checkerboard", "eight squares of a board (2-D)"),
        Circles("rings", "four concentric rings (2-D)", _square(3.5), radii=(3.0, 2.25, 1.5, 0.75), std=0.08),
        Moons("moons", "two interleaved half circles (2-D)", (-4.0, 4.0, -2.5, 3.0), std=0.2, panels=24),
        Pinwheel("pinwheel", "five twisted blades (2-D)"),
        SwissRoll("swissroll", "a spiral (2-D)", _square(4.0), std=0.2, panels=40),
        Circles("circles", "two concentric circles (2-D)", _square(4.0), radii=(3.0, 1.5), std=0.24),
        GaussianMixture(
            "two-bumps",
            "two Gaussians (1-D, as in Figure 1 of the paper)",
            (-4.0, 4.0),
            means=torch.tensor([[-1.5], [1.5]], dtype=torch.float32, device="cpu"),
            std=0.5,
        ),
    )
}
"""The densities that have a name."""


def density(name: str) -> Density:
    """The density of that name.

    Raises:
        DataError: There is none.
    """
    if name not in DENSITIES:
        raise DataError(unknown_name("density", name, DENSITIES))
    return DENSITIES[name]
