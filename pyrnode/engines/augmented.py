"""The augmented system of design.md §2 in torch's operations: its right-hand side, and the transpose of that.

What a solve holds fixed (dynamics with their parameters, probes, context) is bound once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyrnode import solvers
from pyrnode.config import Precision, SolverConfig
from pyrnode.devices import piece_limit
from pyrnode.dynamics.base import BoundDynamics, Cotangents, Dynamics, Linearization
from pyrnode.dynamics.coarse import coarsened
from pyrnode.dynamics.layers import Time
from pyrnode.engines.base import Stats
from pyrnode.engines.runge_kutta import (
    ErrorNorm,
    OnStep,
    Rate,
    System,
    integrate_adaptive,
    integrate_fixed,
    per_sample,
)
from pyrnode.probes import Probes

_PIECE = 20 * 2**20
"""Bytes of intermediates beyond which a CPU evaluates in pieces of the batch: they stay in the caches."""


class Held(NamedTuple):
    """What a solve holds fixed for some samples: their probes ``(k, batch, *event)`` and embedded contexts."""

    eps: Tensor | None
    c: Tensor | None

    def piece(self, rows: slice) -> Held:
        """Those of consecutive samples."""
        return Held(None if self.eps is None else self.eps[:, rows], None if self.c is None else self.c[rows])


class Augmented:
    """The right-hand side ``(f, l', E', n', D')``, and perhaps ``H'``, for one solve of one block, and its pullback.

    Args:
        dynamics: ``f(z, t, c; θ)``.
        probes: Probes of the divergence; `None` for the state alone.
        context: Embedded, detached from autograd's graph.
        total_derivative: Whether there is a ``D'``.
        hjb: Whether there is an ``H'``.
        precision: In which numbers the dynamics are computed (`dynamics.coarse`).
    """

    _piece: int | None = None  # the limit of `_pieces`, once it is known

    def __init__(
        self,
        dynamics: Dynamics,
        probes: Probes | None,
        context: Tensor | None,
        *,
        total_derivative: bool,
        hjb: bool = False,
        precision: Precision = "ieee",
    ) -> None:
        self.dynamics, self.context, self.total_derivative, self.hjb = dynamics, context, total_derivative, hjb
        self.precision: Precision = precision
        self._exact = probes is not None and probes.axes
        self._closed = self._exact and dynamics.closed_trace  # trace and norm are made of what the tape has
        self._bound: BoundDynamics | None = None
        self._context_bar: Tensor | None = None
        self.probes = None if probes is None else probes._replace(eps=self.bound.layout(probes.eps))

    @property
    def bound(self) -> BoundDynamics:
        """The dynamics bound to their parameters, from here to the end of a pass; gradients gather in it."""
        if self._bound is None:
            bound = self.dynamics.bind(total_derivative=self.total_derivative, hjb=self.hjb, exact=self._exact)
            self._bound = coarsened(bound, self.precision)
        return self._bound

    def release(self) -> None:
        """Ends a pass: till the backward pass a large flow holds many solves, with transformed weights in each."""
        self._bound = None

    def versions(self) -> list[int]:
        """How often each parameter was changed in place."""
        return [p._version for p in self.dynamics.solved_parameters()]

    @property
    def count(self) -> int:
        """Number of the probes."""
        return 0 if self.probes is None else len(self.probes.eps)

    @property
    def apart(self) -> bool:
        """With more than two probes, but for a closed trace: products cost more than what is evaluated again."""
        return self.count > 2 and not self._closed

    def no_integrals(self, z: Tensor) -> Tensor:
        """The integrals (l, E, n, D), and H where asked for, at the start; no columns without probes."""
        return z.new_zeros(len(z), 0 if self.probes is None else 4 + self.hjb)

    def held(self, rows: Tensor | None) -> Held:
        """Probes and contexts of the samples `rows`; `None` for all of them."""
        eps, c = None if self.probes is None else self.probes.eps, self.context
        if rows is None:
            return Held(eps, c)
        return Held(None if eps is None else eps[:, rows], None if c is None else c[rows])

    def rate(self, t: Time, z: Tensor, rows: Tensor | None) -> Rate:
        """F and the integrands of the samples `rows`."""
        held, parts = self.held(rows), []
        for piece in self._pieces(z):
            eps, c = held.piece(piece)
            at = self.bound.linearize(_time_of(t, piece), z[piece], eps, c=c, tape=self._closed)
            parts.append((at.f, self.integrands(at, eps)))
        if len(parts) == 1:
            return Rate(*parts[0])
        return Rate(*(torch.cat(x) for x in zip(*parts, strict=True)))

    def state_rate(self, t: Time, z: Tensor, rows: Tensor | None) -> Tensor:
        """F alone."""
        c = self.context if self.context is None or rows is None else self.context[rows]
        parts = [
            self.bound.linearize(_time_of(t, piece), z[piece], None, c=None if c is None else c[piece]).f
            for piece in self._pieces(z)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _pieces(self, z: Tensor) -> list[slice]:
        """Slices of the batch whose intermediates stay in a CPU's caches, or go into a device's memory."""
        if self._piece is None:
            self._piece = piece_limit(z, _PIECE)
        each = self.bound.tape_bytes(z[:1], self.count)
        size = max(1, min(len(z), self._piece // each) if each else len(z))
        return [slice(start, start + size) for start in range(0, len(z), size)] or [slice(0, 0)]

    def integrands(self, at: Linearization, eps: Tensor | None) -> Tensor:
        """(l', E', n', D'), and H', for each sample; no columns without probes."""
        if eps is None or self.probes is None:
            return at.f.new_empty(len(at.f), 0)
        dims, weight = tuple(range(1, at.f.ndim)), self.probes.weight
        q = at.f.new_zeros(len(at.f), 4 + self.hjb)
        if at.w is None:
            closed = self.bound.trace_and_norm(at)
            assert closed is not None
            q[:, 0], q[:, 2] = closed
        else:
            w, e = (at.w[0], eps[0]) if len(eps) == 1 else (at.w.transpose(0, 1), eps.transpose(0, 1))
            inner = tuple(range(1, w.ndim))
            torch.sum(e * w, inner, out=q[:, 0])
            torch.sum(w * w, inner, out=q[:, 2])
        torch.sum(at.f * at.f, dims, out=q[:, 1])
        if at.r is not None:
            torch.sum(at.r * at.r, dims, out=q[:, 3])
        if weight != 1:
            q[:, 0:3:2] *= weight
        if at.hjb is not None:
            q[:, 4] = at.hjb.abs()
        return q

    def cotangents(self, at: Linearization, f_bar: Tensor, q_bar: Tensor, eps: Tensor | None) -> Cotangents:
        """Cotangents of a linearization, given that of the state's rate and those of the integrands ``(batch, 4)``."""
        if eps is None or self.probes is None:
            return Cotangents(f_bar)
        l_bar, E_bar, n_bar, D_bar = (per_sample(x, at.f) for x in q_bar[:, :4].unbind(1))
        weight = self.probes.weight
        f_bar = torch.addcmul(f_bar, at.f, E_bar, value=2)  # type: ignore[arg-type]
        r_bar = None if at.r is None else 2 * D_bar * at.r
        hjb_bar = None if at.hjb is None else torch.sign(at.hjb) * q_bar[:, 4]
        if at.w is None:
            weighs = bool(q_bar[:, 2].any())  # without λ_J the norm is only looked at, and its pullback is the dearest
            return Cotangents(f_bar, None, r_bar, q_bar[:, 0], q_bar[:, 2] if weighs else None, hjb_bar)
        w_bar = torch.addcmul(at.w * (2 * weight * n_bar), eps, l_bar, value=weight)  # type: ignore[arg-type]
        return Cotangents(f_bar, w_bar, r_bar, hjb=hjb_bar)

    def pullback(self, t: Time, z: Tensor, rows: Tensor | None, held: Held, f_bar: Tensor, q_bar: Tensor) -> Tensor:
        """Evaluates the system again at a stage of the samples `rows`, and gives the cotangent of its state.

        Those of context and parameters are added to what gathers. `held` has the samples' probes, or none where the
        stage had no weight in the integrals.
        """
        z_bars, c_bars = [], []
        for piece in self._pieces(z):
            eps, c = held.piece(piece)
            at = self.bound.linearize(_time_of(t, piece), z[piece], eps, c=c, tape=True)
            z_bar, c_bar = self.bound.pullback(at, self.cotangents(at, f_bar[piece], q_bar[piece], eps))
            z_bars.append(z_bar)
            c_bars.append(c_bar)
        self.add_context_bar(rows, c_bars)
        return z_bars[0] if len(z_bars) == 1 else torch.cat(z_bars)

    def begin_pullback(self) -> None:
        """Nothing has gathered yet."""
        self._context_bar = None if self.context is None else torch.zeros_like(self.context)

    def add_context_bar(self, rows: Tensor | None, bars: list[Tensor | None]) -> None:
        """Adds the context's cotangents of consecutive pieces of the samples `rows`."""
        given = [bar for bar in bars if bar is not None]
        if self._context_bar is None or not given:
            return
        bar = torch.cat(given)
        if rows is None:
            self._context_bar += bar.unflatten(0, (-1, len(self._context_bar))).sum(0)  # one stage, or several joined
        else:
            self._context_bar.index_add_(0, rows, bar)

    def end_pullback(self) -> tuple[Tensor | None, list[Tensor]]:
        """What has gathered: the cotangents of the context and of the parameters."""
        gradients = self.bound.gradients()
        self.release()
        return self._context_bar, gradients


def integrate(
    system: System,
    y: Tensor,
    q: Tensor,
    t_span: tuple[float, float],
    solver: SolverConfig,
    on_step: OnStep | None = None,
) -> tuple[Tensor, Tensor, Stats]:
    """State and integrals at the end time, by the method and the steps that `solver` asks for."""
    method = solvers.method(solver.name)
    if not solvers.adaptive(solver):
        return integrate_fixed(system, y, q, t_span, solvers.step_size(solver), method, on_step=on_step)
    norm = ErrorNorm(solver.rtol, solver.atol, controlled(solver, q.shape[1]))
    return integrate_adaptive(system, y, q, t_span, method, norm, maxiters=solver.maxiters, on_step=on_step)


def controlled(solver: SolverConfig, integrals: int) -> int:
    """How many of that many integrals an adaptive step answers for."""
    return integrals if solver.error_control == "all" else min(integrals, 1)


def cast_time(t: Time, z: Tensor) -> Time:
    """A time in numbers of the type of `z`."""
    return t.to(z.dtype) if isinstance(t, Tensor) else t


def _time_of(t: Time, piece: slice) -> Time:
    return t[piece] if isinstance(t, Tensor) else t
