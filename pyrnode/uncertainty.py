"""`log_prob` with a standard error: the scatter of its probes, and the solver's share.

With probes held fixed along the solve, the estimated log-determinant is a quadratic form in each of them, so k probes
give k independent unbiased estimates ``l_j``. The stated error adds in quadrature

* the probes' share ``t s/√k``: s is the spread of the k estimates, t widens for what k of them do not know about it
  (Student's t with k − 1 degrees of freedom, at the 68 % of one standard error), and
* the solver's share ``1.5 |log p − log p'|``: p' is solved with the same probes by another method of higher order
  (DP8), in double precision and with a thousandth of the tolerance. Another method, because an easy flow takes
  one step at any tolerance. This error is there, it does not scatter, so its share is a bound.

The distribution of a quadratic form is not normal, and few probes know little about the spread: measured coverage is in
docs/estimator.md.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrnode import solvers
from pyrnode.composition import Composition
from pyrnode.config import Divergence, SolverConfig
from pyrnode.contexts import chunked
from pyrnode.data.arrays import check_spread
from pyrnode.engines import TorchEngine
from pyrnode.errors import ConfigError, SolverError
from pyrnode.probes import Draw, Probes, SampleNoise
from pyrnode.turns import LEAST, log_sum

PROBES = 16
"""Probes of an estimate with an error, where none are asked for."""

_ONE_SIGMA = 0.8413447460685429  # Φ(1)
_SAFETY = 1.5


class LogProb(NamedTuple):
    """A log-density with its error.

    Attributes:
        estimate: Nats, ``(batch,)``.
        error: Its standard error, ``(batch,)``: ``estimate ± error`` holds the flow's exact log-density for at least
            68 % of the samples.
    """

    estimate: Tensor
    error: Tensor


def log_prob_with_error(
    flow: Composition, x: Any, context: Any = None, *, solver: SolverConfig, divergence: Divergence
) -> LogProb:
    """Log-density of samples with a standard error; see `Flow.log_prob`.

    Args:
        flow: The flow.
        x: ``(batch, *event)``.
        context: ``(batch, m)`` or ``(m,)``, for conditional flows.
        solver: Solver.
        divergence: How the divergence is got; at least 2 probes where it is estimated, by default 16.

    Returns:
        Estimate and error, ``(batch,)``; the estimate is differentiable.

    Raises:
        ConfigError: One probe: it has no spread.
        DataError: `x` or `context` has the wrong shape or is not finite.
        SolverError: A solve failed.
    """
    k = 0 if divergence.exact(flow.dim) else divergence.probes or PROBES
    if k == 1:
        raise ConfigError(f"probes = {k}: an error needs the spread of at least 2; leave it out for {PROBES}")
    accurate = copy.deepcopy(flow, {id(flow.engine): TorchEngine()}).double()
    estimates, errors = [flow.reference.new_zeros(0)], [flow.reference.new_zeros(0)]
    x, context = flow.admit(x, context)
    if flow.levels is not None:
        check_spread(x, flow.levels, strict=True)
    for piece, c in chunked(x, context, max(1, flow.chunk // max(k, 1))):  # each probe has a solve
        noise = SampleNoise(piece, divergence.seed, flow.reference.dtype)
        values = noise.spread(piece)
        estimate, rows = _each_probe(flow, values, c, solver, noise, k)
        with torch.no_grad():
            finer = _finer(accurate, values, c, solver, noise, k)
            error = _total(rows.double(), estimate.double(), finer)
        estimates.append(estimate)
        errors.append(error.to(estimate))
    return LogProb(torch.cat(estimates), torch.cat(errors))


def finer_solver(solver: SolverConfig) -> SolverConfig:
    """DP8 with a thousandth of the tolerances; where a fixed step says nothing about them, with 1e-10."""
    known = solvers.METHODS.get(solver.name)
    fixed = known is not None and not known.adaptive
    rtol, atol = (1e-7, 1e-7) if fixed else (solver.rtol, solver.atol)
    return replace(
        solver,
        name="DP8",
        rtol=max(rtol / 1000, 1e-13),
        atol=max(atol / 1000, 1e-14),
        sensealg="Backprop",
        memory="auto",
        options={},
    )


def _finer(flow: Composition, x: Tensor, c: Tensor | None, solver: SolverConfig, noise: SampleNoise, k: int) -> Tensor:
    """Log-density ``(batch,)`` by the finer solver, with the mean of the same k probes; exact for k = 0."""
    draw: Draw = noise.draw(k) if k else Probes.exact
    c = None if c is None else c.double()
    try:
        return flow.solve(x.double(), draw, finer_solver(solver), context=c).log_prob
    except SolverError as error:
        message = f"the finer solve, from which the error is taken, failed: {error}"
        raise SolverError(message, status=error.status, block=error.block) from error


def _each_probe(
    flow: Composition, x: Tensor, c: Tensor | None, solver: SolverConfig, noise: SampleNoise, k: int
) -> tuple[Tensor, Tensor]:
    """Log-density by k probes together ``(batch,)``, and by each ``(k, batch)``; exact, ``(1, batch)``, for k = 0.

    An engine returns the mean over its probes, so each of them has a solve of its own. With periodic columns the mean
    is one of each of the values that a sample stands for, before these are summed, as `Flow.log_prob` has it; what a
    probe adds to it is linearised.
    """
    copies = max(k, 1)
    draw: Draw = noise.draw(k, one_each=True) if k else Probes.exact
    c = None if c is None else c.repeat(copies, *[1] * len(flow.context_shape))
    passage = flow.solve(x.repeat(copies, *[1] * (x.ndim - 1)), draw, solver, context=c)
    if passage.turns is None:
        rows = passage.log_prob.reshape(copies, -1)
        return rows.mean(0), rows
    each = passage.turns.unflatten(1, (copies, -1))
    mean = each.mean(1)
    estimate, possible = log_sum(mean), mean > -math.inf
    away = torch.where(possible[:, None], each - mean[:, None], 0.0)
    return estimate, estimate + (torch.softmax(mean.clamp(min=LEAST), 0)[:, None] * away).sum(0)


def _total(rows: Tensor, estimate: Tensor, finer: Tensor) -> Tensor:
    """The two shares in quadrature, and what rounding leaves undecided."""
    none = estimate == -math.inf  # outside of the columns' bounds, of which there is no doubt
    rows, estimate, finer = (torch.where(none, 0.0, values) for values in (rows, estimate, finer))
    share = _SAFETY * (estimate - finer).abs() + 8 * torch.finfo(torch.float64).eps * estimate.abs()
    if len(rows) == 1:
        return share
    from scipy.special import stdtrit

    widening = float(stdtrit(len(rows) - 1, _ONE_SIGMA))
    return torch.hypot(widening * rows.std(0) / math.sqrt(len(rows)), share)
