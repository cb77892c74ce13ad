"""Solves that a compiled kernel does whole: fixed steps of a multilayer perceptron on the CPU.

The steps, stages and products are those of backprop.py; a block of samples goes through all of them before the next one
begins, so that it stays in the cache, and Python is asked twice a solve instead of hundreds of times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from ctypes import CDLL
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyrnode import solvers
from pyrnode.config import SolverConfig
from pyrnode.dynamics.base import BoundDynamics
from pyrnode.dynamics.layered import BoundLayers
from pyrnode.engines.augmented import Augmented
from pyrnode.engines.base import Stats
from pyrnode.engines.runge_kutta import grid
from pyrnode.engines.torch_solve import TorchSolve
from pyrnode.native import mlp
from pyrnode.probes import Probes


@dataclass(eq=False)
class Fused(TorchSolve):
    """The kernel's own forward and reverse solve.

    Where its result is not finite, the solve is done again by torch's operations, which find the step and name it.
    """

    compiled: CompiledSolve
    otherwise: Callable[[Tensor], TorchSolve]  # given the start state
    instead: TorchSolve | None = field(default=None, init=False)

    def solve(self, z0: Tensor) -> tuple[Tensor, Tensor, Stats]:
        found = self.compiled.forward(z0, record=True)
        if found is not None:
            return found
        self.instead = self.otherwise(z0)
        return self.instead.solve(z0)

    def pull(self, z_bar: Tensor, q_bar: Tensor) -> Tensor:
        if self.instead is not None:
            return self.instead.pull(z_bar, q_bar)
        self.stats.nfe_backward += self.compiled.evaluations
        return self.compiled.backward(self.system.bound, z_bar, q_bar)


def compiled_solve(
    system: Augmented, z0: Tensor, t_span: tuple[float, float], solver: SolverConfig
) -> CompiledSolve | None:
    """The solve by a kernel; `None` where there is none for these dynamics, this solver or this machine."""
    bound = system.bound
    if not isinstance(bound, BoundLayers) or bound.images or system.context is not None or z0.device.type != "cpu":
        return None
    if solvers.adaptive(solver) or isinstance(solver.step_size, str) or solver.memory != "auto":
        return None
    types = {p.dtype for layer in bound.layers for p in (layer.linear.weight, *layer.parameters.values())}
    library = mlp.library(z0.dtype)
    if types != {z0.dtype} or library is None:
        return None
    return CompiledSolve(library, bound, system.probes, t_span, solver, z0.dtype)


class CompiledSolve:
    """A solve with the parameters that `bound` is bound to, in numbers of the type `dtype`."""

    def __init__(
        self,
        library: CDLL,
        bound: BoundLayers,
        probes: Probes | None,
        t_span: tuple[float, float],
        solver: SolverConfig,
        dtype: torch.dtype,
    ) -> None:
        tableau, steps = solvers.method(solver.name).tableau, grid(t_span, float(solver.step_size))
        self.steps = len(steps)
        self.eps = None if probes is None else probes.eps
        self.weight = 1.0 if probes is None else probes.weight
        self.times = torch.tensor([t + c * h for t, h in steps for c in tableau.c], dtype=dtype, device="cpu")
        entries = [layer.at(self.times) for layer in bound.layers]
        self.widths = [len(layer.linear.weight) for layer in bound.layers]
        shift = torch.cat([shift.expand(len(self.times), -1) for _, shift in entries], 1)
        scales = [scale for scale, _ in entries if scale is not None]
        self.solve = mlp.Solve(
            library,
            [layer.linear.weight for layer in bound.layers],
            shift,
            torch.cat(scales, 1) if scales else None,
            bound.activation,
            mlp.Grid(tableau.a, tableau.b, [h for _, h in steps]),
        )

    @property
    def evaluations(self) -> int:
        """Evaluations of the dynamics, forward; the backward pass makes as many."""
        return len(self.times)

    def forward(self, z0: Tensor, *, record: bool) -> tuple[Tensor, Tensor, Stats] | None:
        """State and integrals at the end time; `None` where they are not finite.

        With `record` it keeps what `backward` starts from.
        """
        z, q = self.solve.forward(z0, self.eps, self.weight, record=record)
        if not math.isfinite(float(z.sum() + q.sum())):
            return None
        return z, q, Stats(nfe=self.evaluations, nfe_max=self.evaluations, accepted=self.steps)

    def backward(self, bound: BoundDynamics, z_bar: Tensor, q_bar: Tensor) -> Tensor:
        """The cotangent of the start state; the parameters' gradients go into `bound`, bound to the same ones."""
        assert isinstance(bound, BoundLayers)
        z0_bar, w_bars, shift_bar, scale_bar = self.solve.backward(z_bar, q_bar, self.eps, self.weight)
        shift_bars = shift_bar.split(self.widths, 1)
        scale_bars = [None] * len(self.widths) if scale_bar is None else scale_bar.split(self.widths, 1)
        for layer, w_bar, b_bar, s_bar in zip(bound.layers, w_bars, shift_bars, scale_bars, strict=True):
            layer.linear.gradient = w_bar
            layer.accumulate(self.times, None, b_bar, s_bar)  # a stage for a sample: each has its own time
        return z0_bar
