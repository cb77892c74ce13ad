"""Flows as density estimators of the package `sbi` (0.27; pip install sbi), which is imported when one is built.

    from sbi.inference import NPE
    inference = NPE(prior, density_estimator=pyrnode.sbi.rnode(prior))
    inference = NLE(prior, density_estimator=pyrnode.sbi.likelihood())

What a prior bounds, the posterior is learned between (`bounds_of`): no sample falls outside, so that none is rejected,
and no leakage has to be corrected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyrnode import bounded, training
from pyrnode.columns import Range
from pyrnode.config import Config
from pyrnode.data.samples import MINIMUM, Samples, Splits, TensorSamples
from pyrnode.embedding import Given, Recipe
from pyrnode.errors import ConfigError, DataError
from pyrnode.sbi.checks import Ranks, ranks
from pyrnode.settings import flatten
from pyrnode.training.blueprint import Blueprint

__all__ = ["Ranks", "bounds_of", "likelihood", "ranks", "rnode", "train"]

_PENALTIES = tuple(f"penalties.{name}" for name in ("total_derivative", "hjb", "convention"))

_IDLE = ("training.", "data.", "solver.precision", *_PENALTIES)
"""How settings begin that sbi's loop has no use for."""

_USE = {"rtol": 1e-4, "atol": 1e-4}
"""Tolerances in use: log-densities of two moons' sharp posteriors are 0.004 nats off in the mean, in half the time."""

_USUAL: dict[str, Any] = {
    "engine": "torch",
    "activation": "silu",
    "evaluation.solver": _USE,
    "evaluation.chunk": 10_000,
}
"""Settings that differ from those of the preset "table"; what silu gains is in docs/conditional.md."""

_AVERAGED = 0.99
"""Decay of the averaged weights of `train`: what is best on validation is mostly found at high rates, where few
simulations are soon learned by heart."""

Builder = Callable[[Tensor, Tensor], Any]


def rnode(
    prior: Any = None,
    *,
    bounds: Mapping[Any, Any] | None = None,
    embedding: Given | None = None,
    **settings: Any,
) -> Builder:
    """What ``NPE(prior, density_estimator=...)`` takes: builds a conditional flow from simulations.

    Settings are those of the preset ``"table"``, with silu for the activation and tolerances of 1e-4 in use. sbi trains
    the flow in its own loop, on the loss of eq. 17, by the cheapest solver that is right; it validates by the
    likelihood alone, with the accurate one. sbi's rate of 5e-4 is made 1e-2, with a warm-up, and is halved where
    validation does not improve (`pyrnode.sbi.pace`); another ``learning_rate`` of ``inference.train`` is the peak as it
    is. What is validated and used is the average of the last weights. Without a ``seed`` they are drawn from torch's
    global generator.

    Args:
        prior: The prior of the parameters, whose bounds the flow takes over (`bounds_of`).
        bounds: Bounds by the parameters' numbers, from 0, in place of those of the prior; ``{}`` for none.
        embedding: As in `pyrnode.train`: a network that makes a vector of each observation, which may then have any
            shape ``(n, *shape)``, and is trained with the flow.
        **settings: Settings by name, as in `pyrnode.train`, ``period`` among them.

    Returns:
        A function of parameters ``(n, d)`` and observations ``(n, m)`` that gives sbi's `ConditionalDensityEstimator`.

    Raises:
        ConfigError: A setting is unknown, does not fit, or has no effect in sbi's loop (``max_steps``, ``minutes`` …).

    Example:
        >>> from torch.distributions import Independent, Uniform
        >>> prior = Independent(Uniform(torch.zeros(2), torch.ones(2)), 1)
        >>> bounds_of(prior, 2)
        {0: (0.0, 1.0), 1: (0.0, 1.0)}
        >>> builder = rnode(prior, hidden=[32, 32])
    """
    config, recipe = _config(settings), None if embedding is None else Recipe.of(embedding)

    def build(theta: Tensor, x: Tensor) -> Any:
        samples, chosen = _simulated(theta, x, prior, bounds, config, recipe)
        config_ = config.override({"bounds": chosen})
        return _untrained("the parameters", samples, config_, recipe, drawn="seed" not in settings)

    return build


def likelihood(*, bounds: Mapping[Any, Any] | None = None, embedding: Given | None = None, **settings: Any) -> Builder:
    """What ``NLE(prior, density_estimator=...)`` takes: builds a flow of the observations, ``p(x | θ)``.

    Args:
        bounds: Bounds of the observations, by their numbers, from 0.
        embedding: A network for the parameters, as in `rnode` for the observations.
        **settings: As in `rnode`; ``period`` is of the observations.

    Returns:
        As `rnode` does.

    Raises:
        ConfigError: A setting is unknown or does not fit.

    Example:
        >>> builder = likelihood(hidden=[32, 32], bounds={0: (0, None)})
    """
    config = _config(settings).override({"bounds": bounds or None})
    recipe = None if embedding is None else Recipe.of(embedding)

    def build(theta: Tensor, x: Tensor) -> Any:
        _check_shapes(theta, x)
        samples = _carrying(x, theta, config)
        return _untrained("the observations", samples, config, recipe, drawn="seed" not in settings)

    return build


def _config(settings: Mapping[str, Any]) -> Config:
    """The settings of a flow that sbi trains; `ConfigError` where one is of what its loop does instead."""
    usual = Config.preset("table").override(_USUAL)
    config = usual.override(settings)
    before, after = flatten(usual.to_dict()), flatten(config.to_dict())
    idle = [name for name in after if name.startswith(_IDLE) and after[name] != before.get(name)]
    if idle := [name for name in idle if name != "training.tolerance"]:
        raise ConfigError(
            f"{', '.join(idle)}: without effect in sbi's loop, which has a rate and an end of its own: leave it "
            "to inference.train(...), or train by pyrnode.sbi.train(theta, x, prior, ...)"
        )
    return config


def _untrained(name: str, samples: Samples, config: Config, recipe: Recipe | None, *, drawn: bool) -> Any:
    """The estimator to be trained by sbi, whose seed is `drawn` from torch's global generator, or given."""
    from pyrnode.sbi.estimator import RNODEEstimator

    (dim,) = shape = tuple(samples.first(1).x.shape[1:])
    if drawn:
        config = config.override({"seed": int(torch.randint(2**31 - 1, (), dtype=torch.int64, device="cpu"))})
    config = config.override({"penalties": config.penalties.settled(len(samples), dim).to_dict()})
    splits = Splits(name, samples, samples, samples, shape)
    bounded.check_source(config.columns, splits)
    return RNODEEstimator(Blueprint(splits, embedding=recipe).fitted(config), name, samples.context)


def train(
    theta: Tensor,
    x: Tensor,
    prior: Any = None,
    *,
    bounds: Mapping[Any, Any] | None = None,
    embedding: Given | None = None,
    validation: float = 0.1,
    **settings: Any,
) -> Any:
    """Trains a flow on simulations by `pyrnode.train`, in place of sbi's loop, which has no schedule of the rate.

    The parameters must be drawn from the prior: there is no correction for another proposal, as later rounds have it.

        estimator = pyrnode.sbi.train(theta, x, prior)
        posterior = NPE(prior).build_posterior(estimator)

    Args:
        theta: Parameters ``(n, d)``, drawn from the prior.
        x: Their observations ``(n, m)``, or ``(n, *shape)`` for an embedding.
        prior: As in `rnode`.
        bounds: As in `rnode`.
        embedding: As in `rnode`.
        validation: Share of the simulations that are held out to choose the best flow on.
        **settings: Settings and arguments of `pyrnode.train`, such as ``minutes``, ``out`` and ``progress``; by default
            those of the preset ``"table"``.

    Returns:
        sbi's `ConditionalDensityEstimator`, whose ``net`` is the flow.

    Raises:
        ConfigError: A setting is unknown or does not fit.
        DataError: The simulations are of no use: shapes that do not fit, too few, NaN, or outside of the bounds.
        TrainingDivergedError: As in `pyrnode.train`.
    """
    from pyrnode.sbi.estimator import RNODEEstimator

    if not 0 < validation < 0.9:
        raise ConfigError(f"validation = {validation!r}: expected a share between 0 and 0.9")
    known: dict[str, Any] = {key: settings[key] for key in ("period", "columns") if key in settings}
    recipe = None if embedding is None else Recipe.of(embedding)
    samples, chosen = _simulated(theta, x, prior, bounds, Config.preset("table").override(known), recipe)
    for what, values in (("parameters", theta), ("observations", x)):
        if bad := int((~torch.isfinite(values)).flatten(1).any(1).sum()):
            raise DataError(f"{what}: {bad} of {len(values)} simulations have NaN or infinite values; leave those out")
    held = max(1, round(validation * len(samples)))
    if len(samples) < MINIMUM:
        raise DataError(f"{len(samples)} simulations: expected at least {MINIMUM}")
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0), device="cpu")
    kept = samples.take(order[:held])
    splits = Splits("the parameters", samples.take(order[held:]), kept, kept, tuple(theta.shape[1:]))
    given = {"preset": "table", **_USUAL, "ema": _AVERAGED, "bounds": chosen, **settings}
    result = training.train(splits, embedding=embedding, evaluate=False, **given)
    return RNODEEstimator(result.flow, "the parameters").eval()


def _simulated(
    theta: Tensor,
    x: Tensor,
    prior: Any,
    bounds: Mapping[Any, Any] | None,
    config: Config,
    recipe: Recipe | None,
) -> tuple[Samples, Mapping[Any, Any] | None]:
    """Parameters that carry their observations, and their bounds, on which none of them lies."""
    _check_shapes(theta, x, embedded=recipe is not None)
    chosen = bounds
    if bounds is None and prior is not None:
        periodic = config.columns.period or {}
        chosen = {i: ends for i, ends in bounds_of(prior, theta.shape[1]).items() if str(i) not in periodic}
    return _carrying(theta, x, config.override({"bounds": chosen or None})), chosen or None


def _check_shapes(theta: Tensor, x: Tensor, *, embedded: bool = False) -> None:
    if theta.ndim != 2 or x.ndim < 2 or (x.ndim > 2 and not embedded) or len(theta) != len(x):
        remedy = ", or pass embedding=, a network that does" if x.ndim > 2 else ""
        raise DataError(
            f"parameters of shape {tuple(theta.shape)} and observations of shape {tuple(x.shape)}: expected (n, d) "
            f"and (n, m); make a vector of each observation{remedy}"
        )


def _carrying(values: Tensor, context: Tensor, config: Config) -> Samples:
    """Samples and their contexts; those on a bound moved to within."""
    within = bounded.from_bounds(values, bounded.transforms(config.columns, values.shape[1:]))
    return TensorSamples(within).carrying(context=context)


def bounds_of(prior: Any, count: int) -> dict[int, Range]:
    """Between which bounds a prior has its parameters, by their numbers; those without bounds are left out.

    Args:
        prior: A distribution of torch or sbi over vectors, with a `support`: ``BoxUniform``, ``Independent``,
            ``MultipleIndependent`` (of sbi) and what else has intervals or half lines for it.
        count: Number of parameters.

    Raises:
        ConfigError: The prior has no support, or one of another width.
    """
    support = getattr(prior, "support", None)
    if support is None:
        raise ConfigError(f"prior = {type(prior).__name__}: it has no support, so give bounds={{...}} ({{}} for none)")
    low, high = _ends(support, count)
    if len(low) != count or len(high) != count:
        raise ConfigError(f"prior = {type(prior).__name__}: it has {len(low)} parameters, the simulations {count}")
    pairs = zip(low.tolist(), high.tolist(), strict=True)
    return {i: pair for i, pair in enumerate(pairs) if pair != (-torch.inf, torch.inf)}


def _ends(support: Any, count: int) -> tuple[Tensor, Tensor]:
    """Lower and upper ends of a constraint, ``(count,)``; infinite where it says nothing of them."""
    if isinstance(support, constraints.independent):
        return _ends(support.base_constraint, count)
    if isinstance(support, constraints.cat):
        pieces = [_ends(part, length) for part, length in zip(support.cseq, support.lengths, strict=True)]
        return torch.cat([low for low, _ in pieces]), torch.cat([high for _, high in pieces])
    ends = []
    for name, otherwise in (("lower_bound", -torch.inf), ("upper_bound", torch.inf)):
        value = getattr(support, name, otherwise)
        end = torch.as_tensor(value, dtype=torch.float64, device="cpu").flatten()
        ends.append(end.expand(count) if len(end) == 1 else end)
    return ends[0], ends[1]
