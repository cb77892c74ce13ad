"""Solves that a compiled kernel does whole: on a CPU of a perceptron, and of a convolutional network on a grid.

On a GPU, where a small perceptron is all launches, a kernel of Triton's does its solve on a grid (`DeviceGrid`).

The steps, stages and products are those of runge_kutta.py and backprop.py; a block of samples goes through all of them
before the next one begins, so that it stays in the cache, and Python is asked a few times a solve instead of hundreds.
So are the threads, which meet at the end of a solve alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrnode import solvers
from pyrnode.config import SolverConfig
from pyrnode.devices import constants
from pyrnode.dynamics.layered import BoundLayers
from pyrnode.dynamics.layers import ConcatSquashTime, ConcatTime, Conv, TimeEntry
from pyrnode.engines.augmented import Augmented, controlled
from pyrnode.engines.base import Stats
from pyrnode.engines.runge_kutta import grid
from pyrnode.engines.torch_solve import TorchSolve
from pyrnode.native import adaptive, convnet, device_mlp, mlp
from pyrnode.probes import Probes


@dataclass(eq=False)
class Fused(TorchSolve):
    """The kernel's own forward and reverse solve.

    Where it has no result, or one that is not finite, the solve is done again by torch's operations, which find the
    step and name it.
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
        return self.compiled.backward(self.system, z_bar, q_bar)


def compiled_solve(
    system: Augmented, z0: Tensor, t_span: tuple[float, float], solver: SolverConfig, *, store: bool = False
) -> CompiledSolve | None:
    """The solve by a kernel; `None` where there is none for these dynamics, this solver or this machine.

    Args:
        system: The system.
        z0: State at the start.
        t_span: Start and end time.
        solver: The solver. A perceptron's kernel is for ``memory="auto"`` alone: it does not ask what is stored.
        store: Whether a convolutional network's keeps all intermediates.
    """
    bound = system.bound
    if not isinstance(bound, BoundLayers):
        return None
    if _on_device(system, bound, z0, solver):
        directions = None if system.probes is None else _directions(system.probes)
        return DeviceGrid(_Case(None, bound, directions, t_span, solver, z0.dtype, None))
    if z0.device.type != "cpu":
        return None
    if bound.images:
        return _compiled_images(system, bound, z0.dtype, t_span, solver, store)
    if system.context is not None and any(layer.context_parts > 1 for layer in bound.layers):
        return None  # in the gate, too
    adapts = solvers.adaptive(solver)
    if solver.memory != "auto" or (not adapts and isinstance(solver.step_size, str)):
        return None
    types = {p.dtype for layer in bound.layers for p in (layer.linear.weight, *layer.parameters.values())}
    library = mlp.library(z0.dtype)
    if types != {z0.dtype} or library is None:
        return None
    directions = None if system.probes is None else _directions(system.probes)
    case = _Case(library, bound, directions, t_span, solver, z0.dtype, system.context)
    return (CompiledSteps if adapts else CompiledGrid)(case)


def _on_device(system: Augmented, bound: BoundLayers, z0: Tensor, solver: SolverConfig) -> bool:
    """Whether a GPU's kernel does the whole solve."""
    if bound.images or solver.memory != "auto" or solvers.adaptive(solver) or isinstance(solver.step_size, str):
        return False
    if system.context is not None or any(isinstance(layer, ConcatSquashTime) for layer in bound.layers):
        return False
    weights = [layer.linear.weight for layer in bound.layers]
    return device_mlp.usable(bound.activation, weights, z0, system.count)


def _compiled_images(
    system: Augmented,
    bound: BoundLayers,
    dtype: torch.dtype,
    t_span: tuple[float, float],
    solver: SolverConfig,
    store: bool,
) -> CompiledSolve | None:
    if solvers.adaptive(solver) or isinstance(solver.step_size, str):
        return None
    types = {p.dtype for layer in bound.layers for p in layer.parameters.values()}
    library = convnet.library([layer.linear.weight for layer in bound.layers], dtype)
    if types != {dtype} or library is None:
        return None
    directions = None if system.probes is None else _directions(system.probes)
    return CompiledImages(_Case(library, bound, directions, t_span, solver, dtype, system.context), store)


def _directions(probes: Probes) -> mlp.Directions:
    return mlp.Directions(None if probes.axes else probes.eps, len(probes.eps), probes.weight)


class _Case(NamedTuple):
    """What is solved: with the parameters that `bound` is bound to, in numbers of the type `dtype`."""

    library: Any  # of kernels in C; `None` of a GPU's
    bound: BoundLayers
    directions: mlp.Directions | None
    t_span: tuple[float, float]
    solver: SolverConfig
    dtype: torch.dtype
    context: Tensor | None  # embedded

    @property
    def weights(self) -> list[Tensor]:
        """Those of the layers, ``(out, in)``."""
        return [layer.linear.weight for layer in self.bound.layers]


class CompiledSolve(ABC):
    """A solve by a kernel, forward and backward."""

    def __init__(self, case: _Case) -> None:
        self.directions = case.directions
        self.widths = [len(weight) for weight in case.weights]

    @property
    @abstractmethod
    def evaluations(self) -> float:
        """Evaluations of the dynamics per sample that the backward pass makes."""

    @abstractmethod
    def forward(self, z0: Tensor, *, record: bool) -> tuple[Tensor, Tensor, Stats] | None:
        """State and integrals at the end time; `None` where they are not finite, or the solve is stuck.

        With `record` it keeps what `backward` starts from.
        """

    @abstractmethod
    def backward(self, system: Augmented, z_bar: Tensor, q_bar: Tensor) -> Tensor:
        """The cotangent of the start state; those of context and parameters gather in the system."""


class CompiledGrid(CompiledSolve):
    """Along a grid."""

    def __init__(self, case: _Case) -> None:
        super().__init__(case)
        bound, solver = case.bound, case.solver
        tableau, steps = solvers.method(solver.name).tableau, grid(case.t_span, float(solver.step_size))
        self.steps = len(steps)
        times = tuple(t + c * h for t, h in steps for c in tableau.c)
        self.times = constants(times, case.dtype, case.weights[0].device)
        entries = [layer.at(self.times) for layer in bound.layers]
        shift = torch.cat([shift.expand(len(self.times), -1) for _, shift in entries], 1)
        scales = [scale for scale, _ in entries if scale is not None]
        scale = torch.cat(scales, 1) if scales else None
        self.solve = self._solve(case, shift, scale, mlp.Grid(tableau.a, tableau.b, [h for _, h in steps]))

    def _solve(self, case: _Case, shift: Tensor, scale: Tensor | None, grid: mlp.Grid) -> mlp.Solve | device_mlp.Solve:
        return mlp.Solve(case.library, case.weights, shift, scale, case.bound.activation, grid, case.context)

    @property
    def evaluations(self) -> int:
        return len(self.times)

    def forward(self, z0: Tensor, *, record: bool) -> tuple[Tensor, Tensor, Stats] | None:
        z, q = self.solve.forward(z0, self.directions, record=record)
        if not _finite(z, q):
            return None
        return z, q, Stats(nfe=self.evaluations, nfe_max=self.evaluations, accepted=self.steps)

    def backward(self, system: Augmented, z_bar: Tensor, q_bar: Tensor) -> Tensor:
        bound = _layers(system)
        z0_bar, w_bars, shift_bar, scale_bar, context_bar = self.solve.backward(z_bar, q_bar, self.directions)
        system.add_context_bar(None, [context_bar])
        shift_bars = shift_bar.split(self.widths, 1)
        scale_bars = [None] * len(self.widths) if scale_bar is None else scale_bar.split(self.widths, 1)
        for layer, w_bar, b_bar, s_bar in zip(bound.layers, w_bars, shift_bars, scale_bars, strict=True):
            layer.linear.gradient = w_bar
            layer.accumulate(self.times, None, b_bar, s_bar)  # a stage for a sample: each has its own time
        return z0_bar


class DeviceGrid(CompiledGrid):
    """Along a grid, on a GPU. Nobody looks here whether numbers are finite: it would be to wait (`Solution.verify`)."""

    def _solve(self, case: _Case, shift: Tensor, scale: Tensor | None, grid: mlp.Grid) -> device_mlp.Solve:
        assert scale is None
        return device_mlp.Solve(case.weights, shift, case.bound.activation, grid)

    def forward(self, z0: Tensor, *, record: bool) -> tuple[Tensor, Tensor, Stats]:
        z, q = self.solve.forward(z0, self.directions, record=record)
        return z, q, Stats(nfe=self.evaluations, nfe_max=self.evaluations, accepted=self.steps)


class CompiledImages(CompiledSolve):
    """Along a grid, of a convolutional network; of its tensors, only what `backward` starts from outlives a pass."""

    def __init__(self, case: _Case, store: bool) -> None:
        super().__init__(case)
        tableau = solvers.method(case.solver.name).tableau
        self.steps = grid(case.t_span, float(case.solver.step_size))
        self.counted = [bool(b) or any(row[i] for row in tableau.a[i + 1 :]) for i, b in enumerate(tableau.b)]
        self.store = store
        self.solve = convnet.Solve(
            case.library,
            [_layer_of(layer) for layer in case.bound.layers],
            case.bound.activation,
            _size(case.bound.layers[0]),
            mlp.Grid(tableau.a, tableau.b, [h for _, h in self.steps]),
            [t + c * h for t, h in self.steps for c in tableau.c],
            case.context,
        )

    @property
    def evaluations(self) -> int:
        return 0 if self.solve.tape is not None else sum(self.counted) * len(self.steps)

    def forward(self, z0: Tensor, *, record: bool) -> tuple[Tensor, Tensor, Stats] | None:
        z, q = self.solve.forward(z0, self.directions, record=record, store=self.store)
        if not _finite(z, q):
            return None
        evaluations = len(self.counted) * len(self.steps)
        return z, q, Stats(nfe=evaluations, nfe_max=evaluations, accepted=len(self.steps))

    def backward(self, system: Augmented, z_bar: Tensor, q_bar: Tensor) -> Tensor:
        found = self.solve.backward(z_bar, q_bar, self.directions)
        for layer, bar in zip(_layers(system).layers, found.layers, strict=True):
            layer.settled = _gradients(layer, bar)
        system.add_context_bar(None, [found.context])
        return found.z0


class CompiledSteps(CompiledSolve):
    """By steps that each sample chooses by its own error."""

    def __init__(self, case: _Case) -> None:
        super().__init__(case)
        method, solver = solvers.method(case.solver.name), case.solver
        tableau = method.tableau
        assert tableau.e is not None
        self.stages = len(tableau.b)
        entries = [torch.stack([layer.parameters[n].flatten() for n in layer.terms]) for layer in case.bound.layers]
        self.solve = adaptive.AdaptiveSolve(
            case.library,
            case.weights,
            torch.cat(entries, 1),
            case.bound.activation,
            adaptive.Control(
                tableau.a,
                tableau.b,
                tableau.c,
                tableau.e,
                tableau.e3,
                method.order,
                case.t_span,
                solver.rtol,
                solver.atol,
                controlled(solver, 0 if case.directions is None else 4),
                solver.maxiters,
            ),
            case.context,
        )

    @property
    def evaluations(self) -> float:
        return self.stages * float(self.solve.counts[:, 1].double().mean())

    def forward(self, z0: Tensor, *, record: bool) -> tuple[Tensor, Tensor, Stats] | None:
        found = self.solve.forward(z0, self.directions, record=record)
        if found is None or not _finite(*found):
            return None
        attempts, accepted = self.solve.counts.double().unbind(1)
        nfe = 1 + self.stages * attempts
        rejected = float((attempts - accepted).mean())
        return *found, Stats(float(nfe.mean()), int(nfe.max()), 0.0, float(accepted.mean()), rejected)

    def backward(self, system: Augmented, z_bar: Tensor, q_bar: Tensor) -> Tensor:
        bound = _layers(system)
        z0_bar, w_bars, entry_bars, context_bar = self.solve.backward(z_bar, q_bar, self.directions)
        system.add_context_bar(None, [context_bar])
        for layer, w_bar, bars in zip(bound.layers, w_bars, entry_bars.split(self.widths, 1), strict=True):
            layer.linear.gradient = w_bar
            layer.add(bars)
        return z0_bar


def _layers(system: Augmented) -> BoundLayers:
    assert isinstance(system.bound, BoundLayers)
    return system.bound


def _size(layer: TimeEntry) -> tuple[int, int]:
    assert isinstance(layer.linear, Conv)
    return layer.linear.size


def _taps(layer: TimeEntry) -> Tensor:
    """Which of a filter's pixels lie within the image, seen from every kind of `convnet.BORDERS`: ``(BORDERS, 9)``.

    Where an image is one pixel high or wide, its pixels are of the first kind.
    """
    sides = []
    for size in _size(layer):
        first = [0.0, 1.0, float(size > 1)]
        sides.append(torch.tensor([first, [1.0, 1.0, 1.0], first[::-1]], dtype=torch.float32, device="cpu"))
    return torch.kron(*sides)


def _layer_of(layer: TimeEntry) -> convnet.LayerOf:
    """The layer as the kernel computes with it."""
    bias, *others = (layer.parameters[name] for name in layer.terms)
    time, gate = None, None
    if isinstance(layer, ConcatTime):
        time = (_taps(layer).unsqueeze(1) * others[0].flatten(1)).sum(2)  # a product's rounding would depend on threads
    elif others:
        time, gate = others[0].expand(convnet.BORDERS, -1), torch.stack(others[1:])
    return convnet.LayerOf(layer.linear.weight, bias, time, gate)


def _gradients(layer: TimeEntry, bar: convnet.LayerBar) -> dict[str, Tensor]:
    """What the kernel has found, by the layer's own parameters."""
    found = {"weight": bar.weight, "bias": bar.bias}
    if isinstance(layer, ConcatTime):
        weight_bar = (bar.time.unsqueeze(2) * _taps(layer).unsqueeze(1)).sum(0)
        found["time_weight"] = weight_bar.view_as(layer.parameters["time_weight"])
    elif bar.gate is not None:
        found |= dict(zip(layer.terms[1:], (bar.time.sum(0), *bar.gate), strict=True))
    return found


def _finite(z: Tensor, q: Tensor) -> bool:
    return math.isfinite(float(z.sum() + q.sum()))
