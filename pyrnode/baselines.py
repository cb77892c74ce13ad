"""Classical density estimators to compare a flow with, fitted in the variables that the flow is fitted in.

The caller hands over the transformed variables (of images: the logit of dequantised pixels, standardised) and converts
the log-densities to its own units, for the flow and the baselines alike. Everything that is chosen is chosen on the
validation samples; all fits are seeded and bounded in time.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrnode.errors import DataError

_RIDGES = (0.0, *(10.0**k for k in range(-6, 1)))
_FIT_LIMIT = 10_000
_FIT_BUDGET = 2e11
"""Bound on the multiplications of one fit of a mixture: several seconds on one core."""
_ITERATIONS = 60
_KDE_LIMIT = 10_000
_SELECTION_LIMIT = 1_000
_BATCH = 4_096


class Baseline(ABC):
    """A fitted density.

    Attributes:
        name: ``"gaussian"``, ``"mixture"`` or ``"kde"``.
        description: What was fitted and chosen, and what was left out to bound the time.
    """

    name: str

    def __init__(self, description: str, dim: int) -> None:
        self.description, self._dim = description, dim

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.description!r})"

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats.

        Args:
            x: Points ``(n, d)`` in the variables of the fit.

        Returns:
            Tensor ``(n,)`` of the type and on the device of `x`, evaluated in double precision on the CPU.

        Raises:
            DataError: `x` is not of shape ``(n, d)``.
        """
        if x.ndim != 2 or x.shape[1] != self._dim or not x.is_floating_point():
            raise DataError(f"x has shape {tuple(x.shape)} and type {x.dtype}: expected floats (n, {self._dim})")
        points = x.detach().to("cpu", torch.float64)
        parts = [self._log_prob(chunk) for chunk in points.split(_BATCH)] if len(points) else [points.sum(1)]
        return torch.cat(parts).to(x)

    @abstractmethod
    def _log_prob(self, x: Tensor) -> Tensor:
        """Log-density ``(n,)`` of `x` ``(n, d)``, in double precision."""


class Gaussian(Baseline):
    """One Gaussian with full covariance.

    Args:
        mean: Mean ``(d,)``.
        covariance: Covariance ``(d, d)``, positive definite.
        description: What was fitted and chosen.
    """

    name = "gaussian"

    def __init__(self, mean: Tensor, covariance: Tensor, description: str) -> None:
        super().__init__(description, len(mean))
        self._normal = torch.distributions.MultivariateNormal(mean, covariance)

    def _log_prob(self, x: Tensor) -> Tensor:
        return self._normal.log_prob(x)  # type: ignore[no-any-return]


class Mixture(Baseline):
    """A mixture of Gaussians, fitted by scikit-learn's `GaussianMixture`."""

    name = "mixture"

    def __init__(self, model: Any, description: str) -> None:
        super().__init__(description, model.means_.shape[1])
        self._model = model

    def _log_prob(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self._model.score_samples(x.numpy()))


class KernelDensity(Baseline):
    """A Gaussian kernel density estimate: the mean of ``N(x; x_i, h² I)`` over the samples ``x_i``.

    The same estimate as scikit-learn's `KernelDensity`, evaluated as a product of matrices: its trees are of no help in
    more than a few dimensions, where they make it many times slower.

    Args:
        centres: Samples ``(n, d)``.
        bandwidth: Standard deviation ``h`` of the kernel.
        description: What was fitted and chosen.
    """

    name = "kde"

    def __init__(self, centres: Tensor, bandwidth: float, description: str) -> None:
        super().__init__(description, centres.shape[1])
        self._centres, self.bandwidth = centres, bandwidth

    def _log_prob(self, x: Tensor) -> Tensor:
        parts = [_kde(_square_distances(chunk, self._centres), self._dim, self.bandwidth) for chunk in x.split(512)]
        return torch.cat(parts)


def fit_baselines(train: Tensor, validation: Tensor, *, seed: int = 0) -> dict[str, Baseline]:
    """Fits a Gaussian, a mixture of Gaussians and a kernel density estimate.

    Args:
        train: Samples ``(n, d)``, in the variables in which the flow is fitted.
        validation: Samples ``(m, d)`` for what is chosen: ridge, number and kind of components, bandwidth.
        seed: Seed of the mixture's starting points and of subsamples.

    Returns:
        The baselines by name: ``"gaussian"``, ``"mixture"``, ``"kde"``.

    Raises:
        DataError: The samples differ in dimension, are not finite, or are too few.

    Example:
        >>> x = torch.randn(600, 2, generator=torch.Generator().manual_seed(0))
        >>> baselines = fit_baselines(x[:400], x[400:])
        >>> baselines["gaussian"].log_prob(x).shape
        torch.Size([600])
    """
    for what, values in (("train", train), ("validation", validation)):
        if values.ndim != 2 or values.shape[1] != train.shape[-1] or not values.is_floating_point():
            raise DataError(f"{what} has shape {tuple(values.shape)} and type {values.dtype}: expected floats (n, d)")
        if len(values) < 2:
            raise DataError(f"{what} has {len(values)} samples: expected at least 2")
        if not bool(torch.isfinite(values).all()):
            raise DataError(f"{what} has values that are NaN or infinite")
    train, validation = (x.detach().to("cpu", torch.float64) for x in (train, validation))
    generator = torch.Generator().manual_seed(seed)
    baselines = (
        fit_gaussian(train, validation),
        fit_mixture(train, validation, generator),
        fit_kde(train, validation, generator),
    )
    return {baseline.name: baseline for baseline in baselines}


def fit_gaussian(train: Tensor, validation: Tensor) -> Gaussian:
    """The Gaussian of largest likelihood, with a ridge ``r·(mean variance)·I`` if that does better on validation."""
    mean, covariance = train.mean(dim=0), torch.cov(train.T, correction=0).reshape(2 * (train.shape[1],))
    eye = torch.eye(len(mean), dtype=torch.float64, device="cpu") * covariance.diagonal().mean()
    best: tuple[float, float, Tensor] | None = None
    for ridge in _RIDGES:
        regularised = covariance + ridge * eye
        factor, failed = torch.linalg.cholesky_ex(regularised)
        if int(failed) or float(factor.diagonal().min()) < 1e-8 * float(factor.diagonal().max()):
            continue  # singular, to rounding
        score = float(Gaussian(mean, regularised, "").log_prob(validation).mean())
        if best is None or score > best[0]:
            best = score, ridge, regularised
    if best is None:
        raise DataError("the training samples are all equal: there is no Gaussian to fit")
    return Gaussian(mean, best[2], f"one Gaussian, full covariance, ridge {best[1]:g} of the mean variance")


def fit_mixture(train: Tensor, validation: Tensor, generator: torch.Generator) -> Mixture:
    """The mixture that does best on validation, over a small grid of sizes, kinds of covariance and ridges."""
    from sklearn.exceptions import ConvergenceWarning

    dim = train.shape[1]
    notes: list[str] = []
    grid = _mixture_grid(dim, notes)
    work = max(k * (1 if k == 1 else _ITERATIONS) * (dim if kind == "diag" else dim**2) for k, kind, _ in grid)
    limit = min(_FIT_LIMIT, max(1_000, int(_FIT_BUDGET / (4 * work))))
    fitted = _subsample(train, limit, generator, notes, "fitted to")
    scored = _subsample(validation, limit, generator, notes, "chosen on")
    best: tuple[float, Any, str] | None = None
    unconverged = 0
    for components, covariance, ridge in grid:
        if 2 * components > len(fitted):
            continue
        model = _mixture_model(
            components, covariance, ridge, int(torch.randint(2**31, (), generator=generator, device="cpu"))
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            try:
                model.fit(fitted.numpy())
            except ValueError:  # a covariance collapsed: this ridge is too small for so many components
                continue
        unconverged += bool(caught)
        score = float(model.score(scored.numpy()))
        if math.isfinite(score) and (best is None or score > best[0]):
            best = score, model, f"{components} Gaussians, {covariance} covariance, ridge {ridge:g}"
    if best is None:
        raise DataError("no mixture of Gaussians could be fitted: the training samples may be equal, or too few")
    if unconverged:  # expectation-maximisation that is stopped early is still a density: it is scored like the others
        notes.append(f"{unconverged} of the fits tried stopped at {best[1].max_iter} iterations")
    return Mixture(best[1], "; ".join([best[2], *notes]))


def _mixture_grid(dim: int, notes: list[str]) -> list[tuple[int, str, float]]:
    """Numbers of components, kinds of covariance and ridges to try; `notes` takes down what is left out."""
    if dim > 128:
        notes.append("several full covariances left out above 128 dimensions")
        return [*((1, "full", ridge) for ridge in (1e-3, 1e-2, 1e-1)), *((k, "diag", 1e-2) for k in (10, 50, 100))]
    if dim > 16:
        grid = [(k, "full", ridge) for ridge in (1e-2, 3e-2, 1e-1, 3e-1) for k in (1, 5, 10, 20)]
        return grid + [(k, kind, 1e-2) for kind in ("tied", "diag") for k in (10, 30)]
    grid = [(k, "full", ridge) for ridge in (1e-6, 1e-3) for k in (1, 2, 4, 8, 16, 32)]
    return grid + [(k, kind, 1e-6) for kind in ("tied", "diag") for k in (8, 32)]


def _mixture_model(components: int, covariance: str, ridge: float, seed: int) -> Any:
    from sklearn.mixture import GaussianMixture

    return GaussianMixture(
        components, covariance_type=covariance, reg_covar=ridge, max_iter=_ITERATIONS, random_state=seed
    )


def fit_kde(train: Tensor, validation: Tensor, generator: torch.Generator) -> KernelDensity:
    """The kernel estimate whose bandwidth does best on validation: a coarse grid, then a finer one."""
    notes: list[str] = []
    centres = _subsample(train, _KDE_LIMIT, generator, notes, "fitted to")
    scored = _subsample(validation, _SELECTION_LIMIT, generator, notes, "chosen on")
    squares = _square_distances(scored, centres)  # once for all bandwidths
    dim = train.shape[1]

    def score(bandwidth: float) -> float:
        return float(_kde(squares, dim, bandwidth).mean())

    unit = float(centres.std(dim=0, correction=0).square().mean().sqrt())
    if unit == 0:
        raise DataError("the training samples are all equal: there is no kernel estimate to fit")
    coarse = max((unit * 10.0**k for k in np.arange(-3, 1.01, 0.25)), key=score)
    bandwidth = max((coarse * 10.0**k for k in np.arange(-0.2, 0.21, 0.05)), key=score)
    return KernelDensity(centres, bandwidth, "; ".join([f"Gaussian kernels, bandwidth {bandwidth:.3g}", *notes]))


def _square_distances(x: Tensor, y: Tensor) -> Tensor:
    """``|x_i − y_j|²``, ``(n, m)``."""
    return torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist").square()


def _kde(squares: Tensor, dim: int, bandwidth: float) -> Tensor:
    """Log of the mean of Gaussian kernels, from square distances ``(n, m)``."""
    norm = math.log(squares.shape[1]) + dim * math.log(bandwidth * math.sqrt(2 * math.pi))
    return torch.logsumexp(squares / (-2 * bandwidth**2), dim=1) - norm


def _subsample(x: Tensor, limit: int, generator: torch.Generator, notes: list[str], role: str) -> Tensor:
    """At most `limit` samples, at random; `notes` takes it down if some are left out."""
    if len(x) <= limit:
        return x
    notes.append(f"{role} {limit} of {len(x)} samples")
    return x[torch.randperm(len(x), generator=generator, device="cpu")[:limit]]
