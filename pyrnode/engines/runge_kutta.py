"""Explicit Runge-Kutta stepping: a fixed grid, or steps that every sample of the batch chooses for itself.

Adaptive steps are per sample: each has its own time, step and error, and leaves the computation when it has arrived.
So a sample's result does not depend on which others share its batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyrnode.devices import awaited
from pyrnode.dynamics.layers import Time
from pyrnode.engines.base import STUCK, Stats, not_finite_at_start, stuck, unstable
from pyrnode.errors import SolverError
from pyrnode.solvers import Method, Tableau

_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 10.0  # of the step-size controller, as in Hairer and in SciPy


class Rate(NamedTuple):
    """A derivative: of the state ``(batch, *event)`` and of the integrals ``(batch, m)``."""

    y: Tensor
    q: Tensor


class System(Protocol):
    """The right-hand side, for the samples `rows` of the batch (`None`: for all of them).

    Attributes:
        apart: Whether integrands cost so much more than the state's rate that they are asked for only where the state
            lets a step stand, though that evaluates it again.
    """

    @property
    def apart(self) -> bool: ...

    def rate(self, t: Time, y: Tensor, rows: Tensor | None, /) -> Rate:
        """That of the state and of the integrals."""
        ...

    def state_rate(self, t: Time, y: Tensor, rows: Tensor | None, /) -> Tensor:
        """That of the state, where a stage has no weight in the integrals, or there are none."""
        ...


class StateOnly(ABC):
    """A `System` without integrals."""

    apart = False

    @abstractmethod
    def state_rate(self, t: Time, y: Tensor, rows: Tensor | None) -> Tensor:
        """The derivative of the state."""

    def rate(self, t: Time, y: Tensor, rows: Tensor | None) -> Rate:
        """The same, with no integrals beside it."""
        return Rate(self.state_rate(t, y, rows), y.new_empty(len(y), 0))


@dataclass
class Step:
    """An accepted step, as the backward pass needs it.

    Attributes:
        rows: Samples that took it; `None` for all of them.
        t, h: Start and length: numbers, or one per sample.
        stages: State at each stage.
    """

    rows: Tensor | None
    t: Time
    h: Time
    stages: list[Tensor]


OnStep = Callable[[Step], None]


def per_sample(x: Time, like: Tensor) -> Time:
    """`x` so that it multiplies ``(batch, ...)`` sample by sample."""
    return x.reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype) if isinstance(x, Tensor) else x


def combine(base: Tensor, rates: Sequence[Tensor], weights: Sequence[float], h: Time) -> Tensor:
    """``base + h Σ weights_j rates_j``."""
    terms = [(w, k) for w, k in zip(weights, rates, strict=False) if w]
    if not isinstance(h, Tensor):
        for w, k in terms:
            base = torch.add(base, k, alpha=w * h)
        return base
    if not terms:
        return base
    total = terms[0][1] * terms[0][0]
    for w, k in terms[1:]:
        total.add_(k, alpha=w)
    return base.addcmul(total, torch.as_tensor(per_sample(h, base)))


def grid(t_span: tuple[float, float], step_size: float) -> list[tuple[float, float]]:
    """Times and lengths of fixed steps; the last one is shortened where they do not fit."""
    t0, t1 = t_span
    count = max(1, math.ceil(abs(t1 - t0) / step_size - 1e-9))
    h = math.copysign(step_size, t1 - t0)
    starts = [t0 + i * h for i in range(count)]
    return [(t, (starts[i + 1] if i + 1 < count else t1) - t) for i, t in enumerate(starts)]


def solve_fixed(
    system: System,
    y: Tensor,
    q: Tensor,
    steps: list[tuple[float, float]],
    method: Method,
    *,
    on_step: OnStep | None = None,
    check: bool = False,
) -> tuple[Tensor, Tensor, Stats]:
    """Integrates along a fixed grid; on a device that must be waited for, it looks at no value unless it is to `check`.

    Args:
        system: Right-hand side.
        y: State at the start, ``(batch, *event)``.
        q: Integrals at the start, ``(batch, m)``.
        steps: Start and length of every step.
        method: Coefficients.
        on_step: Called with every step.
        check: Look for non-finite states after each step (to name it), not only at the end.

    Raises:
        SolverError: The state or an integral is not finite.
    """
    tableau = method.tableau
    for number, (t, h) in enumerate(steps):
        rates: list[Tensor] = []
        stages: list[Tensor] = []
        q_next = q
        for c, row, b in zip(tableau.c, tableau.a, tableau.b, strict=True):
            stage = combine(y, rates, row, h)
            stages.append(stage)
            if b and q.shape[1]:
                rate = system.rate(t + c * h, stage, None)
                rates.append(rate.y)
                q_next = torch.add(q_next, rate.q, alpha=h * b)
            else:
                rates.append(system.state_rate(t + c * h, stage, None))
        y = combine(y, rates, tableau.b, h)
        q = q_next
        if on_step is not None:
            on_step(Step(None, t, h, stages))
        if check or (number == len(steps) - 1 and not awaited(y)):
            bad = not_finite(y, q)
            if bad and not check:
                raise _Retrace
            if bad:
                raise unstable(method.name, number + 1, len(steps), t, h, bad, len(y))
    evaluations_per_sample = len(steps) * len(tableau.b)
    return y, q, Stats(nfe=evaluations_per_sample, nfe_max=evaluations_per_sample, accepted=len(steps))


class _Retrace(Exception):
    """A fixed-step solve ended non-finite: it is run again, step by step, to say where."""


def integrate_fixed(
    system: System,
    y: Tensor,
    q: Tensor,
    t_span: tuple[float, float],
    step_size: float,
    method: Method,
    *,
    on_step: OnStep | None = None,
) -> tuple[Tensor, Tensor, Stats]:
    """`solve_fixed` over `t_span`, which on failure finds and names the step at which it became non-finite."""
    try:
        return solve_fixed(system, y, q, grid(t_span, step_size), method, on_step=on_step)
    except _Retrace:
        return retrace(system, y, q, t_span, step_size, method)


def retrace(
    system: System, y: Tensor, q: Tensor, t_span: tuple[float, float], step_size: float, method: Method
) -> tuple[Tensor, Tensor, Stats]:
    """The same again, looking at every step: raises `SolverError` at the first that leaves non-finite values."""
    return solve_fixed(system, y, q, grid(t_span, step_size), method, check=True)


def not_finite(y: Tensor, q: Tensor) -> int:
    """Number of samples with a value that is not finite."""
    if math.isfinite(float(y.sum() + q.sum())):
        return 0
    return int((~(torch.isfinite(y).flatten(1).all(1) & torch.isfinite(q).all(1))).sum())


@dataclass(frozen=True)
class ErrorNorm:
    """The norm of a step's error.

    It is the root mean square over a sample's state and its first `controlled` integrals, each relative to
    ``atol + rtol max(|y|, |y_new|)``.
    """

    rtol: float
    atol: float
    controlled: int

    def state(self, error: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """The state's share: the sum of its squares for each sample, ``(batch,)``."""
        scaled = error / (self.atol + self.rtol * torch.maximum(old.abs(), new.abs()))
        return scaled.square().sum(tuple(range(1, error.ndim)))

    def integrals(self, error: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """The integrals' share."""
        return self.state(*(x[:, : self.controlled] for x in (error, old, new)))

    def mean(self, shares: Tensor, y: Tensor) -> Tensor:
        """The norm, of the sum of shares, for states like `y`."""
        return (shares / (y[0].numel() + self.controlled)).sqrt().double()


@dataclass
class _Front:
    """The samples that are still on their way; every tensor is ``(active, ...)``."""

    index: Tensor
    t: Tensor
    h: Tensor  # signed length of the next step
    y: Tensor
    q: Tensor
    rate: Rate
    grow: Tensor  # largest factor by which the next step may grow

    def keep(self, rows: Tensor) -> None:
        """Drops the others."""
        for name in ("index", "t", "h", "y", "q", "grow"):
            setattr(self, name, getattr(self, name)[rows])
        self.rate = Rate(self.rate.y[rows], self.rate.q[rows])


def integrate_adaptive(
    system: System,
    y: Tensor,
    q: Tensor,
    t_span: tuple[float, float],
    method: Method,
    norm: ErrorNorm,
    *,
    maxiters: int,
    on_step: OnStep | None = None,
) -> tuple[Tensor, Tensor, Stats]:
    """Integrates with steps chosen for each sample by its own error.

    Raises:
        SolverError: ``MaxIters``, ``DtLessThanMin`` or ``Unstable``: for how many samples, and at which time.
    """
    t0, t1 = t_span
    smallest = 16 * torch.finfo(torch.float64).eps * max(abs(t0), abs(t1))
    front = _start(system, y, q, t_span, norm)
    y_end, q_end = torch.empty_like(y), torch.empty_like(q)
    attempts, tries = torch.zeros(len(y), dtype=torch.float64, device=y.device), 0
    accepted = torch.zeros_like(attempts)
    while len(front.index):
        if tries >= maxiters:
            raise _stuck(front, "MaxIters", maxiters, len(y))
        tries += 1  # of those that are still on their way, which are the most
        left = t1 - front.t
        last = front.h.abs() >= left.abs() * (1 - 1e-10)
        h = torch.where(last, left, front.h)
        tried = _attempt(system, front, h, method.tableau, norm)
        size, stages = tried.size, tried.stages[:-1]
        ok = size <= 1  # a NaN is not: the step is taken again, shorter
        done = ok & last
        attempts[front.index] += 1
        accepted[front.index] += ok
        front.h = h * _factor(size, method.order, front.grow)
        shortest = torch.where(done, math.inf, front.h.abs()).min()
        # the one value that is read of a step, since to read is to wait for the device
        good, arrived, least = torch.stack((ok.sum(), done.sum(), shortest)).tolist()
        if on_step is not None and good:
            everyone = good == len(ok)
            chosen = slice(None) if everyone else ok.nonzero().squeeze(1)
            rows = None if everyone and len(ok) == len(y) else front.index[chosen]
            on_step(Step(rows, front.t[chosen], h[chosen], [stage[chosen] for stage in stages]))
        front.grow = torch.where(ok, _GROW, 1.0)  # no growth right after a rejected step
        front.t = torch.where(ok, front.t + h, front.t)
        front.y, front.q = _choose(ok, tried.stages[-1], front.y), _choose(ok, tried.q, front.q)
        front.rate = Rate(*(_choose(ok, new, old) for new, old in zip(tried.rate, front.rate, strict=True)))
        if arrived:
            home = done.nonzero().squeeze(1)
            y_end[front.index[home]], q_end[front.index[home]] = front.y[home], front.q[home]
            front.keep((~done).nonzero().squeeze(1))
        if len(front.index) and least < smallest:
            raise _stuck(front, "DtLessThanMin", maxiters, len(y))
    nfe = 1 + len(method.tableau.b) * attempts
    counts = (nfe.mean(), nfe.max(), accepted.mean(), (attempts - accepted).mean())
    mean, most, accepts, rejects = torch.stack(counts).tolist()
    return y_end, q_end, Stats(mean, int(most), 0.0, accepts, rejects)


def _choose(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(mask.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def _factor(size: Tensor, order: int, grow: Tensor) -> Tensor:
    """By how much the next step may be longer, from the size of the last one's error."""
    factor = (_SAFETY * size.clamp(min=1e-10) ** (-1 / order)).nan_to_num(_SHRINK, _SHRINK, _SHRINK)
    return torch.minimum(factor.clamp(min=_SHRINK), grow)


def _start(system: System, y: Tensor, q: Tensor, t_span: tuple[float, float], norm: ErrorNorm) -> _Front:
    """All samples at the start, with a first step in which the state would change by as much as itself.

    Hairer's rule (Solving ODEs I, II.4) costs one more evaluation, and its step is as much too short at order 5 as the
    tolerance is tight, whatever the dynamics; one that is too long costs the state's evaluations alone.
    """
    t0, t1 = t_span
    index = torch.arange(len(y), device=y.device)
    rate = system.rate(t0, y, None)
    if bad := not_finite(rate.y, rate.q):
        raise not_finite_at_start(t0, bad, len(y))
    size, speed = (norm.mean(norm.state(x, y, y), y) for x in (y, rate.y))
    h = (size.clamp(min=1) / speed).clamp(max=abs(t1 - t0)).nan_to_num(abs(t1 - t0) * 1e-6)
    t = torch.full_like(h, t0)
    return _Front(index, t, h * math.copysign(1.0, t1 - t0), y, q, rate, torch.full_like(h, _GROW))


class _Attempt(NamedTuple):
    """What comes of one step of every active sample.

    Attributes:
        size: Of the error.
        stages: States at the stages, and the new one.
        q: The new integrals, where the state lets the step stand.
        rate: That of the new state, and there that of the integrals.
    """

    size: Tensor
    stages: list[Tensor]
    q: Tensor
    rate: Rate


def _attempt(system: System, front: _Front, h: Tensor, tableau: Tableau, norm: ErrorNorm) -> _Attempt:
    """One step for every active sample; the state alone may reject it, before the integrals are asked."""
    last, estimates = len(tableau.b), [e for e in (tableau.e, tableau.e3) if e is not None]
    times, stages, f, none = [front.t], [front.y], [front.rate.y], torch.zeros_like(front.q)
    g = [front.rate.q, *[none] * last]
    weighted = [i for i in range(1, last + 1) if _weighs(tableau, i)] if front.q.shape[1] else []
    for i, (c, row) in enumerate(zip((*tableau.c[1:], 1.0), (*tableau.a[1:], tableau.b), strict=True), 1):
        stages.append(combine(front.y, f, row, h))
        times.append((front.t + c * h).to(front.y.dtype))
        if i in weighted and not system.apart:
            rate = system.rate(times[i], stages[i], front.index)
            f.append(rate.y)
            g[i] = rate.q
        else:
            f.append(system.state_rate(times[i], stages[i], front.index))
    y, zero = stages[-1], torch.zeros_like(front.y)
    shares = [norm.state(combine(zero, f, e, h), front.y, y) for e in estimates]
    size = _size([norm.mean(share, y) for share in shares])
    stands = size <= 1
    if not weighted or not bool(stands.any()):
        return _Attempt(size, stages, front.q, Rate(f[-1], none))
    if system.apart:
        everyone, rows = bool(stands.all()), front.index[stands]
        for i in weighted:
            t, z = (times[i], stages[i]) if everyone else (times[i][stands], stages[i][stands])
            integrands = system.rate(t, z, rows).q
            g[i] = integrands if everyone else none.index_put((stands,), integrands)
    q = combine(front.q, g, tableau.b, h)
    shares = [
        share + norm.integrals(combine(none, g, e, h), front.q, q) for share, e in zip(shares, estimates, strict=True)
    ]
    size = torch.where(stands, _size([norm.mean(share, y) for share in shares]), size)
    return _Attempt(size, stages, q, Rate(f[-1], g[-1]))


def _weighs(tableau: Tableau, stage: int) -> bool:
    """Whether a stage counts in the integrals or in their error; the new state is the next step's first stage."""
    weights = [row for row in (tableau.b, tableau.e, tableau.e3) if row is not None]
    return stage == len(tableau.b) or any(stage < len(row) and row[stage] for row in weights)


def _size(sizes: list[Tensor]) -> Tensor:
    """The norm of the error from that of its estimates; two are combined as in Hairer's DOP853."""
    if len(sizes) == 1:
        return sizes[0]
    fifth, third = sizes
    return fifth.square() / (fifth.square() + 0.01 * third.square()).sqrt().clamp(min=1e-300)


def _stuck(front: _Front, status: str, maxiters: int, total: int) -> SolverError:
    return stuck(status, STUCK[status].format(maxiters=maxiters), float(front.t[0]), len(front.index), total)
