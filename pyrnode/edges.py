"""A fixed bijection by column that opens out sharp edges of a density; columns without one it leaves as they are.

Uniform columns (an hour of a day, a share, a rank) and such as begin abruptly (waiting times, prices) have edges, which
no whitening takes away, and which an ODE with a normal base has to build up from steep dynamics. Unlike bounds that a
user gives (`pyrnode.bounded`), an edge that is found in data is a guess: so the map reaches all of the line, and beyond
an edge the density falls like a power of the distance rather than to zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrnode.errors import DataError
from pyrnode.seeds import Noise
from pyrnode.transforms import DoubleTransform

_SLOPE = math.sqrt(math.pi / 8)
"""``dz/dℓ`` at ``ℓ = 0`` of ``z = Φ⁻¹(σ(ℓ))``, which `_normal` is like there."""

_BEND = _SLOPE**4 / 4
"""So that ``z² → 2|ℓ|`` far out, as it does of ``Φ⁻¹(σ(ℓ))``."""

_FAR, _EXPONENT, _SERIES = 1e100, 600.0, 1e-3
"""The farthest value in widths; the greatest exponent; and below what series are taken, exact to double precision."""

_SHARE, _LEAST, _NEAR = 0.01, 20, 10
"""Share and least number of the samples that say how dense they lie at an edge, and the gaps between values there."""

_SOFTNESS = 6.0
"""Softness of an edge in mean distances of neighbours: a sample beyond the last is that far at once in 400 tables."""

_GAIN, _MOST, _ROWS, _FOLDS = 0.05, 10.0, 10_000, 5
"""Nats that a column must bring the normal density of all, and one sample may, cross-validated; rows; folds."""

_ROWS_EACH = 4
"""Samples for each column at least: with fewer, what a column is given the others is what its errors are."""

_LARGEST = 1e150
"""The largest value of a column that is looked at: squares of larger ones are beyond float64."""

_RIDGE = 1e-9
"""Variance of columns given others at least, of 1."""


class Edges(DoubleTransform):
    """``y = g(ℓ(x))`` by column, in double precision: near normal where the column is uniform or exponential.

    With ``p_s(u) = (u + √(u² + s²))/2``, which is u but for a softened edge at 0,

        ℓ = log p_s(u) − log p_t(1 − u),  u = (x − low)/width,     of a column with two edges,
        ℓ = log(exp(p_s(u)) − 1),         u = (x − low)/width,     of one with a lower edge,

    one with an upper edge likewise with ``high − x``, and −y. These are the logits of the uniform and the exponential
    distribution; ``g(ℓ) = kℓ/(1 + cℓ²)^¼`` is elementary, and like ``Φ⁻¹(σ(ℓ))``. All of it has an inverse in closed
    form.

    Args:
        low: Lower edges ``(d,)``.
        high: Upper edges ``(d,)``.
        width: Widths ``(d,)``, positive: the distance of two edges, or the scale of a column with one.
        soft_low: ``s``, ``(d,)``: softness of the lower edge, in widths; 0 where there is none.
        soft_high: The same of the upper.

    Raises:
        DataError: A number is not of that kind.
    """

    low: Tensor
    high: Tensor
    width: Tensor
    soft_low: Tensor
    soft_high: Tensor

    def __init__(self, low: Tensor, high: Tensor, width: Tensor, soft_low: Tensor, soft_high: Tensor) -> None:
        super().__init__()
        given = {"low": low, "high": high, "width": width, "soft_low": soft_low, "soft_high": soft_high}
        for name, values in given.items():
            self.register_buffer(name, values.double().clone())
        if not low.is_meta:
            self._check()

    def _check(self) -> None:
        numbers = torch.stack([self.low, self.high, self.width, self.soft_low, self.soft_high])
        two = (self.soft_low > 0) & (self.soft_high > 0)
        good = torch.isfinite(numbers).all(0) & (self.width > 0) & (numbers[3:] >= 0).all(0)
        good &= ~two | (self.low < self.high)
        if not bool(good.all()):
            worst = int((~good).nonzero()[0])
            found = ", ".join(f"{name} {float(buffer[worst]):g}" for name, buffer in self.named_buffers())
            raise DataError(f"edges of column {worst} ({found}): not a bijection")

    @classmethod
    def none(cls, columns: int) -> Edges:
        """The map that leaves all columns as they are."""
        zero = torch.zeros(columns, dtype=torch.float64, device="cpu")
        return cls(zero, zero, zero + 1, zero, zero)

    @classmethod
    def fit(cls, x: Tensor, weight: Tensor | None = None) -> Edges:
        """The edges that bring the normal density of all columns the most, one after the other.

        What a candidate of a column brings is how much more probable the column becomes given the others, by the normal
        density of the other folds, in nats a sample (of one sample at most ten, so that an outlier decides nothing). A
        column that others nearly determine, and no longer would so linearly, keeps its edges.

        Args:
            x: Samples ``(n, d)``, of which the first 10,000 are looked at for the choice.
            weight: Their weights ``(n,)``.
        """
        x = x.detach().double().cpu()
        share = torch.ones_like(x[:, 0]) if weight is None else weight.to(x)
        x, share = x[share > 0], share[share > 0]
        found = cls.none(x.shape[1])
        if len(x) < max(_FOLDS * _LEAST, _ROWS_EACH * x.shape[1]):
            return found
        candidates = [(i, column) for i in range(x.shape[1]) for column in _candidates(x[:, i], share)]
        y, share = x[:_ROWS].clone(), share[:_ROWS]
        known = torch.tensor([i for i, _ in candidates], dtype=torch.long, device="cpu")
        tried = [column(y[:, i]) for i, column in candidates]
        left = torch.ones(len(candidates), dtype=torch.bool, device="cpu")
        while bool(left.any()):
            here = left.nonzero()[:, 0]
            z, slopes = (torch.stack([tried[k][part] for k in here], 1) for part in (0, 1))
            gain, error = _gains(y, z, slopes, known[here], share)
            gain = torch.where(gain > 2 * error, gain, 0.0)
            best = int(gain.argmax())
            if gain[best] < _GAIN:
                break
            i, column = candidates[int(here[best])]
            found._set(i, column)
            y[:, i] = z[:, best]
            left &= known != i
        return found

    def _set(self, i: int, column: _Column) -> None:
        for name in ("low", "high", "width", "soft_low", "soft_high"):
            self.get_buffer(name)[i] = getattr(column, name)

    def _kinds(self) -> tuple[Tensor, Tensor, Tensor]:
        """Which columns have any edge, which two, and which an upper one alone."""
        below, above = self.soft_low > 0, self.soft_high > 0
        return below | above, below & above, above & ~below

    def _start(self, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The edge that a column is measured from, and its sign, −1 from an upper one."""
        return torch.where(upper, self.high, self.low), torch.where(upper, -1.0, 1.0).double()

    def forward(self, x: Tensor, generator: Noise | None = None) -> tuple[Tensor, Tensor]:
        known, two, upper = self._kinds()
        start, sign = self._start(upper)
        x = x.double()
        u = torch.where(known, sign * (x - start) / self.width, 0.5)
        out = u.abs() > _FAR
        u = torch.where(out, 0.5, u)
        p, dp = _softened(u, torch.where(upper, self.soft_high, self.soft_low))
        q, dq = _softened(torch.where(two, 1 - u, 0.5), self.soft_high)
        one, done = _grown_logit(torch.where(two, 1.0, p))
        logit = torch.where(two, p.log() - q.log(), one)
        slope = torch.where(two, dp / p + dq / q, done * dp)
        y, dy = _normal(logit)
        log_det = torch.where(known, (slope * dy / self.width).log(), 0.0)
        log_det = torch.where((known & out).any(1), -math.inf, log_det.sum(1))
        return torch.where(known, sign * y, x), log_det

    def inverse(self, y: Tensor) -> Tensor:
        known, two, upper = self._kinds()
        start, sign = self._start(upper)
        y = y.double()
        logit = _logit(torch.where(known, sign * y, 0.0)).clamp(min=-_EXPONENT)
        s, t = torch.where(upper, self.soft_high, self.soft_low), self.soft_high
        ratio = torch.where(two, logit, 0.0).clamp(max=_EXPONENT).exp()
        part = 1 + 1 / ratio
        p = (1 + (1 + part * (s * s + t * t * ratio)).sqrt()) / (2 * part)
        p = torch.where(two, p, _log_grown(torch.where(two, 0.0, logit)))
        u = p - s * s / (4 * p)
        return torch.where(known, start + sign * self.width * u, y)

    def extra_repr(self) -> str:
        buffers = (self.low, self.high, self.soft_low, self.soft_high)
        ends = [
            f"{i}: {f'{low:g}' if soft else ''} to {f'{high:g}' if softer else ''}"
            for i, (low, high, soft, softer) in enumerate(zip(*(b.tolist() for b in buffers), strict=True))
            if soft or softer
        ]
        return "; ".join(ends) or "none"


# -- the functions of one number -------------------------------------------------------------------------------------


def _softened(u: Tensor, soft: Tensor) -> tuple[Tensor, Tensor]:
    """``(u + √(u² + s²))/2``, without cancellation where u < 0, and its slope."""
    root = (u * u + soft * soft).sqrt()
    p = torch.where(u > 0, u + root, soft * soft / (u.abs() + root)) / 2
    return p, p / root


def _grown_logit(p: Tensor) -> tuple[Tensor, Tensor]:
    """``log(eᵖ − 1)`` for p > 0, and its slope; without functions that runtimes of exported programs lack."""
    small = p < _SERIES
    series = p * (1 - p / 2 * (1 - p / 3 * (1 - p / 4 * (1 - p / 5 * (1 - p / 6)))))
    left = torch.where(small, series, 1 - (-torch.where(small, torch.ones_like(p), p)).exp())  # 1 − e⁻ᵖ
    return p + left.log(), 1 / left


def _log_grown(logit: Tensor) -> Tensor:
    """``log(1 + eˡ)``, the inverse of `_grown_logit`."""
    e = (-logit.abs()).exp()
    series = e * (1 - e * (1 / 2 - e * (1 / 3 - e * (1 / 4 - e * (1 / 5 - e / 6)))))
    small = e < _SERIES
    return logit.clamp(min=0.0) + torch.where(small, series, (1 + torch.where(small, torch.ones_like(e), e)).log())


def _normal(logit: Tensor) -> tuple[Tensor, Tensor]:
    """``kℓ/(1 + cℓ²)^¼`` and its slope."""
    grown = 1 + _BEND * logit * logit
    root = grown.sqrt().sqrt()
    return _SLOPE * logit / root, _SLOPE * (1 + grown) / (2 * root * grown)


def _logit(y: Tensor) -> Tensor:
    """The inverse of `_normal`."""
    y2 = y * y
    k4 = _SLOPE**4
    return y * ((_BEND * y2 + (_BEND * _BEND * y2 * y2 + 4 * k4).sqrt()) / (2 * k4)).sqrt()


# -- which columns ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    """The edges of one column."""

    low: float
    high: float
    width: float
    soft_low: float = 0.0
    soft_high: float = 0.0

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the column ``(n,)`` becomes, and the logarithms of its slopes."""
        numbers = (self.low, self.high, self.width, self.soft_low, self.soft_high)
        y, log_det = Edges(*torch.tensor(numbers, dtype=torch.float64, device="cpu")[:, None])(x[:, None])
        return y[:, 0], log_det


def _candidates(x: Tensor, share: Tensor) -> Iterator[_Column]:
    """Both edges of a column, the lower and the upper, where samples do not lie on top of each other there."""
    order = x.sort().values
    low, high = float(order[0]), float(order[-1])
    if max(-low, high) > _LARGEST:
        return
    before, after = _spacing(order), _spacing(-order.flip(0))
    mean = float((share * x).sum() / share.sum())
    if before is not None and after is not None:
        first, last = low - before, high + after
        width = last - first
        yield _Column(first, last, width, _SOFTNESS * before / width, _SOFTNESS * after / width)
    if before is not None:
        width = mean - (low - before)
        yield _Column(low - before, 0.0, width, soft_low=_SOFTNESS * before / width)
    if after is not None:
        width = high + after - mean
        yield _Column(0.0, high + after, width, soft_high=_SOFTNESS * after / width)


def _spacing(order: Tensor) -> float | None:
    """How far apart the first samples of a sorted column lie; `None` where they are one value, or not to be told."""
    count = max(_LEAST, int(_SHARE * len(order)))
    near = order[: count + 1]
    gaps = near.diff()
    values = gaps[gaps > 0][:_NEAR]
    if len(near) <= count or len(values) == 0 or float(near[0]) == float(near[count // 2]):
        return None
    spacing = max(float(near[-1] - near[0]) / count, float(values.median()) / 2)
    smallest = max(8 * torch.finfo(order.dtype).eps * float(near[0].abs()), 1e-12 * float(order[-1] - order[0]))
    return spacing if smallest < spacing < math.inf else None


def _gains(y: Tensor, z: Tensor, slopes: Tensor, of: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """What candidates ``z`` ``(n, k)`` for the columns `of` ``(k,)`` of ``y`` bring a sample, and its standard error.

    Args:
        y: Samples ``(n, d)``.
        z: A candidate in place of a column in each column.
        slopes: Logarithms of its slopes ``(n, k)``.
        of: Which column.
        share: Weights of the samples ``(n,)``.
    """
    gained = torch.empty_like(z)
    columns = torch.arange(y.shape[1], device="cpu")
    folds = torch.arange(len(y), device="cpu") % _FOLDS
    for fold in range(_FOLDS):
        out = folds == fold
        others = _Others(y, out, share)
        before = others(y, columns)[:, of]
        gained[out] = (others(z, of) + slopes[out] - before).clamp(-_MOST, _MOST)
    weight = share / share.sum()
    mean = weight @ gained
    return mean, (weight.square() @ (gained - mean).square()).sqrt()


class _Others:
    """The normal densities of columns given the others, by the moments of the samples that are not in a fold.

    Args:
        y: All samples ``(n, d)``.
        out: Which are in the fold ``(n,)``.
        share: Weights of the samples ``(n,)``.
    """

    def __init__(self, y: Tensor, out: Tensor, share: Tensor) -> None:
        self._out, self._weight = out, share[~out] / share[~out].sum()
        self._rest, self._away, _ = self._scaled(y)
        covariance = (self._rest * self._weight[:, None]).T @ self._rest
        covariance.diagonal().add_(_RIDGE)
        self._precision = torch.linalg.inv(covariance)

    def __call__(self, z: Tensor, of: Tensor) -> Tensor:
        """Log-densities of the fold's ``z`` ``(n, k)``, in place of the columns `of`, but for a constant."""
        rest, away, log_std = self._scaled(z)
        cross = (self._rest * self._weight[:, None]).T @ rest
        slope = self._precision @ cross  # the next line leaves out what it replaces: its own coefficient is 0
        slope = slope - self._precision[:, of] * (slope.gather(0, of[None]) / self._precision.diagonal()[of])
        variance = (1 + _RIDGE - (cross * slope).sum(0)).clamp(min=_RIDGE)
        found: Tensor = -(away - self._away @ slope).square() / variance / 2 - variance.log() / 2 - log_std
        return found

    def _scaled(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Samples out of the fold and in it by the mean and the deviation of those out of it, and its logarithm."""
        mean = self._weight @ x[~self._out]
        std = (self._weight @ (x[~self._out] - mean).square()).sqrt().clamp(min=1e-300)
        return (x[~self._out] - mean) / std, (x[self._out] - mean) / std, std.log()
