"""Discretise, then optimise: the solve's own steps in reverse.

At a stage ``(t_i, z_i)`` of a step of length h with weights b and cotangents z̄ of the new state and q̄ = (l̄, Ē, n̄) of
the integrals,

    f̄ = h (b_i z̄ + Σ_{j>i} a_ji z̄_j) + 2 h b_i Ē f          w̄ = h b_i (l̄ ε + 2 n̄ w),   w = εᵀ ∂f/∂z

and the pullback of the bound dynamics gives z̄_i and adds to θ̄. `Checkpointed` keeps the stages' states alone, and one
evaluation's intermediates live at a time. `Stored` keeps all of them, and a step's stages are one batch wherever their
order does not matter: only f, forward, and the transposed Jacobian, backward, have to go stage by stage.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pyrnode.devices import constants
from pyrnode.dynamics.base import Linearization
from pyrnode.dynamics.layers import Time
from pyrnode.engines.augmented import Augmented, Held, cast_time, integrate
from pyrnode.engines.base import Stats
from pyrnode.engines.runge_kutta import Rate, StateOnly, Step, per_sample
from pyrnode.engines.torch_solve import TorchSolve
from pyrnode.solvers import Tableau


@dataclass(eq=False)
class Checkpointed(TorchSolve):
    """Evaluates every stage again: ``memory="checkpoint"``."""

    steps: list[Step] = field(default_factory=list, init=False)

    def solve(self, z0: Tensor) -> tuple[Tensor, Tensor, Stats]:
        q0 = self.system.no_integrals(z0)
        return integrate(self.system, z0, q0, self.t_span, self.solver, self.steps.append)

    def pull(self, z_bar: Tensor, q_bar: Tensor) -> Tensor:
        for step in reversed(self.steps):
            z_bar = self._step_back(step, z_bar, q_bar)
        return z_bar

    def _step_back(self, step: Step, z_bar: Tensor, q_bar: Tensor) -> Tensor:
        """Pulls the cotangents back through one accepted step."""
        tableau, rows, held = self.tableau, step.rows, self.system.held(step.rows)
        bar, q_rows = (z_bar, q_bar) if rows is None else (z_bar[rows], q_bar[rows])
        h_z, h_q = per_sample(step.h, bar), per_sample(step.h, q_rows)
        stage_bars: list[Tensor | None] = [None] * len(tableau.b)
        total = bar
        for i in reversed(range(len(tableau.b))):
            f_bar = _stage_bar(tableau, i, h_z, bar, stage_bars)
            if f_bar is None:
                continue
            self.stats.nfe_backward += 1 if rows is None else len(rows) / len(z_bar)
            t, share = cast_time(step.t + tableau.c[i] * step.h, bar), q_rows * (h_q * tableau.b[i])
            seen = held if tableau.b[i] else held._replace(eps=None)
            stage_bar = self._pull_stage(step, i, t, seen, f_bar, share)
            stage_bars[i], total = stage_bar, total + stage_bar
        return total if rows is None else z_bar.index_copy(0, rows, total)

    def _pull_stage(self, step: Step, i: int, t: Time, held: Held, f_bar: Tensor, q_bar: Tensor) -> Tensor:
        """The cotangent of the state of a step's stage."""
        return self.system.pullback(t, step.stages[i], step.rows, held, f_bar, q_bar)


class _Joint(NamedTuple):
    """The stages of one step as one batch: linearization, probes, and weights in the integrals."""

    at: Linearization
    eps: Tensor | None
    weights: Tensor


class _KeptStages(StateOnly):
    """The right-hand side, each evaluation of which is kept; of the state alone where no integrals go along."""

    def __init__(self, system: Augmented) -> None:
        self.system = system
        self.kept: list[Linearization] = []

    def state_rate(self, t: Time, y: Tensor, rows: Tensor | None) -> Tensor:
        at = self.system.bound.linearize(t, y, None, c=self.system.held(rows).c, tape=True)
        self.kept.append(at)
        return at.f

    def rate(self, t: Time, y: Tensor, rows: Tensor | None) -> Rate:
        held = self.system.held(rows)
        at = self.system.bound.linearize(t, y, held.eps, c=held.c, tape=True)
        self.kept.append(at)
        return Rate(at.f, self.system.integrands(at, held.eps))

    def take(self) -> list[Linearization]:
        """The stages of the step that has just ended."""
        stages, self.kept = self.kept, []
        return stages


@dataclass(eq=False)
class Kept(Checkpointed):
    """Keeps every evaluation's intermediates, for dynamics without a split pullback, on a grid: ``memory="store"``."""

    evaluations: list[list[Linearization]] = field(default_factory=list, init=False)  # of every step, till pulled back

    def solve(self, z0: Tensor) -> tuple[Tensor, Tensor, Stats]:
        stages, q0 = _KeptStages(self.system), self.system.no_integrals(z0)

        def keep(step: Step) -> None:
            self.steps.append(step)
            self.evaluations.append(stages.take())

        return integrate(stages, z0, q0, self.t_span, self.solver, keep)

    def _pull_stage(self, step: Step, i: int, t: Time, held: Held, f_bar: Tensor, q_bar: Tensor) -> Tensor:
        at = self.evaluations[-1][i]
        z_bar, c_bar = self.system.bound.pullback(at, self.system.cotangents(at, f_bar, q_bar, held.eps))
        self.system.add_context_bar(None, [c_bar])
        return z_bar

    def _step_back(self, step: Step, z_bar: Tensor, q_bar: Tensor) -> Tensor:
        z_bar = super()._step_back(step, z_bar, q_bar)
        self.evaluations.pop()
        return z_bar

    def pull(self, z_bar: Tensor, q_bar: Tensor) -> Tensor:
        if self.evaluations:
            return super().pull(z_bar, q_bar)
        again = Checkpointed(self.system, self.t_span, self.solver, self.stats)  # a second pass evaluates again
        again.steps = self.steps
        return again.pull(z_bar, q_bar)


@dataclass(eq=False)
class Stored(Checkpointed):
    """Keeps all intermediates, for dynamics with a split pullback on a grid: ``memory="store"``."""

    joints: list[_Joint] = field(default_factory=list, init=False)  # of every step, until they are pulled back

    def solve(self, z0: Tensor) -> tuple[Tensor, Tensor, Stats]:
        stages, q0 = _KeptStages(self.system), self.system.no_integrals(z0)

        def join(step: Step) -> None:
            self.steps.append(step)
            self.joints.append(self._join(step, stages.take()))

        z, _, stats = integrate(stages, z0, q0[:, :0], self.t_span, self.solver, join)
        return z, torch.stack([q0, *(self._integrals(joint) for joint in self.joints)]).sum(0), stats

    def _join(self, step: Step, stages: list[Linearization]) -> _Joint:
        """Joins a step's stages to one batch, and adds their products."""
        split, tableau, probes = self.system.bound.split(), self.tableau, self.system.probes
        assert split is not None
        z = step.stages[0]
        times = constants(tuple(step.t + c * step.h for c in tableau.c), z.dtype, z.device)
        times = times.unsqueeze(1).expand(-1, len(z)).reshape(-1)
        eps = None if probes is None else probes.eps.repeat(1, len(tableau.c), *[1] * (z.ndim - 1))
        weights = constants(tuple(b * step.h for b in tableau.b), z.dtype, z.device)
        return _Joint(split.join(stages, times, eps), eps, weights)

    def _integrals(self, joint: _Joint) -> Tensor:
        """A step's share in the integrals."""
        rates = self.system.integrands(joint.at, joint.eps)
        share: Tensor = torch.tensordot(joint.weights, rates.unflatten(0, (len(joint.weights), -1)), 1)
        return share

    def pull(self, z_bar: Tensor, q_bar: Tensor) -> Tensor:
        if not self.joints:  # a second pass finds the stages' states still there, and evaluates them again
            return super().pull(z_bar, q_bar)
        for step in reversed(self.steps):
            z_bar = self._joint_back(step, self.joints.pop(), z_bar, q_bar)
        return z_bar

    def _joint_back(self, step: Step, joint: _Joint, z_bar: Tensor, q_bar: Tensor) -> Tensor:
        """Pulls the cotangents back through one step, its stages at once but for the chain of the states."""
        split, tableau, at, batch = self.system.bound.split(), self.tableau, joint.at, len(z_bar)
        assert split is not None
        q_bars = (joint.weights[:, None, None] * q_bar).flatten(0, 1)
        bars = self.system.cotangents(at, torch.zeros_like(at.f), q_bars, joint.eps)
        f_bars = bars.f
        if bars.w is not None:
            split.pull_product(at, bars.w)
        stage_bars: list[Tensor | None] = [None] * len(tableau.b)
        total = z_bar
        for i in reversed(range(len(tableau.b))):
            bar = _stage_bar(tableau, i, step.h, z_bar, stage_bars)
            if bar is not None:
                rows = slice(i * batch, (i + 1) * batch)
                stage_bar = split.pull_state(at, f_bars[rows].add_(bar), rows)
                stage_bars[i], total = stage_bar, total + stage_bar
        self.system.add_context_bar(None, [split.pull_parameters(at, f_bars)])
        return total


def _stage_bar(tableau: Tableau, i: int, h: Time, bar: Tensor, stage_bars: list[Tensor | None]) -> Tensor | None:
    """``h (b_i z̄ + Σ_{j>i} a_ji z̄_j)``; `None` where it is zero."""
    terms = [(tableau.b[i], bar)]
    terms += [(tableau.a[j][i], x) for j, x in enumerate(stage_bars) if x is not None and j > i]
    terms = [(weight, x) for weight, x in terms if weight]
    if not terms:
        return None
    total = terms[0][1] * terms[0][0] if isinstance(h, Tensor) else terms[0][1] * (terms[0][0] * h)
    for weight, x in terms[1:]:
        total.add_(x, alpha=weight if isinstance(h, Tensor) else weight * h)
    return total * h if isinstance(h, Tensor) else total
