"""`RNODEDensity`: a flow as a scikit-learn density estimator.

It keeps scikit-learn's rules (``check_estimator``), so it goes into pipelines and searches, and stands beside
``KernelDensity`` and ``GaussianMixture``. Importing this module imports scikit-learn; `import pyrnode` does not.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.exceptions import NotFittedError
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from pyrnode import bounded
from pyrnode.anomalies import Calibration, log_densities
from pyrnode.config import Config, made_for
from pyrnode.data import Samples, Splits, TensorSamples, support
from pyrnode.data.arrays import check_varies, refuse_masked
from pyrnode.data.frames import columns_of, is_frame, read_frame
from pyrnode.errors import ConfigError, DataError, PyrnodeError, SolverWarning
from pyrnode.flow import Flow
from pyrnode.runs import Record
from pyrnode.training.trainer import Trainer


class UnfittedError(PyrnodeError, NotFittedError):  # type: ignore[misc]
    """The estimator has not been fitted, or not calibrated."""


class RNODEDensity(DensityMixin, BaseEstimator):  # type: ignore[misc]
    """Density of a table by a regularised neural ODE; with a context, the conditional density ``p(x | c)``.

    Features are whitened inside, as far as other samples bear it, and all densities are in the units of the input. A
    share of the samples is held out, and the weights that are best on it are kept. The training settings that are not
    parameters here are those of the preset ``"table"``, from 48 features on ``"wide-table"``; `overrides` sets them.

    Args:
        hidden: Widths of the network's hidden layers; ``"auto"`` is the preset's, 64-64-64 or 128-128-128.
        activation: ``"tanh"``, ``"softplus"``, ``"silu"``, ``"gelu"`` or ``"elu"``; of a potential ``"logcosh"`` too,
            and only the first two.
        network: ``"mlp"``, or ``"potential"``: the dynamics are the gradient of one (`pyrnode.Potential`).
        blocks: ODE blocks, one after the other.
        kinetic: ``λ_K``, weight of the kinetic energy; ``"auto"`` is 5 d/n, between 0.01 and 1.
        jacobian: ``λ_J``, weight of the Jacobian's squared Frobenius norm; likewise.
        solver: Training solver; ``"auto"`` is the cheapest that is right (`SolverConfig`).
        step_size: Its step; ``"auto"`` is the largest that is right.
        divergence: Trace in training: ``"exact"``, ``"hutchinson"`` (estimated), or ``"auto"``: exact up to 2
            features, and of a potential. In use it is exact up to 64 features, unless `overrides` has
            ``evaluation.divergence``.
        max_steps: Optimiser steps.
        batch_size: Samples per step.
        learning_rate: Peak learning rate; ``"auto"`` is the preset's, 0.01 or 0.005.
        validation_fraction: Share of the samples held out to choose the best weights on, in [0, 1). With 0, all
            samples are trained on, and the weights that are best on them are kept; not in use with `X_val`.
        patience: Stop after this many validations without improvement; `None` never stops early.
        calibration_fraction: Share of the samples held out for `p_values`, in [0, 1); with 0, call `calibrate`.
        dtype: ``"float64"`` or ``"float32"``.
        device: torch device, or ``"auto"``.
        engine: ``"torch"``, ``"julia"`` or ``"auto"``. Neither survives a fork: see `docs/estimator.md` on workers.
        overrides: Other settings of `pyrnode.Config` by name, e.g. ``{"weight_decay": 1e-4, "ema": 0.99}``.
        bounds: Columns whose values lie between bounds, by name, or by number where `fit` is given no names:
            ``{"share": (0, 1), "income": (0, None)}``. Elsewhere the density is zero (`pyrnode.ColumnsConfig`).
        period: Columns that are periodic: ``{"angle": 360}``, or ``{"angle": (-180, 180)}``.
        verbose: Show a progress bar.
        random_state: Seed of initialisation, hold-out, order and noise: a number for the same result at each fit.

    Attributes:
        flow_: The `Flow`; ``flow_.save(path)`` writes it for ``pyrnode.load`` and the command line.
        history_: Record of each step and validation.
        n_iter_: Optimiser steps taken.
        calibration_: Held-out scores behind `p_values`, once there are some.
        n_features_in_: Number of features.
        feature_names_in_: Their names, where `fit` was given a data frame with names.

    Example:
        >>> import numpy as np
        >>> X = np.random.default_rng(0).normal(3.0, 2.0, size=(200, 2))
        >>> model = RNODEDensity(hidden=(8,), max_steps=20, random_state=0).fit(X)
        >>> model.score_samples(X[:3]).shape, model.sample(5, random_state=0).shape
        ((3,), (5, 2))
    """

    flow_: Flow
    history_: list[Record]
    n_iter_: int
    calibration_: Calibration
    n_features_in_: int

    def __init__(
        self,
        *,
        hidden: Sequence[int] | Literal["auto"] = "auto",
        activation: str = "tanh",
        network: Literal["mlp", "potential"] = "mlp",
        blocks: int = 1,
        kinetic: float | Literal["auto"] = "auto",
        jacobian: float | Literal["auto"] = "auto",
        solver: str = "auto",
        step_size: float | Literal["auto"] = "auto",
        divergence: Literal["auto", "exact", "hutchinson"] = "auto",
        max_steps: int = 1000,
        batch_size: int = 256,
        learning_rate: float | Literal["auto"] = "auto",
        validation_fraction: float = 0.1,
        patience: int | None = 10,
        calibration_fraction: float = 0.0,
        dtype: Literal["float64", "float32"] = "float32",
        device: str = "cpu",
        engine: str = "torch",
        overrides: Mapping[str, Any] | None = None,
        bounds: Mapping[Any, Any] | None = None,
        period: Mapping[Any, Any] | None = None,
        verbose: bool = False,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.hidden = hidden
        self.activation = activation
        self.network = network
        self.blocks = blocks
        self.kinetic = kinetic
        self.jacobian = jacobian
        self.solver = solver
        self.step_size = step_size
        self.divergence = divergence
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.calibration_fraction = calibration_fraction
        self.dtype = dtype
        self.device = device
        self.engine = engine
        self.overrides = overrides
        self.bounds = bounds
        self.period = period
        self.verbose = verbose
        self.random_state = random_state

    # -- fitting -----------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)  # as in `pyrnode.train`
    @torch.enable_grad()
    def fit(
        self,
        X: ArrayLike,
        y: Any = None,
        sample_weight: ArrayLike | None = None,
        context: ArrayLike | None = None,
        *,
        X_val: ArrayLike | None = None,
        sample_weight_val: ArrayLike | None = None,
        context_val: ArrayLike | None = None,
    ) -> Self:
        """Learns the density.

        Args:
            X: ``(n, d)``, n at least 2 beside what is held out; an array or a data frame.
            y: Not used.
            sample_weight: Weights of the samples, ``(n,)``, not negative: a weight of 2 counts as two samples in the
                loss, in the choice of the best weights and in the standardisation; 0 leaves the sample out.
            context: ``(n, m)``, what the density is conditional on; the other methods then need one, too.
            X_val: ``(n', d)``, samples to choose the best weights on; neither trained on nor standardised by.
            sample_weight_val: Their weights, ``(n',)``; default 1 for all.
            context_val: Their context, ``(n', m)``, where there is a `context`.

        Raises:
            ConfigError: A parameter does not fit.
            DataError: `X`, the weights or the context are not usable, or those for validation, or do not fit together.
            TrainingDivergedError: Training stayed non-finite.

        Warns:
            SolverWarning: The training solver became wrong, and the parameters allow no finer one.
            SupportWarning: The samples have no density, or some are held out and trained on (`pyrnode.data.support`).
        """
        X = self._checked(X, reset=True)
        names, context_names = getattr(self, "feature_names_in_", None), None
        if is_frame(context):
            context, context_names = read_frame(context, "context")
        samples = _samples(X, context, sample_weight)
        held = self._held(samples, X_val, sample_weight_val, context_val, context_names)
        rng = check_random_state(self.random_state)
        shape, named = X.shape[1:], None if names is None else tuple(names)
        config = self._config(shape, int(rng.randint(2**31 - 1)))
        rows = self._divided(torch.from_numpy(rng.permutation(len(samples))), samples.weight, held is None)
        train = samples.take(rows["train"])
        check_varies(train.tensor(), "X (what is trained on)", named)
        first = bounded.transforms(config.columns, shape, None, named, context_names)
        for part, what in ((samples, "X"), (held, "X_val")):
            if part is not None:
                left = "" if part.weight is None else " (rows of weight zero left out)"
                bounded.check_within(part, first, what + left, named)
        if held is not None:
            validation = held.take(torch.from_numpy(rng.permutation(len(held))))
        else:
            validation = samples.take(rows["validation"]) if len(rows["validation"]) else train
        # Nothing looks at the test set.
        splits = Splits("X", train, validation, validation, shape, features=named, context_features=context_names)
        support.warn(splits)
        trainer = Trainer(config, splits, None, progress=bool(self.verbose))
        trainer.say = lambda note: warnings.warn(note, SolverWarning, stacklevel=6)
        if not trainer.run():
            raise KeyboardInterrupt
        self.flow_, self.history_, self.n_iter_ = trainer.best_flow(), trainer.history, trainer.state.progress.step
        if hasattr(self, "calibration_"):  # of an earlier fit
            del self.calibration_
        if len(rows["calibration"]):
            kept = samples.take(rows["calibration"])
            self.calibration_ = Calibration(log_densities(self.flow_, kept.tensor(), kept.context))
        return self

    def _held(
        self,
        samples: Samples,
        X_val: ArrayLike | None,
        weight: ArrayLike | None,
        context: ArrayLike | None,
        context_names: tuple[str, ...] | None,
    ) -> Samples | None:
        """The user's own validation samples, which go with `samples`; `None` without."""
        for name, given in (("sample_weight_val", weight), ("context_val", context)):
            if X_val is None and given is not None:
                raise DataError(f"{name} is given, but no X_val: pass the samples that it belongs to")
        if X_val is None:
            return None
        X_val = self._checked(X_val, "X_val", reset=False)
        if (context is None) != (samples.context is None):
            missing, there = ("context", "context_val") if samples.context is None else ("context_val", "context")
            raise DataError(f"{there} is given, but no {missing}: give both, or neither")
        held = _samples(X_val, columns_of(context, context_names, "context_val"), weight, "_val")
        if held.context is not None and held.context.shape[1:] != (width := cast(Tensor, samples.context).shape[1:]):
            raise DataError(f"context_val has {held.context.shape[1]} features, context {width[0]}: give it the same")
        return held

    def _config(self, shape: tuple[int, ...], seed: int) -> Config:
        """The settings of the run."""
        config = Config.preset(made_for(shape)).override({"solver": self.solver})
        if not isinstance(self.hidden, str):  # an array does not compare as one
            widths = list(self.hidden) if isinstance(self.hidden, Iterable) else self.hidden
            config = config.override({"hidden": widths})
        elif self.hidden != "auto":
            raise ConfigError(f"hidden = {self.hidden!r}: expected 'auto', or widths such as (64, 64)")
        if self.learning_rate != "auto":
            config = config.override({"training.learning_rate": self.learning_rate})
        config = config.override(
            {
                "flow.network.kind": self.network,
                "flow.network.activation": self.activation,
                "flow.blocks": self.blocks,
                "penalties.kinetic": self.kinetic,
                "penalties.jacobian": self.jacobian,
                "penalties.divergence": self.divergence,
                "solver.step_size": self.step_size,
                "training.max_steps": self.max_steps,
                "training.batch_size": self.batch_size,
                "training.patience": self.patience,
                "dtype": self.dtype,
                "device": self.device,
                "engine": self.engine,
                "bounds": self.bounds,
                "period": self.period,
                "seed": seed,
            }
        )
        config = config.override(dict(self.overrides or {}))
        if config.data != Config().data:
            raise ConfigError(
                f"overrides = {self.overrides!r}: no setting of data has an effect, fit is given the data"
            )
        return config

    def _divided(self, order: Tensor, weights: Tensor | None, validates: bool) -> dict[str, Tensor]:
        """The rows to train and calibrate on, and, if a share of them `validates`, those to validate on."""
        n, sizes = len(order), {}
        for name in ("validation", "calibration"):
            fraction = getattr(self, f"{name}_fraction")
            if isinstance(fraction, bool) or not (isinstance(fraction, (int, float, np.number)) and 0 <= fraction < 1):
                raise ConfigError(f"{name}_fraction = {fraction!r}: expected a share in [0, 1)")
            sizes[name] = max(1, round(float(fraction) * n)) if fraction and (validates or name != "validation") else 0
        left = n - sum(sizes.values())
        if left < 2:
            raise DataError(
                f"n_samples = {n}: {left} are left to train on beside {sizes['validation']} for validation and "
                f"{sizes['calibration']} for calibration; expected at least 2"
            )
        if sizes["calibration"] and weights is not None and not torch.allclose(weights, weights[0]):
            raise ConfigError(
                "calibration_fraction with unequal sample weights: p-values count samples, which have one weight each; "
                "use calibration_fraction=0 and calibrate(X) with held-out samples as you expect them in use"
            )
        calibration, validation, train = order.split([sizes["calibration"], sizes["validation"], left])
        return {"train": train, "validation": validation, "calibration": calibration}

    def _checked(self, X: ArrayLike, what: str = "X", *, reset: bool) -> NDArray[Any]:
        """`X` as scikit-learn checks it; its `ValueError`s as ours, which say what it is called."""
        refuse_masked(X, what)
        try:
            checked: NDArray[Any] = validate_data(
                self, X, reset=reset, dtype=[np.float64, np.float32], ensure_min_samples=2 if reset else 1
            )
        except ValueError as error:
            raise DataError(str(error) if what == "X" else f"{what}: {error}") from error
        return checked

    def _fitted(self, attribute: str, remedy: str) -> None:
        if not hasattr(self, attribute):
            raise UnfittedError(f"this RNODEDensity {remedy}")
        check_is_fitted(self, attribute)

    # -- use ---------------------------------------------------------------------------------------------------------

    def _context(self, context: ArrayLike | None, n: int | None) -> Tensor | None:
        """A context of `n` samples, a data frame's columns in the order of those in `fit`."""
        if context is None:
            return None
        return _checked_context(columns_of(context, self.flow_.context_features, "context"), n)

    def _log_prob(self, X: NDArray[Any], context: Tensor | None) -> NDArray[np.float64]:
        return log_densities(self.flow_, torch.tensor(X, device="cpu"), context)

    def score_samples(self, X: ArrayLike, context: ArrayLike | None = None) -> NDArray[np.float64]:
        """Log-density of each sample.

        Args:
            X: ``(n, d)``.
            context: ``(n, m)``, or ``(m,)`` for one that all samples share, where there was one in `fit`.

        Returns:
            Nats, ``(n,)``, in the units of `X`.

        Raises:
            UnfittedError: `fit` has not been called.
            DataError: `X` or `context` has another width than in `fit`, or is not finite.
            SolverError: A solve failed.
        """
        self._fitted("flow_", "is not fitted: call fit first")
        X = self._checked(X, reset=False)
        return self._log_prob(X, self._context(context, len(X)))

    def score(self, X: ArrayLike, y: Any = None, context: ArrayLike | None = None) -> float:
        """Total log-density of the samples ``(n, d)`` in nats, as ``KernelDensity.score``; `y` is not used."""
        return float(self.score_samples(X, context).sum())

    def sample(
        self,
        n_samples: int = 1,
        random_state: int | np.random.RandomState | None = None,
        context: ArrayLike | None = None,
    ) -> NDArray[np.float64]:
        """Draws samples in the units of the input.

        Returns:
            ``(n_samples, d)``; for contexts ``(b, m)``, ``(b, n_samples, d)``.

        Raises:
            UnfittedError: `fit` has not been called.
            ConfigError: `n_samples` is no whole number, or negative.
            DataError: `context` as in `score_samples`.
        """
        self._fitted("flow_", "is not fitted: call fit first")
        seed = int(check_random_state(random_state).randint(2**31 - 1))
        given = self._context(context, None)
        return self.flow_.sample(n_samples, given, seed=seed).double().cpu().numpy()

    def calibrate(self, X: ArrayLike, context: ArrayLike | None = None) -> Self:
        """Takes the scores behind `p_values` from samples ``(n, d)`` that were not trained on.

        Raises:
            UnfittedError: `fit` has not been called.
            DataError: `X` does not fit.
        """
        self.calibration_ = Calibration(self.score_samples(X, context))
        return self

    def p_values(self, X: ArrayLike, context: ArrayLike | None = None) -> NDArray[np.float64]:
        """How unusual each sample is: the chance that a sample like those of the calibration has as low a density.

        With n calibration scores ``c_i``, ``p = (1 + #{c_i ≤ log p(x)})/(n + 1)`` (conformal: for x from the same
        distribution, ``P(p ≤ α) ≤ α`` for every α, whatever the quality of the flow).

        Args:
            X: ``(n', d)``.
            context: As in `score_samples`.

        Returns:
            ``(n',)``, from ``1/(n + 1)`` to 1.

        Raises:
            UnfittedError: Neither was ``calibration_fraction`` set nor `calibrate` called.
            DataError: `X` does not fit.
        """
        scores = self.score_samples(X, context)
        self._fitted(
            "calibration_", "is not calibrated: set calibration_fraction, or call calibrate(X) with held-out samples"
        )
        return self.calibration_.p_values(scores)


def _samples(
    X: NDArray[Any], context: ArrayLike | None, sample_weight: ArrayLike | None, suffix: str = ""
) -> TensorSamples:
    """Samples with contexts and weights, those of weight zero left out; messages name arguments of that suffix."""
    samples, given = TensorSamples(torch.tensor(X, device="cpu")), None
    if context is not None:
        given = _checked_context(context, len(X), f"context{suffix}")
        if given.ndim != 2:
            name = f"context{suffix}"
            raise DataError(f"{name} has shape {tuple(given.shape)}: for one feature, pass {name}[:, None]")
    if sample_weight is None:
        return samples.carrying(context=given)
    weight = _checked_weights(sample_weight, len(X), f"sample_weight{suffix}")
    used = weight > 0
    return TensorSamples(samples.tensor()[used]).carrying(
        context=None if given is None else given[used], weight=weight[used]
    )


def _checked_context(context: ArrayLike, n: int | None, what: str = "context") -> Tensor:
    """A context of `n` samples ``(n, m)``, or a single one ``(m,)`` once the flow is there to check its width."""
    refuse_masked(context, what)
    try:
        values = check_array(context, ensure_2d=False, dtype=np.float64, input_name=what)
    except ValueError as error:
        raise DataError(str(error)) from error
    if values.ndim == 2 and n is not None and len(values) != n:
        raise DataError(f"{what} has shape {values.shape}: expected ({n}, m), a row for each sample")
    return torch.tensor(values, device="cpu")


def _checked_weights(sample_weight: ArrayLike, n: int, what: str) -> Tensor:
    refuse_masked(sample_weight, what)
    try:
        weights: NDArray[np.float64] = check_array(sample_weight, ensure_2d=False, dtype=np.float64, input_name=what)
    except ValueError as error:
        raise DataError(str(error)) from error
    if weights.shape != (n,):
        raise DataError(f"{what} has shape {weights.shape}: expected ({n},), one for each sample")
    if bool((weights < 0).any()):
        raise DataError(f"{what} has negative values, down to {weights.min():g}")
    if not bool((weights > 0).any()):
        raise DataError(f"{what}: all weights are zero, so nothing is left")
    return torch.tensor(weights, device="cpu")
