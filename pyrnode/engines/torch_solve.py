"""What every way of differentiating a solve shares; the ways themselves are in backprop.py, backsolve.py and fused.py.

The first derivative of a solve is written out; nobody wrote out the second. Where one is asked for, the same steps are
taken again (`replay`) with the right-hand side by nested autograd, to which any order is the same. So it is the
derivative of the discrete solve, as the first one is; it costs several times as much, and nothing of it is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyrnode import solvers
from pyrnode.config import SolverConfig
from pyrnode.dynamics import Dynamics
from pyrnode.dynamics.base import hjb_residual
from pyrnode.dynamics.layers import Time
from pyrnode.dynamics.nested import total_derivative, vjp
from pyrnode.engines.augmented import Augmented, cast_time, integrate
from pyrnode.engines.base import Stats
from pyrnode.engines.runge_kutta import Step, combine, grid, per_sample


@dataclass(eq=False)
class TorchSolve(ABC):
    """One solve of one block that remembers what its backward pass needs; a subclass is a way of differentiating it."""

    system: Augmented
    t_span: tuple[float, float]
    solver: SolverConfig
    stats: Stats
    versions: list[int] = field(default_factory=list, init=False)  # of the parameters, at the time of the solve

    @property
    def tableau(self) -> solvers.Tableau:
        """The solver's coefficients."""
        return solvers.method(self.solver.name).tableau

    @abstractmethod
    def solve(self, z0: Tensor) -> tuple[Tensor, Tensor, Stats]:
        """State and integrals at the end time; keeps what `pull` needs."""

    @abstractmethod
    def pull(self, z_bar: Tensor, q_bar: Tensor) -> Tensor:
        """The cotangent of the start state; those of context and parameters gather in the system.

        May be asked for again (``retain_graph=True``).
        """

    def forward(self, z0: Tensor) -> tuple[Tensor, Tensor]:
        """`solve`, as `base.Solve` has it."""
        self.versions = self.system.versions()
        with torch.no_grad():
            z, q, stats = self.solve(z0)
        vars(self.stats).update(vars(stats))
        self.system.release()
        return z, q

    def replay(self, z0: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """The solve in operations that autograd differentiates to any order, as `base.Solve` has it."""
        return replay(self.system, z0, c, self.t_span, self.solver)

    def backward(self, z_bar: Tensor, q_bar: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """`pull`, as `base.Solve` has it."""
        check_versions(self.system, self.versions)
        self.system.begin_pullback()
        z0_bar = self.pull(self.system.bound.layout(z_bar), q_bar)
        return z0_bar, *self.system.end_pullback()


def check_versions(system: Augmented, before: list[int]) -> None:
    """Raises `RuntimeError` where a parameter is not what it was at the time of the solve."""
    if system.versions() != before:
        raise RuntimeError("a parameter was changed in place between the solve and its backward pass")


def replay(
    system: Augmented, z0: Tensor, c: Tensor | None, t_span: tuple[float, float], solver: SolverConfig
) -> tuple[Tensor, Tensor]:
    """The state at the end time and the integrals (l, E, n, D), ``(batch, 4)``, in autograd's graph.

    Args:
        system: The system of the solve.
        z0: State at the start.
        c: Embedded context.
        t_span: Start and end time.
        solver: The solver, whose steps are taken again.
    """
    y, q = z0, system.no_integrals(z0)
    tableau = solvers.method(solver.name).tableau
    for rows, t, h in _steps(system, z0.detach(), t_span, solver):
        start, begun = (y, q) if rows is None else (y[rows], q[rows])
        rates: list[Tensor] = []
        integrals = begun
        for node, row, b in zip(tableau.c, tableau.a, tableau.b, strict=True):
            f, integrands = _rate(system, t + node * h, combine(start, rates, row, h), c, rows)
            rates.append(f)
            if b and q.shape[1]:
                integrals = integrals + b * per_sample(h, q) * integrands
        end = combine(start, rates, tableau.b, h)
        y, q = (end, integrals) if rows is None else (y.index_copy(0, rows, end), q.index_copy(0, rows, integrals))
    return y, q


def _steps(
    system: Augmented, z0: Tensor, t_span: tuple[float, float], solver: SolverConfig
) -> list[tuple[Tensor | None, Time, Time]]:
    """Samples, start and length of every step."""
    if not solvers.adaptive(solver):
        return [(None, t, h) for t, h in grid(t_span, float(solver.step_size))]
    steps: list[tuple[Tensor | None, Time, Time]] = []

    def note(step: Step) -> None:
        steps.append((step.rows, step.t, step.h))

    with torch.no_grad():
        integrate(system, z0, system.no_integrals(z0), t_span, solver, note)
    system.release()
    return steps


def _rate(system: Augmented, t: Time, z: Tensor, c: Tensor | None, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """F and the integrands (l', E', n', D'), differentiable in the state, the context and the parameters."""
    dynamics: Dynamics = system.dynamics
    eps, _ = system.held(rows)
    c = c if c is None or rows is None else c[rows]
    if eps is None or system.probes is None:
        return dynamics.rate(cast_time(t, z), z, c), z.new_empty(len(z), 0)
    if not z.requires_grad:
        z = z.detach().requires_grad_()
    time = cast_time(t, z)
    if system.total_derivative:
        time = z.new_full((len(z),), time) if not isinstance(time, Tensor) else time.detach()
        time = time.requires_grad_()
    weight, residual = system.probes.weight, None
    if system.hjb:
        f, residual = hjb_residual(dynamics, time, z, c)
    else:
        f = dynamics.rate(time, z, c)
    w = [vjp(f, z, e, create_graph=True) for e in eps.unbind(0)]
    l = weight * sum((e * product).flatten(1).sum(1) for e, product in zip(eps.unbind(0), w, strict=True))
    n = weight * sum(product.square().flatten(1).sum(1) for product in w)
    E = f.square().flatten(1).sum(1)
    D = torch.zeros_like(E)
    if system.total_derivative and isinstance(time, Tensor):
        D = total_derivative(time, z, f).square().flatten(1).sum(1)
    integrands = [torch.as_tensor(l), E, torch.as_tensor(n), D]
    return f, torch.stack(integrands if residual is None else [*integrands, residual.abs()], 1)
