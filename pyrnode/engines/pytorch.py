"""The PyTorch engine: the augmented system of docs/design.md §2, solved and differentiated without nested autograd.

`Backprop` runs the solve's own steps in reverse. At a stage ``(t_i, z_i)`` of a step of length h with weights b and
cotangents z̄ of the new state and q̄ = (l̄, Ē, n̄) of the integrals,

    f̄ = h (b_i z̄ + Σ_{j>i} a_ji z̄_j) + 2 h b_i Ē f          w̄ = h b_i (l̄ ε + 2 n̄ w),   w = εᵀ ∂f/∂z

and the kernel's pullback gives z̄_i and adds to θ̄. With ``memory="checkpoint"`` only the stages' states are kept, and
one evaluation's intermediates live at a time. With ``"store"`` all are kept, and a step's stages are one batch wherever
their order does not matter: only f, forward, and the transposed Jacobian, backward, have to go stage by stage. With
``"auto"`` a compiled kernel does the whole solve where there is one (fused.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyrnode import solvers
from pyrnode.config import SolverConfig
from pyrnode.dynamics.base import BoundDynamics, Dynamics, Linearization
from pyrnode.dynamics.layers import Time
from pyrnode.engines.base import Engine, Solution, Stats, check_state, embedded, run
from pyrnode.engines.fused import FusedSolve, fuse
from pyrnode.engines.runge_kutta import (
    ErrorNorm,
    OnStep,
    Rate,
    Step,
    System,
    grid,
    integrate_adaptive,
    integrate_fixed,
    per_sample,
)
from pyrnode.errors import ConfigError
from pyrnode.probes import Probes

_STORE_LIMIT = 32 * 2**20
"""Up to how many bytes of intermediates of one block ``memory="auto"`` stores."""

_PIECE = 20 * 2**20
"""Bytes of intermediates beyond which an evaluation goes through in pieces of the batch: they stay in the caches."""


class TorchEngine(Engine):
    """Explicit Runge-Kutta methods in PyTorch, on any of its devices."""

    name = "torch"

    def __init__(self) -> None:
        # glibc hands freed blocks back to the system until it has once seen a larger one freed; the page faults of
        # getting them again cost up to a fifth of a training step. This block is never touched.
        torch.empty(31 * 2**20, dtype=torch.uint8)

    def check(self, solver: SolverConfig) -> None:
        method = solvers.method(solver.name)
        if solver.sensealg != "auto":
            solvers.check_sensitivity(solver.sensealg)
        if solver.options:
            raise ConfigError(f"solver options {solver.options!r}: the PyTorch engine's solvers have none")
        if method.adaptive and solver.memory == "store":
            raise ConfigError(
                f"memory = 'store' needs a fixed-step solver, and {solver.name} is adaptive; use 'checkpoint' or 'auto'"
            )

    def integrate(
        self,
        dynamics: Dynamics,
        z0: Tensor,
        probes: Probes | None,
        t_span: tuple[float, float],
        solver: SolverConfig,
        *,
        context: Tensor | None = None,
        total_derivative: bool = False,
    ) -> Solution:
        self.check(solver)
        check_state(dynamics, z0, probes)
        if solver.sensealg == "auto":
            solver = replace(solver, sensealg="Backprop")
        total_derivative = total_derivative and probes is not None
        c = embedded(dynamics, context, len(z0))
        solve = _Solve(dynamics, probes, None if c is None else c.detach(), t_span, solver, total_derivative)
        z0 = solve.kernel.layout(z0)
        if probes is not None:
            solve.probes = Probes(solve.kernel.layout(probes.eps), probes.weight)
        z, q = run(solve, z0, c, tuple(dynamics.solved_parameters()))
        l, E, n, D = q.unbind(1) if probes is not None else z.new_zeros(4, len(z)).unbind(0)
        return Solution(z, l, E, n, D, solve.stats)


class _Joint(NamedTuple):
    """The stages of one step as one batch: evaluation, probes, and weights in the integrals."""

    evaluation: Linearization
    eps: Tensor | None
    weights: Tensor


@dataclass
class _Solve:
    """One solve of one block; remembers what its backward pass needs."""

    dynamics: Dynamics
    probes: Probes | None
    context: Tensor | None  # embedded
    t_span: tuple[float, float]
    solver: SolverConfig
    total_derivative: bool
    stats: Stats = field(default_factory=Stats)
    steps: list[Step] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)  # of the parameters, at the time of the solve
    end: Tensor | None = None
    evaluations: list[Linearization] = field(
        default_factory=list
    )  # of the present step's stages, until they are joined
    joints: list[_Joint] = field(default_factory=list)  # of every step, where intermediates are stored
    context_bar: Tensor | None = None
    bound: BoundDynamics | None = None
    fused: FusedSolve | None = None

    @property
    def kernel(self) -> BoundDynamics:
        """The dynamics bound to their parameters, from here to the end of a pass; gradients gather in it."""
        if self.bound is None:
            self.bound = self.dynamics.bind(total_derivative=self.total_derivative)
        return self.bound

    def forward(self, z0: Tensor, *, record: bool) -> tuple[Tensor, Tensor]:
        """The state at the end time and the integrals (l, E, n, D), ``(batch, 4)``; no columns without probes."""
        self.versions = self._versions()
        backprop = record and self.solver.sensealg == "Backprop"
        if (backprop or not record) and (solved := self._fused(z0, record)) is not None:
            return solved
        store = backprop and self._fits(z0)
        system: System = self._state if store else self._augmented
        on_step: OnStep = self._join if store else self.steps.append
        q0 = z0.new_zeros(len(z0), 0 if self.probes is None else 4)
        with torch.no_grad():
            z, q, stats = self._integrate(
                system, z0, q0[:, :0] if store else q0, self.t_span, on_step if backprop else None
            )
            if store:
                q = torch.stack([q0, *(self._step_integrals(joint) for joint in self.joints)]).sum(0)
        vars(self.stats).update(vars(stats))
        self.bound = None  # till the backward pass a large flow holds many solves, with transformed weights in each
        if record and not backprop:
            self.end = z.detach()  # not z itself: it will own the node that owns this solve
        return z, q

    @torch.no_grad()
    def _fused(self, z0: Tensor, record: bool) -> tuple[Tensor, Tensor] | None:
        """`forward` by a compiled kernel; `None` where there is none, or where its result is not finite.

        Then the solve is done again by torch's operations, which find the step and name it.
        """
        fused = fuse(self.kernel, z0, self.probes, self.context, self.t_span, self.solver)
        if fused is None:
            return None
        z, q = fused.forward(z0, record=record)
        if not math.isfinite(float(z.sum() + q.sum())):
            return None
        self.fused = fused if record else None
        self.bound = None
        nfe = fused.evaluations
        vars(self.stats).update(vars(Stats(nfe=nfe, nfe_max=nfe, accepted=nfe // len(fused.solve.grid.b))))
        return z, q

    def _fits(self, z0: Tensor) -> bool:
        """Whether to keep all intermediates."""
        method, memory = solvers.method(self.solver.name), self.solver.memory
        if self.kernel.split() is None and memory == "store":
            raise ConfigError("memory = 'store' needs dynamics with an explicit product; use 'checkpoint' or 'auto'")
        if memory != "auto" or self.kernel.split() is None or method.adaptive or self.solver.step_size == "auto":
            return memory == "store"
        probes = 0 if self.probes is None else len(self.probes.eps)
        stages = len(grid(self.t_span, float(self.solver.step_size))) * len(method.tableau.b)
        return stages * self.kernel.tape_bytes(z0, probes) <= _STORE_LIMIT

    def _join(self, step: Step) -> None:
        """Joins the evaluations of a step's stages to one batch, and adds their products."""
        split, tableau = self.kernel.split(), solvers.method(self.solver.name).tableau
        assert split is not None
        z = step.stages[0]
        times = z.new_tensor([step.t + c * step.h for c in tableau.c]).repeat_interleave(len(z))
        eps = None if self.probes is None else self.probes.eps.repeat(1, len(tableau.c), *[1] * (z.ndim - 1))
        weights = z.new_tensor([b * step.h for b in tableau.b])
        self.joints.append(_Joint(split.join(self.evaluations, times, eps), eps, weights))
        self.steps.append(step)
        self.evaluations.clear()

    def _step_integrals(self, joint: _Joint) -> Tensor:
        """A step's share in the integrals."""
        rates = self._integrands(joint.evaluation, joint.eps)
        share: Tensor = torch.tensordot(joint.weights, rates.unflatten(0, (len(joint.weights), -1)), 1)
        return share

    def _integrate(
        self, system: System, y: Tensor, q: Tensor, t_span: tuple[float, float], on_step: OnStep | None
    ) -> tuple[Tensor, Tensor, Stats]:
        method = solvers.method(self.solver.name)
        if not method.adaptive:
            step_size = self.solver.step_size
            if isinstance(step_size, str):
                raise ConfigError("step_size = 'auto' is resolved by training; give the engine a number")
            return integrate_fixed(system, y, q, t_span, step_size, method, on_step=on_step)
        controlled = min(q.shape[1], 4 if self.solver.error_control == "all" else 1)
        norm = ErrorNorm(self.solver.rtol, self.solver.atol, controlled)
        return integrate_adaptive(system, y, q, t_span, method, norm, maxiters=self.solver.maxiters, on_step=on_step)

    def _eps(self, rows: Tensor | None) -> Tensor | None:
        if self.probes is None:
            return None
        return self.probes.eps if rows is None else self.probes.eps[:, rows]

    def _context(self, rows: Tensor | None) -> Tensor | None:
        return self.context if self.context is None or rows is None else self.context[rows]

    def _augmented(self, t: Time, z: Tensor, rows: Tensor | None, weight: float) -> Rate:
        """The right-hand side of the augmented system."""
        eps, c = self._eps(rows) if weight else None, self._context(rows)
        parts = []
        for piece in self._pieces(z):
            part_eps = None if eps is None else eps[:, piece]
            ev = self.kernel.linearize(_rows(t, piece), z[piece], part_eps, c=None if c is None else c[piece])
            parts.append((ev.f, self._integrands(ev, part_eps)))
        if len(parts) == 1:
            return Rate(*parts[0])
        return Rate(*(torch.cat(x) for x in zip(*parts, strict=True)))

    def _pieces(self, z: Tensor) -> list[slice]:
        """Slices of the batch whose intermediates have at most `_PIECE` bytes."""
        each = self.kernel.tape_bytes(z[:1], 0 if self.probes is None else len(self.probes.eps))
        size = max(1, min(len(z), _PIECE // each) if each else len(z))
        return [slice(start, start + size) for start in range(0, len(z), size)] or [slice(0, 0)]

    def _state(self, t: Time, z: Tensor, rows: Tensor | None, weight: float) -> Rate:
        """The right-hand side of the state alone, each evaluation of which is kept."""
        evaluation = self.kernel.linearize(t, z, None, c=self._context(rows), tape=True)
        self.evaluations.append(evaluation)
        return Rate(evaluation.f, z.new_empty(len(z), 0))

    def _integrands(self, ev: Linearization, eps: Tensor | None) -> Tensor:
        """(l', E', n', D') for each sample."""
        if eps is None or ev.w is None or self.probes is None:
            return ev.f.new_empty(len(ev.f), 0)
        dims, weight = tuple(range(1, ev.f.ndim)), self.probes.weight
        w, e = (ev.w[0], eps[0]) if len(eps) == 1 else (ev.w.transpose(0, 1), eps.transpose(0, 1))
        inner = tuple(range(1, w.ndim))
        q = ev.f.new_zeros(len(ev.f), 4)
        torch.sum(e * w, inner, out=q[:, 0])
        torch.sum(ev.f * ev.f, dims, out=q[:, 1])
        torch.sum(w * w, inner, out=q[:, 2])
        if ev.r is not None:
            torch.sum(ev.r * ev.r, dims, out=q[:, 3])
        if weight != 1:
            q[:, 0:3:2] *= weight
        return q

    def _cotangents(
        self, ev: Linearization, f_bar: Tensor, q_bar: Tensor, eps: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Cotangents of f, w and r, given that of the state's rate and those of the four integrands ``(batch, 4)``."""
        if eps is None or ev.w is None or self.probes is None:
            return f_bar, None, None
        l_bar, E_bar, n_bar, D_bar = (per_sample(x, ev.f) for x in q_bar.unbind(1))
        weight = self.probes.weight
        f_bar = torch.addcmul(f_bar, ev.f, E_bar, value=2)  # type: ignore[arg-type]
        w_bar = torch.addcmul(ev.w * (2 * weight * n_bar), eps, l_bar, value=weight)  # type: ignore[arg-type]
        r_bar = None if ev.r is None else 2 * D_bar * ev.r
        return f_bar, w_bar, r_bar

    def backward(self, z_bar: Tensor, q_bar: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Cotangents of the start state, of the embedded context, and of the parameters.

        A second pass (``retain_graph=True``) finds the stages' states still there, and evaluates them again.
        """
        if self._versions() != self.versions:
            raise RuntimeError("a parameter was changed in place between the solve and its backward pass")
        z_bar = self.kernel.layout(z_bar)
        self.context_bar = None if self.context is None else torch.zeros_like(self.context)
        if self.fused is not None:
            z_bar = self.fused.backward(self.kernel, z_bar, q_bar)
            self.stats.nfe_backward += self.fused.evaluations
        elif self.joints:
            for step in reversed(self.steps):
                z_bar = self._joint_back(step, self.joints.pop(), z_bar, q_bar)
        elif self.solver.sensealg == "Backprop":
            for step in reversed(self.steps):
                z_bar = self._step_back(step, z_bar, q_bar)
        else:
            z_bar = self._backsolve(z_bar, q_bar)
        gradients = self.kernel.gradients()
        self.bound = None
        return z_bar, self.context_bar, gradients

    def _add_context_bar(self, rows: Tensor | None, bars: list[Tensor | None]) -> None:
        """Adds the context's cotangents of consecutive pieces of the samples `rows`."""
        given = [bar for bar in bars if bar is not None]
        if self.context_bar is None or not given:
            return
        bar = torch.cat(given)
        if rows is None:
            self.context_bar += bar.unflatten(0, (-1, len(self.context_bar))).sum(0)  # one stage, or several joined
        else:
            self.context_bar.index_add_(0, rows, bar)

    def _versions(self) -> list[int]:
        return [p._version for p in self.dynamics.solved_parameters()]

    def _stage_bar(
        self, tableau: solvers.Tableau, i: int, h: Time, bar: Tensor, stage_bars: list[Tensor | None]
    ) -> Tensor | None:
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

    def _step_back(self, step: Step, z_bar: Tensor, q_bar: Tensor) -> Tensor:
        """Pulls the cotangents back through one accepted step, each stage evaluated again."""
        tableau, rows, eps = solvers.method(self.solver.name).tableau, step.rows, self._eps(step.rows)
        c = self._context(rows)
        bar, q_rows = (z_bar, q_bar) if rows is None else (z_bar[rows], q_bar[rows])
        h_z, h_q = per_sample(step.h, bar), per_sample(step.h, q_rows)
        stage_bars: list[Tensor | None] = [None] * len(tableau.b)
        total = bar
        for i in reversed(range(len(tableau.b))):
            f_bar = self._stage_bar(tableau, i, h_z, bar, stage_bars)
            if f_bar is None:
                continue
            self.stats.nfe_backward += 1 if rows is None else len(rows) / len(z_bar)
            t, share = _cast(step.t + tableau.c[i] * step.h, bar), q_rows * (h_q * tableau.b[i])
            parts = []
            for piece in self._pieces(bar):
                stage_eps = eps[:, piece] if eps is not None and tableau.b[i] else None
                part_c = None if c is None else c[piece]
                ev = self.kernel.linearize(_rows(t, piece), step.stages[i][piece], stage_eps, c=part_c, tape=True)
                bars = self._cotangents(ev, f_bar[piece], share[piece], stage_eps)
                parts.append(self.kernel.pullback(ev, *bars, 1.0))
            self._add_context_bar(rows, [context_bar for _, context_bar in parts])
            stage_bar = torch.cat([part for part, _ in parts]) if len(parts) > 1 else parts[0][0]
            stage_bars[i], total = stage_bar, total + stage_bar
        return total if rows is None else z_bar.index_copy(0, rows, total)

    def _joint_back(self, step: Step, joint: _Joint, z_bar: Tensor, q_bar: Tensor) -> Tensor:
        """Pulls the cotangents back through one step, its stages at once but for the chain of the states."""
        split, stages = self.kernel.split(), joint.evaluation
        assert split is not None
        tableau, batch = solvers.method(self.solver.name).tableau, len(z_bar)
        q_bars = (joint.weights[:, None, None] * q_bar).flatten(0, 1)
        f_bars, w_bars, _ = self._cotangents(stages, torch.zeros_like(stages.f), q_bars, joint.eps)
        if w_bars is not None:
            split.pull_product(stages, w_bars, 1.0)
        stage_bars: list[Tensor | None] = [None] * len(tableau.b)
        total = z_bar
        for i in reversed(range(len(tableau.b))):
            bar = self._stage_bar(tableau, i, step.h, z_bar, stage_bars)
            if bar is not None:
                rows = slice(i * batch, (i + 1) * batch)
                stage_bar = split.pull_state(stages, f_bars[rows].add_(bar), rows)
                stage_bars[i], total = stage_bar, total + stage_bar
        self._add_context_bar(None, [split.pull_parameters(stages, f_bars, 1.0)])
        return total

    def _backsolve(self, z_bar: Tensor, q_bar: Tensor) -> Tensor:
        """Solves ``z' = f``, ``a' = −(∂f/∂z)ᵀ a − …`` from the end time back, both as one state ``(batch, 2, *event)``.

        The parameters' gradient is an integral along the way: its share of a step is added once the step is accepted.
        """
        assert self.end is not None
        method = solvers.method(self.solver.name)

        def adjoint(t: Time, y: Tensor, rows: Tensor | None, weight: float) -> Rate:
            z, a = (self.kernel.layout(x) for x in y.unbind(1))
            eps = self._eps(rows)
            ev = self.kernel.linearize(t, z, eps, c=self._context(rows), tape=True)
            bars = self._cotangents(ev, a, q_bar if rows is None else q_bar[rows], eps)
            a_rate, _ = self.kernel.pullback(ev, *bars, None)
            return Rate(torch.stack((ev.f, -a_rate), 1), y.new_empty(len(y), 0))

        def accumulate(step: Step) -> None:
            eps, rows = self._eps(step.rows), step.rows
            for node, b, y in zip(method.tableau.c, method.tableau.b, step.stages, strict=True):
                if not b:
                    continue
                z, a = (self.kernel.layout(x) for x in y.unbind(1))
                t = _cast(step.t + node * step.h, z)
                ev = self.kernel.linearize(t, z, eps, c=self._context(rows), tape=True)
                share = per_sample(-b * step.h, a)
                q_rows = q_bar if rows is None else q_bar[rows]
                q_share = share.reshape(-1, 1) * q_rows if isinstance(share, Tensor) else share * q_rows
                _, context_bar = self.kernel.pullback(ev, *self._cotangents(ev, a * share, q_share, eps), 1.0)
                self._add_context_bar(rows, [context_bar])

        y = torch.stack((self.end, z_bar), 1)
        t0, t1 = self.t_span
        y, _, stats = self._integrate(adjoint, y, y.new_empty(len(y), 0), (t1, t0), accumulate)
        self.stats.nfe_backward += stats.nfe
        return y[:, 1]


def _cast(t: Time, like: Tensor) -> Time:
    return t.to(like.dtype) if isinstance(t, Tensor) else t


def _rows(t: Time, piece: slice) -> Time:
    return t[piece] if isinstance(t, Tensor) else t
