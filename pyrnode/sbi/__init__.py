"""Flows as density estimators of the package `sbi` (0.27; pip install sbi), which is imported when one is built.

    from sbi.inference import NPE
    inference = NPE(prior, density_estimator=pyrnode.sbi.rnode(prior))

What a prior bounds, the posterior is learned between (`bounds_of`): no sample falls outside, so that none is rejected,
and no leakage has to be corrected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyrnode import bounded
from pyrnode.columns import Range
from pyrnode.config import Config
from pyrnode.data.samples import Splits, TensorSamples
from pyrnode.errors import ConfigError, DataError
from pyrnode.training.blueprint import Blueprint

__all__ = ["bounds_of", "rnode"]

Builder = Callable[[Tensor, Tensor], Any]


def rnode(prior: Any = None, *, bounds: Mapping[Any, Any] | None = None, **settings: Any) -> Builder:
    """What ``NPE(prior, density_estimator=...)`` takes: builds a conditional flow from simulations.

    Settings are those of the preset ``"table"``, with four steps of RK4 to train by. sbi trains the flow in its own
    loop, on the loss of eq. 17; without a ``seed`` its weights are drawn from torch's global generator.

    Args:
        prior: The prior of the parameters, whose bounds the flow takes over (`bounds_of`).
        bounds: Bounds by the parameters' numbers, from 0, in place of those of the prior; ``{}`` for none.
        **settings: Settings by name, as in `pyrnode.train`, ``period`` among them.

    Returns:
        A function of parameters ``(n, d)`` and observations ``(n, m)`` that gives sbi's `ConditionalDensityEstimator`.

    Raises:
        ConfigError: A setting is unknown or does not fit.

    Example:
        >>> from torch.distributions import Independent, Uniform
        >>> prior = Independent(Uniform(torch.zeros(2), torch.ones(2)), 1)
        >>> bounds_of(prior, 2)
        {0: (0.0, 1.0), 1: (0.0, 1.0)}
        >>> builder = rnode(prior, hidden=[32, 32])
    """
    solver = {"name": "RK4", "step_size": 0.25}
    config = Config.preset("table").override({"solver": solver, "engine": "torch", **settings})

    def build(theta: Tensor, x: Tensor) -> Any:
        from pyrnode.sbi.estimator import RNODEEstimator

        if theta.ndim != 2 or x.ndim != 2:
            raise DataError(
                f"parameters of shape {tuple(theta.shape)} and observations of shape {tuple(x.shape)}: expected (n, d) "
                "and (n, m); make a vector of each observation"
            )
        chosen = bounds
        if bounds is None and prior is not None:
            periodic = config.columns.period or {}
            chosen = {i: ends for i, ends in bounds_of(prior, theta.shape[1]).items() if str(i) not in periodic}
        made = config.override({"bounds": chosen or None})
        if "seed" not in settings:
            made = made.override({"seed": int(torch.randint(2**31 - 1, (), dtype=torch.int64, device="cpu"))})
        made = made.override({"penalties": made.penalties.settled(len(theta), theta.shape[1]).to_dict()})
        samples = TensorSamples(bounded.from_bounds(theta, bounded.transforms(made.columns, theta.shape[1:])))
        samples = samples.carrying(context=x)
        splits = Splits("the parameters", samples, samples, samples, tuple(theta.shape[1:]))
        bounded.check_source(made.columns, splits)
        return RNODEEstimator(Blueprint(splits, None).fitted(made))

    return build


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
