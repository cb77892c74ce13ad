"""Fixed bijections between the data and the flow's space, with their log-determinants, saved with the model.

Images: pixel ``p ∈ {0..L−1}``, ``u ~ U[0,1)``, ``s = (p+u)/L``, ``y = logit(α + (1−2α)s)`` (docs/design.md §2).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Self

import torch
from torch import Tensor, nn

from pyrnode.errors import ConfigError, DataError
from pyrnode.seeds import Noise, drawn
from pyrnode.tracing import holds, recording


class Transform(nn.Module, ABC):
    """A bijection of ``(batch, *event)``, most often onto the same shape."""

    turns: int = 1
    """How many values, all of which `forward` takes, one sample stands for (`unwrapped`)."""

    @abstractmethod
    def forward(self, x: Tensor, generator: Noise | None = None) -> tuple[Tensor, Tensor]:
        """``y`` and ``log |det ∂y/∂x|`` in nats, ``(batch,)``; `generator` where the transform is random."""

    def check(self, x: Tensor) -> None:
        """Raises `DataError` where values have no place in its domain; it reads them, `forward` does not."""

    @abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        """``x`` of ``y``; integers of discrete data."""

    def continuous(self, y: Tensor) -> Tensor:
        """`inverse` without rounding to integers: differentiable, ``p + u`` for discrete data."""
        return self.inverse(y)

    def unwrapped(self, x: Tensor) -> Tensor:
        """The values that samples ``(batch, *event)`` stand for, ``(turns * batch, *event)``, the nearest first."""
        return x

    def contained(self, x: Tensor) -> Tensor:
        """What `inverse` gave, rounded to the data's type, back within its domain, which rounding may have left."""
        return x

    def shape(self, event_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of what comes out of samples of that shape."""
        return event_shape


_THIN = 1e-10
"""Variance of a principal axis at least, as a share of the widest's: below it is what rounding left."""

_SHRINKAGES = (0.0, 1e-6, 1e-4, 0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0)
"""What a covariance may be drawn towards the identity by."""

_FOLDS, CHOSEN_ON = 5, 50_000
"""Folds of the cross-validation that chooses among them, and the rows that it takes at most."""


def _zeros(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0])  # not len(x): in a program that is being recorded the batch is a symbol


class Dequantize(Transform):
    """Spreads integers ``0..levels−1`` over ``[0, 1)``: ``s = (p + u)/L`` with uniform noise u.

    Integer input gets noise; floating-point input is taken as already spread, ``p + u`` in ``[0, L]`` (so ``p + ½`` is
    the bin's centre). The log-determinant ``−d log L`` makes densities those of ``p + u``, so that
    ``−log₂ p / d`` is bits per dimension.

    Args:
        levels: Number of levels ``L``.
        dtype: Floating-point type of the result for integer input.
    """

    def __init__(self, levels: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if levels < 2:
            raise ConfigError(f"levels = {levels!r}: expected at least 2")
        self.levels = levels
        self.dtype = dtype

    def check(self, x: Tensor) -> None:
        if recording() or not x.numel():
            return
        if x.is_floating_point():
            if not holds(((x >= 0) & (x <= self.levels)).all()):
                raise DataError(
                    f"dequantised values {float(x.min()):g} to {float(x.max()):g}: expected 0 to {self.levels}"
                )
            return
        low, high = int(x.min()), int(x.max())
        if low < 0 or high >= self.levels:
            raise DataError(f"pixel values {low} to {high}: expected 0 to {self.levels - 1} (levels = {self.levels})")

    def forward(self, x: Tensor, generator: Noise | None = None) -> tuple[Tensor, Tensor]:
        if not x.is_floating_point():
            device = x.device if generator is None else generator.device

            def uniform(shape: tuple[int, ...], source: torch.Generator | None) -> Tensor:
                return torch.rand(shape, generator=source, dtype=self.dtype, device=device)

            x = x.to(self.dtype) + drawn(uniform, tuple(x.shape), generator).to(x.device)
        return x / self.levels, _zeros(x) - math.prod(x.shape[1:]) * math.log(self.levels)

    def inverse(self, y: Tensor) -> Tensor:
        dtype = torch.uint8 if self.levels <= 256 else torch.int64
        return self.continuous(y).floor().clamp(0, self.levels - 1).to(dtype)

    def continuous(self, y: Tensor) -> Tensor:
        return y * self.levels

    def extra_repr(self) -> str:
        return f"levels={self.levels}"


class Logit(Transform):
    """``y = logit(q)``, ``q = α + (1−2α)s``, for ``s ∈ [0, 1]``; α > 0 keeps the ends finite.

    Args:
        alpha: ``α`` in [0, 0.5).
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        if not 0 <= alpha < 0.5:
            raise ConfigError(f"alpha = {alpha!r}: expected 0 <= alpha < 0.5")
        self.alpha = alpha

    def forward(self, x: Tensor, generator: Noise | None = None) -> tuple[Tensor, Tensor]:
        width = 1 - 2 * self.alpha
        low, high = torch.log(self.alpha + width * x), torch.log(self.alpha + width * (1 - x))
        log_det = (math.log(width) - low - high).flatten(1).sum(1)
        return low - high, log_det

    def inverse(self, y: Tensor) -> Tensor:
        return ((torch.sigmoid(y) - self.alpha) / (1 - 2 * self.alpha)).clamp(0, 1)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class Flatten(Transform):
    """Images ``(C, H, W)`` as vectors of their pixels, row by row, channel by channel.

    Args:
        event_shape: Shape of an image.
    """

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.event_shape: tuple[int, ...] = tuple(event_shape)

    def forward(self, x: Tensor, generator: Noise | None = None) -> tuple[Tensor, Tensor]:
        return x.flatten(1), _zeros(x)

    def inverse(self, y: Tensor) -> Tensor:
        return y.reshape(-1, *self.event_shape)

    def shape(self, event_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (math.prod(event_shape),)

    def extra_repr(self) -> str:
        return f"event_shape={self.event_shape}"


class DoubleTransform(Transform):
    """A transform whose tensors stay float64 where a module's type is changed."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in kept.items():
            setattr(self, name, old.to(self.get_buffer(name).device))
        return self


class Standardize(DoubleTransform):
    """``y = (x − mean)/std`` by feature, in double precision, whatever the type of the samples and of the flow.

    Far from zero, or in small units, single precision would round samples together before they are centred: at 1.7e9 it
    knows multiples of 128.

    Args:
        mean: ``(*event)``.
        std: ``(*event)``, positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        if not std.is_meta and bool((~(std > 0) | ~torch.isfinite(std) | ~torch.isfinite(mean)).any()):
            worst = int((~(std > 0) | ~torch.isfinite(std) | ~torch.isfinite(mean)).flatten().nonzero()[0])
            raise DataError(f"feature {worst} is constant or not finite: drop it before training")
        self.register_buffer("mean", mean.double())
        self.register_buffer("std", std.double())

    @classmethod
    def identity(cls, event_shape: tuple[int, ...]) -> Standardize:
        """Mean 0 and standard deviation 1: what a flow without data has, until those of one are loaded."""
        return cls(torch.zeros(event_shape, dtype=torch.float64), torch.ones(event_shape, dtype=torch.float64))

    @classmethod
    def fit(cls, x: Tensor, weight: Tensor | None = None) -> Standardize:
        """The mean and standard deviation of ``x`` ``(n, *event)``, whose samples may have weights ``(n,)``."""
        x = x.double()
        if weight is None:
            return cls(x.mean(0), x.std(0, correction=0))
        share = (weight / weight.sum()).reshape(-1, *[1] * (x.ndim - 1))
        mean = (share * x).sum(0)
        return cls(mean, (share * (x - mean).square()).sum(0).sqrt())

    def by_channel(self) -> Standardize:
        """Of images ``(C, H, W)``: one mean and one deviation for all pixels of a channel."""
        mean = self.mean.mean((1, 2), keepdim=True).expand_as(self.mean)
        variance = (self.std.square() + (self.mean - mean).square()).mean((1, 2), keepdim=True)
        return Standardize(mean.clone(), variance.sqrt().expand_as(mean).clone())

    @classmethod
    def fit_context(cls, c: Tensor) -> Standardize:
        """`fit` of contexts ``(n, m)``, which need no density: features that do not vary are centred, not scaled."""
        c = c.double()
        fixed = (c == c[0]).all(0)
        mean, std = torch.where(fixed, c[0], c.mean(0)), c.std(0, correction=0)
        return cls(mean, torch.where(fixed, torch.ones_like(std), std))

    def forward(self, x: Tensor, generator: Noise | None = None) -> tuple[Tensor, Tensor]:
        x = x.double()
        return (x - self.mean) / self.std, _zeros(x) - self.std.log().sum()

    def inverse(self, y: Tensor) -> Tensor:
        return y.double() * self.std + self.mean


def _principal(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Axes ``(d, d)``, one a column, the largest component of each positive; and their variances, increasing."""
    share = torch.full_like(x[:, 0], 1 / len(x)) if weight is None else (weight / weight.sum()).to(x)
    return _axes((x * share[:, None]).T @ x)


def _axes(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a covariance."""
    variance, rotation = torch.linalg.eigh(covariance)
    return rotation * rotation.gather(0, rotation.abs().argmax(0, keepdim=True)).sign(), variance


class Whiten(DoubleTransform):
    """``y = (Rᵀx)/s`` of vectors: their principal axes, each with variance one; in double precision, as `Standardize`.

    Columns that nearly determine one another leave a flow thin sheets to squeeze a ball into, which it learns last and
    integrates worst; on the principal axes they are as wide as they are long.

    Args:
        rotation: ``R``, ``(d, d)``, orthogonal; a column is an axis.
        scale: ``s``, ``(d,)``, positive.
    """

    rotation: Tensor
    scale: Tensor

    def __init__(self, rotation: Tensor, scale: Tensor) -> None:
        super().__init__()
        if not rotation.is_meta:
            rotation, scale = rotation.double(), scale.double()
            unit = torch.eye(len(scale), dtype=torch.float64, device=rotation.device)
            if not bool(((rotation.T @ rotation - unit).abs() < 1e-8).all()):
                raise DataError("the axes of a whitening are not orthogonal")
            if not bool(((scale > 0) & torch.isfinite(scale)).all()):
                raise DataError("the scales of a whitening are not positive numbers")
        self.register_buffer("rotation", rotation)
        self.register_buffer("scale", scale)

    @classmethod
    def identity(cls, dim: int, device: torch.device | None = None) -> Whiten:
        """No rotation and no scale."""
        return cls(
            torch.eye(dim, dtype=torch.float64, device=device), torch.ones(dim, dtype=torch.float64, device=device)
        )

    @classmethod
    def fit(cls, x: Tensor, weight: Tensor | None = None, *, shrinkage: float = 0.0) -> Whiten:
        """The principal axes of ``x`` ``(n, d)``, of mean 0 and variance 1 by column, with weights ``(n,)``.

        Args:
            x: Samples.
            weight: Their weights.
            shrinkage: ``a`` in [0, 1]: the covariance is taken for ``(1 − a) C + a I``.
        """
        return cls._of(*_principal(x.double(), weight), shrinkage)

    @classmethod
    def of_covariance(cls, covariance: Tensor, *, shrinkage: float = 0.0) -> Whiten:
        """`fit` of samples whose second moments ``(d, d)`` are known."""
        return cls._of(*_axes(covariance.double()), shrinkage)

    @classmethod
    def _of(cls, rotation: Tensor, variance: Tensor, shrinkage: float) -> Whiten:
        """From the principal axes and their variances, in increasing order."""
        shrunk = (1 - shrinkage) * variance.clamp(min=_THIN * variance[-1]) + shrinkage
        return cls(rotation, shrunk.sqrt())

    @classmethod
    def best_shrinkage(cls, x: Tensor, weight: Tensor | None = None) -> float:
        """The shrinkage under which the normal density scores best in cross-validation.

        Few rows, or gross outliers, leave a covariance that is too narrow for what comes next: the more of it is taken,
        the better for what is like the rows it was found on, and the worse for the rest.

        Args:
            x: Samples ``(n, d)``, of mean 0 and variance 1 by column.
            weight: Their weights.
        """
        few = x[:CHOSEN_ON].double()
        share = torch.ones_like(few[:, 0]) if weight is None else weight[:CHOSEN_ON].to(few)
        scores = dict.fromkeys(_SHRINKAGES, 0.0)
        for fold in range(_FOLDS):
            out = torch.arange(len(few), device=few.device) % _FOLDS == fold
            if not bool((share[~out] > 0).any()):
                return 1.0
            axes = _principal(few[~out], share[~out])
            for shrinkage in scores:
                y, log_det = cls._of(*axes, shrinkage)(few[out])
                scores[shrinkage] += float(((log_det - y.square().sum(1) / 2) * share[out]).sum())
        return max(scores, key=lambda shrinkage: scores[shrinkage])

    def forward(self, x: Tensor, generator: Noise | None = None) -> tuple[Tensor, Tensor]:
        return (x.double() @ self.rotation) / self.scale, _zeros(x.double()) - self.scale.log().sum()

    def inverse(self, y: Tensor) -> Tensor:
        return (y.double() * self.scale) @ self.rotation.T


class Chain(Transform):
    """Transforms one after the other; of none, the identity."""

    def __init__(self, transforms: Iterable[Transform]) -> None:
        super().__init__()
        self.transforms: nn.ModuleList = nn.ModuleList(transforms)

    def forward(self, x: Tensor, generator: Noise | None = None) -> tuple[Tensor, Tensor]:
        log_det: Tensor | None = None
        for transform in self.transforms:
            x, term = transform(x, generator)
            log_det = term if log_det is None else log_det + term
        return x, _zeros(x) if log_det is None else log_det

    def check(self, x: Tensor) -> None:
        for transform in self.transforms[:1]:
            assert isinstance(transform, Transform)
            transform.check(x)

    def inverse(self, y: Tensor) -> Tensor:
        for transform in reversed(self.transforms):
            assert isinstance(transform, Transform)
            y = transform.inverse(y)
        return y

    def continuous(self, y: Tensor) -> Tensor:
        for transform in reversed(self.transforms):
            assert isinstance(transform, Transform)
            y = transform.continuous(y)
        return y

    @property
    def turns(self) -> int:  # type: ignore[override]
        """The product of those of the transforms."""
        return math.prod(transform.turns for transform in self.transforms)  # type: ignore[misc]

    def unwrapped(self, x: Tensor) -> Tensor:
        for transform in self.transforms:
            assert isinstance(transform, Transform)
            x = transform.unwrapped(x)
        return x

    def contained(self, x: Tensor) -> Tensor:
        for transform in self.transforms:
            assert isinstance(transform, Transform)
            x = transform.contained(x)
        return x

    def shape(self, event_shape: tuple[int, ...]) -> tuple[int, ...]:
        for transform in self.transforms:
            assert isinstance(transform, Transform)
            event_shape = transform.shape(event_shape)
        return event_shape
