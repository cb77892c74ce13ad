"""Solves of potential flows that a compiled kernel does whole: of fixed steps, with the exact trace, on the CPU."""

from __future__ import annotations

import math
from ctypes import CDLL

from torch import Tensor

from pyrnode import solvers
from pyrnode.config import SolverConfig
from pyrnode.dynamics.bound_potential import BoundPotential
from pyrnode.dynamics.scalar import CURVES
from pyrnode.engines.augmented import Augmented
from pyrnode.engines.base import Stats
from pyrnode.engines.fused import CompiledSolve
from pyrnode.engines.runge_kutta import grid
from pyrnode.native import potential
from pyrnode.native.mlp import Grid


def compiled_potential(
    system: Augmented, z0: Tensor, t_span: tuple[float, float], solver: SolverConfig
) -> CompiledSolve | None:
    """The solve by the kernel; `None` where it has none: adaptive or probed solves, other types, or other machines."""
    bound = system.bound
    if not isinstance(bound, BoundPotential) or z0.device.type != "cpu" or not len(z0):
        return None
    if solver.memory != "auto" or solvers.adaptive(solver) or isinstance(solver.step_size, str):
        return None
    scalar, library = bound.scalar, potential.library(z0.dtype)
    given = (*scalar.weights, *scalar.biases, scalar.w, scalar.A, scalar.b)
    if library is None or {p.dtype for p in given} != {z0.dtype} or not (bound.exact or system.probes is None):
        return None
    return _CompiledPotential(library, system, bound, z0.shape[1], t_span, solver)


class _CompiledPotential(CompiledSolve):
    """Along a grid."""

    def __init__(
        self,
        library: CDLL,
        system: Augmented,
        bound: BoundPotential,
        d: int,
        t_span: tuple[float, float],
        solver: SolverConfig,
    ) -> None:
        scalar, tableau = bound.scalar, solvers.method(solver.name).tableau
        steps = grid(t_span, float(solver.step_size))
        times = [t + c * h for t, h in steps for c in tableau.c]
        curve = next(name for name, curve in CURVES.items() if curve is scalar.curve)
        self.steps, self.stages = len(steps), len(times)
        self.solve = potential.PotentialSolve(
            library,
            potential.Parameters(scalar.weights, scalar.biases, scalar.w, scalar.A, scalar.b),
            curve,
            d,
            Grid(tableau.a, tableau.b, [h for _, h in steps]),
            times,
            0 if system.probes is None else 4 + system.hjb,
            system.context,
        )

    @property
    def evaluations(self) -> int:
        return self.stages

    def forward(self, z0: Tensor, *, record: bool) -> tuple[Tensor, Tensor, Stats] | None:
        z, q = self.solve.forward(z0, record=record)
        if not math.isfinite(float(z.sum() + q.sum())):
            return None
        return z, q, Stats(nfe=self.stages, nfe_max=self.stages, accepted=self.steps)

    def backward(self, system: Augmented, z_bar: Tensor, q_bar: Tensor) -> Tensor:
        bound = system.bound
        assert isinstance(bound, BoundPotential)
        found = self.solve.backward(z_bar, q_bar)
        system.add_context_bar(None, [found.context])
        sums, parameters = bound.sums, found.parameters
        for total, bar in (
            *zip(sums.weights, parameters.weights, strict=True),
            *zip(sums.biases, parameters.biases, strict=True),
            (sums.w, parameters.w),
            (sums.A, parameters.A),
            (sums.b, parameters.b),
        ):
            total += bar
        return found.z0
