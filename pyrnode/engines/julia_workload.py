"""What the system image is to have compiled: the usual solves, run once while Julia writes down what it compiles.

A solver and an adjoint are compiled for the type of the state, and for little else: one small network stands for all of
its kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from pyrnode.config import SolverConfig
from pyrnode.dynamics import MLP, ConvNet, Dynamics, ModuleDynamics, Potential
from pyrnode.engines.base import Engine
from pyrnode.probes import Probes

SOLVERS: dict[str, tuple[str, ...]] = {
    "RK4": ("Backprop", "InterpolatingAdjoint", "BacksolveAdjoint", "QuadratureAdjoint", "GaussAdjoint"),
    "DP5": ("Backprop", "InterpolatingAdjoint", "BacksolveAdjoint", "QuadratureAdjoint", "GaussAdjoint"),
    "Tsit5": ("Backprop", "InterpolatingAdjoint", "BacksolveAdjoint", "QuadratureAdjoint", "GaussAdjoint"),
    "BS3": ("Backprop", "InterpolatingAdjoint", "BacksolveAdjoint", "QuadratureAdjoint", "GaussAdjoint"),
    "Vern7": ("Backprop", "InterpolatingAdjoint", "BacksolveAdjoint", "QuadratureAdjoint", "GaussAdjoint"),
    "VCABM": ("InterpolatingAdjoint", "BacksolveAdjoint", "QuadratureAdjoint", "GaussAdjoint"),
    "Rosenbrock23": ("GaussAdjoint", "QuadratureAdjoint"),
}
"""The usual solvers, each with the adjoints that it works with."""


class Case(NamedTuple):
    """One solve and its gradient."""

    dynamics: Dynamics
    solver: SolverConfig
    dtype: torch.dtype = torch.float32
    exact: bool = False


def cases() -> Iterator[Case]:
    """All solvers with all their adjoints in float32, with the default one in float64; three in other networks."""
    for name, sensitivities in SOLVERS.items():
        for sensealg in sensitivities:
            yield Case(MLP(2, (8,)), SolverConfig(name=name, sensealg=sensealg))
        yield Case(MLP(2, (8,)), SolverConfig(name=name), torch.float64, exact=True)
    usual = [SolverConfig(name="RK4", sensealg="Backprop"), SolverConfig(name="DP5"), SolverConfig(name="Tsit5")]
    for solver in usual:
        yield Case(MLP(2, (8,), context_dim=1), solver)
        yield Case(ConvNet((1, 4, 4), (2,)), solver)
        yield Case(Potential(2, (8,)), solver, exact=True)
        yield Case(ModuleDynamics(_Module(), (2,)), solver)
    yield Case(MLP(2, (8,)), SolverConfig(name="Tsit5", options={"together": True}))
    yield Case(MLP(2, (8,)), SolverConfig(name="RK4", sensealg="Backprop", memory="checkpoint"))


def exercise(engine: Engine) -> None:
    """Lists the solvers, and runs every case: forward, its gradient, and back without probes as samples are drawn."""
    engine.solvers()
    for case in cases():
        dynamics = case.dynamics.to(case.dtype)
        dim = math.prod(dynamics.event_shape)
        z0 = torch.linspace(-1, 1, 3 * dim, dtype=case.dtype, device="cpu").reshape(3, *dynamics.event_shape)
        c = torch.ones(3, dynamics.context_dim, dtype=case.dtype, device="cpu") if dynamics.context_dim else None
        probes = Probes.exact(z0) if case.exact else Probes.draw(z0, generator=torch.Generator().manual_seed(0))
        found = engine.integrate(dynamics, z0.requires_grad_(), probes, (0.0, 1.0), case.solver, context=c)
        (found.z.sum() + found.l.sum() + found.E.sum() + found.n.sum()).backward()
        with torch.no_grad():
            engine.integrate(dynamics, z0, probes, (0.0, 1.0), case.solver, context=c)
            engine.integrate(dynamics, z0, None, (1.0, 0.0), case.solver, context=c)


class _Module(nn.Module):
    """Dynamics that Julia has not: each evaluation calls back."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(z)) * (1 + t[:, None])
