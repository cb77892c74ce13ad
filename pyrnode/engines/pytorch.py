"""The PyTorch engine: the augmented system of docs/design.md §2, solved and differentiated without nested autograd.

The system is in augmented.py. Which way a solve is differentiated is decided here (`choose`), from what `sensealg` and
`memory` ask for and from what there is: a compiled kernel does the whole solve where it can (fused.py), that of a
perceptron with ``memory="auto"`` alone; else intermediates are stored while they are few, and evaluated again where
they are not (backprop.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pyrnode import solvers
from pyrnode.config import SolverConfig
from pyrnode.contexts import Contexts
from pyrnode.devices import awaited, store_limit
from pyrnode.dynamics.base import Dynamics
from pyrnode.engines.augmented import Augmented, integrate
from pyrnode.engines.backprop import Checkpointed, Kept, Stored
from pyrnode.engines.backsolve import BacksolveAdjoint
from pyrnode.engines.base import Engine, Solution, Solve, Stats, check_potential, check_state, embedded, run
from pyrnode.engines.fused import CompiledSolve, Fused, compiled_solve
from pyrnode.engines.fused_potential import compiled_potential
from pyrnode.engines.graphs import Graphs
from pyrnode.engines.runge_kutta import grid, not_finite, retrace
from pyrnode.engines.torch_solve import TorchSolve
from pyrnode.errors import ConfigError
from pyrnode.precision import own_precision
from pyrnode.probes import Probes
from pyrnode.solvers import SolverInfo

_STORE_LIMIT = 32 * 2**20
"""Up to how many bytes of intermediates of one block ``memory="auto"`` stores on a CPU."""


class TorchEngine(Engine):
    """Explicit Runge-Kutta methods in PyTorch, on any of its devices."""

    name = "torch"

    def __init__(self) -> None:
        # glibc hands freed blocks back to the system until it has once seen a larger one freed; the page faults of
        # getting them again cost up to a fifth of a training step. This block is never touched.
        torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")
        self._graphs = Graphs()

    def check(self, solver: SolverConfig) -> None:
        if not solvers.adaptive(solver):
            solvers.step_size(solver)
        if solver.sensealg != "auto":
            solvers.check_sensitivity(solver.sensealg)
        if solver.options:
            raise ConfigError(f"solver options {solver.options!r}: the PyTorch engine's solvers have none")
        if solvers.adaptive(solver) and solver.memory == "store":
            raise ConfigError(
                f"memory = 'store' needs a fixed-step solver, and {solver.name} is adaptive; use 'checkpoint' or 'auto'"
            )
        if solver.numbers != "ieee":
            _check_coarse(solver)

    def solvers(self) -> list[SolverInfo]:
        return [method.info for method in solvers.METHODS.values()]

    def sensitivities(self) -> dict[str, str]:
        return solvers.SENSITIVITIES

    def integrate(
        self,
        dynamics: Dynamics,
        z0: Tensor,
        probes: Probes | None,
        t_span: tuple[float, float],
        solver: SolverConfig,
        *,
        context: Tensor | Contexts | None = None,
        total_derivative: bool = False,
        hjb: bool = False,
    ) -> Solution:
        self.check(solver)
        check_state(dynamics, z0, probes)
        if hjb:
            check_potential(dynamics)
        if solver.sensealg == "auto":
            solver = replace(solver, sensealg="Backprop")
        c, stats = embedded(dynamics, context, len(z0)), Stats()
        system = Augmented(
            dynamics,
            probes,
            None if c is None else c.detach(),
            total_derivative=total_derivative and probes is not None,
            hjb=hjb and probes is not None,
            precision=solver.numbers,
        )
        start = system.bound.layout(z0)
        z, q = run(
            start,
            c,
            tuple(dynamics.solved_parameters()),
            plain=lambda z0: solve_plainly(system, z0, t_span, solver, stats),
            recorded=lambda z0: self._recorded(system, z0, t_span, solver, stats),
        )
        left = awaited(z) and not solvers.adaptive(solver)
        verify = _verification(system, start, (z, q), t_span, solver) if left else None
        return Solution.of(z, q, stats, verify)

    def _recorded(
        self, system: Augmented, z0: Tensor, t_span: tuple[float, float], solver: SolverConfig, stats: Stats
    ) -> Solve:
        """The solve that becomes a node of autograd's graph: by CUDA graphs where there are some."""

        def eager(system: Augmented, z0: Tensor, stats: Stats) -> TorchSolve:
            return choose(system, z0, t_span, solver, stats)

        graphed = self._graphs.solve(system, z0, t_span, solver, stats, eager) if solver.graphs else None
        return eager(system, z0, stats) if graphed is None else graphed


def _check_coarse(solver: SolverConfig) -> None:
    """Raises `ConfigError` where a solver cannot be in coarser numbers than IEEE's."""
    named = f"solver.precision = {solver.precision!r}"
    if solvers.adaptive(solver):
        raise ConfigError(
            f"{named} needs steps that do not depend on values, and {solver.name} is adaptive: coarse numbers do not "
            "agree to its tolerances; set adaptive = false with a step_size, take RK4, or set precision = 'ieee'"
        )
    if solver.sensealg == "BacksolveAdjoint":
        raise ConfigError(f"{named} beside sensealg = {solver.sensealg!r}; use 'Backprop', or set precision = 'ieee'")


def _verification(
    system: Augmented,
    z0: Tensor,
    found: tuple[Tensor, Tensor],
    t_span: tuple[float, float],
    solver: SolverConfig,
) -> Callable[[], None]:
    """What `Solution.verify` is of a solve of fixed steps: where its result is not finite, it is taken again."""
    z0, y, q = z0.detach(), *(x.detach() for x in found)

    @torch.no_grad()
    def verify() -> None:
        if not not_finite(y, q):
            return
        with own_precision(z0):
            step_size = solvers.step_size(solver)
            retrace(system, z0, system.no_integrals(z0), t_span, step_size, solvers.method(solver.name))
        system.release()

    return verify


@torch.no_grad()
def solve_plainly(
    system: Augmented, z0: Tensor, t_span: tuple[float, float], solver: SolverConfig, stats: Stats
) -> tuple[Tensor, Tensor]:
    """The solve where no gradient can be asked for: nothing is kept."""
    compiled = _compiled(system, z0, t_span, solver)
    found = None if compiled is None else compiled.forward(z0, record=False)
    if found is None:  # no kernel, or a result that is not finite: these operations find the step and name it
        found = integrate(system, z0, system.no_integrals(z0), t_span, solver)
    z, q, counts = found
    vars(stats).update(vars(counts))
    system.release()
    return z, q


@torch.no_grad()
def choose(
    system: Augmented, z0: Tensor, t_span: tuple[float, float], solver: SolverConfig, stats: Stats
) -> TorchSolve:
    """The way in which a solve from states like `z0` is differentiated."""
    if solver.sensealg == "BacksolveAdjoint":
        return BacksolveAdjoint(system, t_span, solver, stats)

    store = _stores(system, z0, t_span, solver)

    def by_operations(z0: Tensor) -> TorchSolve:
        if not store:
            return Checkpointed(system, t_span, solver, stats)
        way = Kept if system.bound.split() is None else Stored
        return way(system, t_span, solver, stats)

    compiled = _compiled(system, z0, t_span, solver, store=store)
    return by_operations(z0) if compiled is None else Fused(system, t_span, solver, stats, compiled, by_operations)


def _compiled(
    system: Augmented, z0: Tensor, t_span: tuple[float, float], solver: SolverConfig, *, store: bool = False
) -> CompiledSolve | None:
    """The solve by a kernel in C, whichever has one for these dynamics; all of them compute in IEEE's numbers alone."""
    if system.precision != "ieee":
        return None
    found = compiled_solve(system, z0, t_span, solver, store=store)
    return found or compiled_potential(system, z0, t_span, solver)


def _stores(system: Augmented, z0: Tensor, t_span: tuple[float, float], solver: SolverConfig) -> bool:
    """Whether to keep all intermediates."""
    size = system.bound.tape_bytes(z0, system.count)
    explicit = size > 0 or system.bound.split() is not None
    if not explicit and solver.memory == "store":
        raise ConfigError("memory = 'store' needs dynamics with an explicit product; use 'checkpoint' or 'auto'")
    if solver.memory != "auto" or not explicit or solvers.adaptive(solver) or solver.step_size == "auto":
        return solver.memory == "store"
    return evaluations(t_span, solver) * size <= store_limit(z0, _STORE_LIMIT)


def evaluations(t_span: tuple[float, float], solver: SolverConfig) -> int:
    """How often fixed steps evaluate the dynamics."""
    return len(grid(t_span, float(solver.step_size))) * len(solvers.method(solver.name).tableau.b)
