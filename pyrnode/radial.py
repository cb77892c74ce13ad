"""A fixed bijection that takes heavy tails away from vectors, along their radii; where none are heavy, the identity."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrnode.errors import DataError
from pyrnode.seeds import Noise
from pyrnode.transforms import DoubleTransform

_SERIES = 1e-3
"""Below it ``asinh(√q)/√q`` and ``sinh(t)/t`` are taken from their series, which is exact to double precision there."""

_FOLDS = 5

_CURVED = (1e-4, 1e4)
"""Least and greatest curvature, times the median of ``|x|²``; or none at all."""

_GRID, _BISECTIONS = 33, 30


class Radial(DoubleTransform):
    """``y = c f(κ|x|²) x``, ``f(q) = asinh(√q)/√q``: ``|y| ∝ asinh(√κ |x|)``, in double precision, as `Whiten`.

    Samples of a heavy-tailed, nearly elliptical distribution (patches of images, returns) come to lie like those of a
    normal one (radial Gaussianization: Lyu and Simoncelli, 2009), without a change of their directions: what is left to
    the flow is what no rescaling does. The map is smooth everywhere, has an inverse in closed form, and for ``κ = 0``
    and ``c = 1`` it is the identity to the last bit. Its log-determinant is
    ``d log c + (d − 1) log f(q) − log(1 + q)/2``.

    Args:
        scale: ``c``, positive, ``()``.
        curvature: ``κ``, not negative, ``()``; one over the square of the radius that tails begin at.

    Raises:
        DataError: One of them is no such number.
    """

    scale: Tensor
    curvature: Tensor

    def __init__(self, scale: Tensor, curvature: Tensor) -> None:
        super().__init__()
        if not scale.is_meta and not (0 < float(scale) < torch.inf and 0 <= float(curvature) < torch.inf):
            raise DataError(f"radial map of scale {float(scale):g}, curvature {float(curvature):g}: not a bijection")
        self.register_buffer("scale", scale.double())
        self.register_buffer("curvature", curvature.double())

    @classmethod
    def identity(cls) -> Radial:
        """The map that leaves all as it is."""
        return cls(*torch.tensor([1.0, 0.0], dtype=torch.float64, device="cpu"))

    @classmethod
    def fit(cls, x: Tensor, weight: Tensor | None = None) -> Radial:
        """The map under which the normal density of ``x`` is greatest.

        Args:
            x: Samples ``(n, d)``, centred.
            weight: Their weights ``(n,)``.
        """
        r2 = x.double().square().sum(1)
        share = torch.ones_like(r2) if weight is None else weight.to(r2)
        r2, share = r2[(share > 0) & (r2 > 0)], share[(share > 0) & (r2 > 0)]
        if not len(r2):
            return cls.identity()
        share, dim, middle = share / share.sum(), x.shape[1], r2.median()

        def best(curvature: Tensor) -> tuple[float, Tensor]:
            """The likelihood in nats, but for a constant, and the scale that makes it greatest."""
            found = _log_det(curvature * r2, dim)
            scale = (dim / (share * r2 * _shrunk(curvature * r2).square()).sum()).sqrt()
            return float((share * found).sum() + dim * scale.log()), scale

        low, high = torch.tensor(_CURVED, dtype=torch.float64, device=r2.device).log()
        grid = torch.linspace(float(low), float(high), _GRID, dtype=torch.float64, device=r2.device)
        scores = [best(point.exp() / middle)[0] for point in grid]
        at = max(range(_GRID), key=scores.__getitem__)
        left, right = grid[max(at - 1, 0)], grid[min(at + 1, _GRID - 1)]
        for _ in range(_BISECTIONS):  # of the bracket, whose middle part keeps the maximum
            a, b = left + (right - left) / 3, right - (right - left) / 3
            left, right = (a, right) if best(a.exp() / middle)[0] < best(b.exp() / middle)[0] else (left, b)
        none, curved = torch.zeros_like(middle), ((left + right) / 2).exp() / middle
        chosen = max((none, curved), key=lambda curvature: best(curvature)[0])
        return cls(best(chosen)[1], chosen)

    @classmethod
    def gain(cls, x: Tensor, weight: Tensor | None = None) -> float:
        """What it adds to the normal density of samples that it was not fitted to: nats per dimension, cross-validated.

        Args:
            x: Samples ``(n, d)``, centred.
            weight: Their weights ``(n,)``.
        """
        x = x.double()
        share = torch.ones_like(x[:, 0]) if weight is None else weight.to(x)
        total = 0.0
        for fold in range(_FOLDS):
            out = torch.arange(len(x), device=x.device) % _FOLDS == fold
            if not bool((share[~out] > 0).any()):
                return 0.0
            y, log_det = cls.fit(x[~out], share[~out])(x[out])
            gained = log_det - y.square().sum(1) / 2 + x[out].square().sum(1) / 2
            total += float((gained * share[out]).sum())
        return total / float(share.sum()) / x.shape[1]

    def forward(self, x: Tensor, generator: Noise | None = None) -> tuple[Tensor, Tensor]:
        x = x.double()
        q = self.curvature * x.square().sum(1)
        return self.scale * _shrunk(q)[:, None] * x, _log_det(q, x.shape[1]) + x.shape[1] * self.scale.log()

    def inverse(self, y: Tensor) -> Tensor:
        y = y.double() / self.scale
        return _grown(self.curvature * y.square().sum(1))[:, None] * y


def _log_det(q: Tensor, dim: int) -> Tensor:
    """The log-determinant of ``x ↦ f(κ|x|²) x``."""
    return (dim - 1) * _shrunk(q).log() - (1 + q).log() / 2


def _shrunk(q: Tensor) -> Tensor:
    """``f(q) = asinh(√q)/√q``, with ``f(0) = 1``; by logarithms, which every runtime of exported programs has."""
    small = q < _SERIES
    root = torch.where(small, torch.ones_like(q), q).sqrt()  # no derivative of √ at 0
    series = 1 - q * (1 / 6 - q * (3 / 40 - q * (5 / 112 - q * (35 / 1152 - q * 63 / 2816))))
    return torch.where(small, series, (root + (1 + root * root).sqrt()).log() / root)


def _grown(q: Tensor) -> Tensor:
    """``sinh(√q)/√q``."""
    small = q < _SERIES
    root = torch.where(small, torch.ones_like(q), q).sqrt()
    series = 1 + q * (1 / 6 + q * (1 / 120 + q * (1 / 5040 + q / 362880)))
    return torch.where(small, series, (root.exp() - (-root).exp()) / (2 * root))
