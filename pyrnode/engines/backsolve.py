"""Optimise, then discretise: the state is solved backwards beside its adjoint, from the end time to the start.

With ``a = z̄`` and the cotangents q̄ = (l̄, Ē, n̄) of the integrals, which do not change on the way,

    z' = f        a' = −(∂f/∂z)ᵀ (a + 2 Ē f) − (∂w/∂z)ᵀ (l̄ ε + 2 n̄ w)        θ̄' = −(∂f/∂θ)ᵀ (…) − (∂w/∂θ)ᵀ (…)

Nothing is kept but the state at the end: constant memory, and an error of the solver's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyrnode.dynamics.base import Linearization
from pyrnode.dynamics.layers import Time
from pyrnode.engines.augmented import Augmented, Held, cast_time, integrate
from pyrnode.engines.base import Stats
from pyrnode.engines.runge_kutta import StateOnly, Step, per_sample
from pyrnode.engines.torch_solve import TorchSolve
from pyrnode.solvers import Tableau


@dataclass(eq=False)
class BacksolveAdjoint(TorchSolve):
    """``sensealg="BacksolveAdjoint"``."""

    end: Tensor | None = field(default=None, init=False)

    def solve(self, z0: Tensor) -> tuple[Tensor, Tensor, Stats]:
        z, q, stats = integrate(self.system, z0, self.system.no_integrals(z0), self.t_span, self.solver)
        self.end = z.detach()  # not z itself: it will own the node that owns this solve
        return z, q, stats

    def pull(self, z_bar: Tensor, q_bar: Tensor) -> Tensor:
        assert self.end is not None
        adjoint = _Adjoint(self.system, self.tableau, q_bar)
        y = torch.stack((self.end, z_bar), 1)
        t0, t1 = self.t_span
        y, _, stats = integrate(adjoint, y, y.new_empty(len(y), 0), (t1, t0), self.solver, adjoint.accumulate)
        self.stats.nfe_backward += stats.nfe
        return y[:, 1]


class _Adjoint(StateOnly):
    """z and a as one state ``(batch, 2, *event)``.

    The parameters' gradient is an integral along the way: its share of a step is added once the step is accepted.
    """

    def __init__(self, system: Augmented, tableau: Tableau, q_bar: Tensor) -> None:
        self.system, self.tableau, self.q_bar = system, tableau, q_bar

    def _at(self, t: Time, y: Tensor, held: Held) -> tuple[Linearization, Tensor]:
        """The system at the state of `y`, and the adjoint."""
        z, a = (self.system.bound.layout(x) for x in y.unbind(1))
        return self.system.bound.linearize(cast_time(t, z), z, held.eps, c=held.c, tape=True), a

    def _q_bar(self, rows: Tensor | None) -> Tensor:
        return self.q_bar if rows is None else self.q_bar[rows]

    def state_rate(self, t: Time, y: Tensor, rows: Tensor | None) -> Tensor:
        held = self.system.held(rows)
        at, a = self._at(t, y, held)
        bars = self.system.cotangents(at, a, self._q_bar(rows), held.eps)
        return torch.stack((at.f, -self.system.bound.pullback_state(at, bars)), 1)

    def accumulate(self, step: Step) -> None:
        """Adds an accepted step's share of the cotangents of context and parameters."""
        held, q_bar = self.system.held(step.rows), self._q_bar(step.rows)
        for node, b, y in zip(self.tableau.c, self.tableau.b, step.stages, strict=True):
            if not b:
                continue
            at, a = self._at(step.t + node * step.h, y, held)
            share = per_sample(-b * step.h, a)
            q_share = share.reshape(-1, 1) * q_bar if isinstance(share, Tensor) else share * q_bar
            _, c_bar = self.system.bound.pullback(at, self.system.cotangents(at, a * share, q_share, held.eps))
            self.system.add_context_bar(step.rows, [c_bar])
