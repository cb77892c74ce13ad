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
from typing import NamedTuple

import torch
from torch import Tensor

from pyrnode import solvers
from pyrnode.config import SolverConfig
from pyrnode.engines import Probes, TorchEngine
from pyrnode.errors import ConfigError, SolverError
from pyrnode.flow import Flow, base_log_prob, chunked
from pyrnode.noise import SampleNoise, spread

PROBES = 16
"""Probes of an estimate with an error, where none are asked for."""

_ROWS = 500  # samples times probes in one solve
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
    flow: Flow,
    x: Tensor,
    context: Tensor | None = None,
    *,
    solver: SolverConfig | None = None,
    divergence: str = "auto",
    probes: int | None = None,
    seed: int = 0,
) -> LogProb:
    """Log-density of samples with a standard error; see `Flow.log_prob`.

    Args:
        flow: The flow.
        x: ``(batch, *event)``.
        context: ``(batch, m)`` or ``(m,)``, for conditional flows.
        solver: Solver; default the accurate one.
        divergence: ``"exact"``, ``"hutchinson"`` or ``"auto"`` (exact up to 64 dimensions).
        probes: Probes per sample where the divergence is estimated, at least 2; default 16.
        seed: Seed of the probes and of the dequantisation.

    Returns:
        Estimate and error, ``(batch,)``; the estimate is differentiable.

    Raises:
        ConfigError: One probe: it has no spread.
        DataError: `x` or `context` has the wrong shape or is not finite.
        SolverError: A solve failed.
    """
    exact = flow.draw(divergence, generator=torch.Generator()) is Probes.exact
    k = 1 if exact else PROBES if probes is None else probes
    if not exact and k < 2:
        raise ConfigError(f"probes = {k}: an error needs the spread of at least 2; leave it out for {PROBES}")
    solver, x = solver or flow.solver, flow.prepare(x)
    reference = next(flow.parameters())
    accurate = copy.deepcopy(flow, {id(flow.engine): TorchEngine()}).double()
    estimates, errors = [reference.new_zeros(0)], [reference.new_zeros(0)]
    for chunk, c in chunked(x, flow.condition(context, len(x)), max(1, _ROWS // k)):
        noise = SampleNoise(chunk, seed, reference.dtype)
        values = spread(chunk, noise)
        rows = _each_probe(flow, values, c, solver, noise, 0 if exact else k)
        estimate = rows.mean(0)
        with torch.no_grad():
            finer = _finer(accurate, values, c, solver, noise, 0 if exact else k)
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


def _finer(flow: Flow, x: Tensor, c: Tensor | None, solver: SolverConfig, noise: SampleNoise, k: int) -> Tensor:
    """Log-density ``(batch,)`` by the finer solver, with the mean of the same k probes; exact for k = 0."""
    y, log_det = flow.transform(x.double())
    try:
        draw, c = noise.draw(k) if k else Probes.exact, None if c is None else c.double()
        solution = flow.solve(y, draw, finer_solver(solver), context=c)
    except SolverError as error:
        message = f"the finer solve, from which the error is taken, failed: {error}"
        raise SolverError(message, status=error.status, block=error.block) from error
    result: Tensor = base_log_prob(solution.z) + solution.log_det + log_det
    return result


def _each_probe(flow: Flow, x: Tensor, c: Tensor | None, solver: SolverConfig, noise: SampleNoise, k: int) -> Tensor:
    """Log-density by each of k probes, ``(k, batch)``, or exact, ``(1, batch)``, for k = 0.

    An engine returns the mean over its probes, so each of them has a solve of its own.
    """
    y, log_det = flow.transform(x)
    copies = max(k, 1)
    draw = noise.draw(k, one_each=True) if k else Probes.exact
    c = None if c is None else c.repeat(copies, 1)
    solution = flow.solve(y.repeat(copies, *[1] * (y.ndim - 1)), draw, solver, context=c)
    rows: Tensor = (base_log_prob(solution.z) + solution.log_det).reshape(copies, -1) + log_det
    return rows


def _total(rows: Tensor, estimate: Tensor, finer: Tensor) -> Tensor:
    """The two shares in quadrature, and what rounding leaves undecided."""
    share = _SAFETY * (estimate - finer).abs() + 8 * torch.finfo(torch.float64).eps * estimate.abs()
    if len(rows) == 1:
        return share
    from scipy.special import stdtrit

    widening = float(stdtrit(len(rows) - 1, _ONE_SIGMA))
    return torch.hypot(widening * rows.std(0) / math.sqrt(len(rows)), share)
