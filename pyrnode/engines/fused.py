"""Solves that a compiled kernel does whole: fixed steps of a multilayer perceptron on the CPU.

The steps, stages and products are those of `torch.py`; a block of samples goes through all of them before the next one
begins, so that it stays in the cache, and Python is asked twice a solve instead of hundreds of times.
"""

from __future__ import annotations

from ctypes import CDLL

import torch
from torch import Tensor

from pyrnode import solvers
from pyrnode.config import SolverConfig
from pyrnode.dynamics.base import BoundDynamics
from pyrnode.dynamics.layered import BoundLayers
from pyrnode.engines.runge_kutta import grid
from pyrnode.native import mlp
from pyrnode.probes import Probes


def fuse(
    kernel: BoundDynamics,
    z0: Tensor,
    probes: Probes | None,
    context: Tensor | None,
    t_span: tuple[float, float],
    solver: SolverConfig,
) -> FusedSolve | None:
    """The compiled solve; `None` where there is none for this kernel, solver or machine."""
    if not isinstance(kernel, BoundLayers) or kernel.images or context is not None or z0.device.type != "cpu":
        return None
    if solvers.method(solver.name).adaptive or isinstance(solver.step_size, str) or solver.memory != "auto":
        return None
    types = {p.dtype for layer in kernel.layers for p in (layer.linear.weight, *layer.parameters.values())}
    library = mlp.library(z0.dtype)
    if types != {z0.dtype} or library is None:
        return None
    return FusedSolve(library, kernel, probes, t_span, solver, z0.dtype)


class FusedSolve:
    """A solve with the parameters that `kernel` is bound to, in numbers of the type `dtype`."""

    def __init__(
        self,
        library: CDLL,
        kernel: BoundLayers,
        probes: Probes | None,
        t_span: tuple[float, float],
        solver: SolverConfig,
        dtype: torch.dtype,
    ) -> None:
        tableau, steps = solvers.method(solver.name).tableau, grid(t_span, float(solver.step_size))
        self.eps = None if probes is None else probes.eps
        self.weight = 1.0 if probes is None else probes.weight
        self.times = torch.tensor([t + c * h for t, h in steps for c in tableau.c], dtype=dtype)
        entries = [layer.at(self.times) for layer in kernel.layers]
        self.widths = [len(layer.linear.weight) for layer in kernel.layers]
        shift = torch.cat([shift.expand(len(self.times), -1) for _, shift in entries], 1)
        scales = [scale for scale, _ in entries if scale is not None]
        self.solve = mlp.Solve(
            library,
            [layer.linear.weight for layer in kernel.layers],
            shift,
            torch.cat(scales, 1) if scales else None,
            kernel.activation,
            mlp.Grid(tableau.a, tableau.b, [h for _, h in steps]),
        )

    @property
    def evaluations(self) -> int:
        """Evaluations of the dynamics, forward; the backward pass makes as many."""
        return len(self.times)

    def forward(self, z0: Tensor, *, record: bool) -> tuple[Tensor, Tensor]:
        """The state at the end time and the integrals (l, E, n, D), ``(batch, 4)``; no columns without probes."""
        return self.solve.forward(z0, self.eps, self.weight, record=record)

    def backward(self, kernel: BoundDynamics, z_bar: Tensor, q_bar: Tensor) -> Tensor:
        """The cotangent of the start state; the parameters' gradients go into `kernel`, bound to the same ones."""
        assert isinstance(kernel, BoundLayers)
        z0_bar, w_bars, shift_bar, scale_bar = self.solve.backward(z_bar, q_bar, self.eps, self.weight)
        shift_bars = shift_bar.split(self.widths, 1)
        scale_bars = [None] * len(self.widths) if scale_bar is None else scale_bar.split(self.widths, 1)
        for layer, w_bar, b_bar, s_bar in zip(kernel.layers, w_bars, shift_bars, scale_bars, strict=True):
            layer.linear.gradient = w_bar
            layer.accumulate(self.times, None, b_bar, s_bar, 1.0)  # a stage for a sample: each has its own time
        return z0_bar
