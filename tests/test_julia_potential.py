"""Potentials in the Julia engine: the numbers of autograd over Φ and of PyTorch's engine, natively and by callback."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pyrnode
from pyrnode import Config, ConfigError, Potential, PotentialDynamics, SolverConfig
from pyrnode.dynamics import MLP, Dynamics, GradientDynamics, ModuleDynamics
from pyrnode.engines import Engine, Solution, TorchEngine
from pyrnode.flow import Flow
from pyrnode.probes import Probes
from tests.test_dynamics import Field
from tests.test_potential import BATCH, CASES, CONTEXT, D, Phi, Reference, make, numbers, same
from tests.test_potential_flow import QUICK, TIGHT, Bowl, steps

pytestmark = pytest.mark.needs_julia

TORCH = TorchEngine()
FIXED = SolverConfig(name="RK4", step_size=0.3, sensealg="Backprop")


def probes_for(z: Tensor, exact: bool) -> Probes:
    return Probes.exact(z) if exact else Probes.draw(z, 2, generator=torch.Generator().manual_seed(3))


def outputs(found: Solution) -> list[Tensor]:
    return [found.z, found.l, found.E, found.n, found.D, found.H]


def loss(z: Tensor, l: Tensor, E: Tensor, n: Tensor, H: Tensor) -> Tensor:
    """A number in which everything takes part, with a weight of its own."""
    integrals = torch.stack((l, E, n, H), 1)
    return (z * numbers(*z.shape, seed=7)).sum() + (integrals * numbers(*integrals.shape, seed=6)).sum()


def solve(
    engine: Engine, dynamics: Dynamics, solver: SolverConfig, exact: bool, batch: int = BATCH, **settings: Any
) -> tuple[Solution, list[Tensor]]:
    """A solve with all integrals, and the gradients of the state, the context and the parameters."""
    z0 = (0.7 * numbers(batch, D, seed=2)).to(next(dynamics.parameters()).dtype).requires_grad_()
    c = numbers(batch, CONTEXT, seed=4).to(z0).requires_grad_() if dynamics.context_dim else None
    probes = probes_for(z0.detach(), exact)
    found = engine.integrate(dynamics, z0, probes, (0.0, 1.0), solver, context=c, **{"hjb": True, **settings})
    leaves = [z0, *([] if c is None else [c]), *dynamics.parameters()]
    value = loss(*(x.double() for x in (found.z, found.l, found.E, found.n, found.H))) + found.D.sum()
    return found, list(torch.autograd.grad(value, leaves))


def agree(found: tuple[Solution, list[Tensor]], expected: tuple[Solution, list[Tensor]], tolerance: float) -> None:
    for x, y in zip(outputs(found[0]), outputs(expected[0]), strict=True):
        same(x.detach(), y.detach(), tolerance)
    for x, y in zip(found[1], expected[1], strict=True):
        same(x, y, tolerance)


# -- the kernel ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "hidden", "time", "context_dim"), CASES)
@pytest.mark.parametrize("exact", [False, True])
def test_one_step_is_autograds(
    julia_engine: Engine, activation: str, hidden: tuple[int, ...], time: str, context_dim: int, exact: bool
) -> None:
    """f, its products or trace and norm, the residual, and the pullback of all of them, against autograd over Φ alone.

    A step of Euler's of length one from t = 0.3 is ``z + f``, and its integrals are the integrands.
    """
    dynamics = make(activation, hidden, time, context_dim)
    z0 = numbers(BATCH, D, seed=2).requires_grad_()
    context = numbers(BATCH, CONTEXT, seed=5).requires_grad_() if context_dim else None
    probes = probes_for(z0.detach(), exact)
    solver = SolverConfig(name="Euler", step_size=1.0, sensealg="Backprop")
    found = julia_engine.integrate(dynamics, z0, probes, (0.3, 1.3), solver, context=context, hjb=True)

    reference = Reference(dynamics, 0.3, z0, None if context is None else dynamics.embed(context))
    w = reference.products(probes.eps)
    trace, frobenius = ((w * probes.eps).sum((0, 2)) / 2, w.square().sum((0, 2)) / 2)
    if exact:
        trace, frobenius = reference.trace, reference.frobenius
    f = reference.f
    expected = [z0 + f, trace, f.square().sum(1), frobenius, reference.hjb.abs()]
    given = [found.z, found.l, found.E, found.n, found.H]
    for x, y in zip(given, expected, strict=True):
        same(x.detach(), y.detach())
    leaves = [z0, *([] if context is None else [context]), *dynamics.parameters()]
    gradients = torch.autograd.grad(loss(*given), leaves)
    for x, y in zip(gradients, torch.autograd.grad(loss(*expected), leaves), strict=True):
        same(x, y)


def test_without_the_norm_its_pullback_is_left_out(julia_engine: Engine) -> None:
    """What λ_J = 0 takes is the same gradient as what λ_J = 1e-300 takes."""
    gradients = []
    for weight in (0.0, 1e-300):
        dynamics, z0 = make(hidden=(4, 4, 4)), numbers(BATCH, D)
        found = julia_engine.integrate(dynamics, z0, Probes.exact(z0), (0.0, 1.0), FIXED)
        gradients.append(torch.autograd.grad((found.l + weight * found.n).sum(), list(dynamics.parameters())))
    for x, y in zip(*gradients, strict=True):
        same(x, y, 1e-14)


# -- solves ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("hidden", "context_dim"), [((5,), 0), ((4, 4, 4), CONTEXT), ((24, 24), 0)])
@pytest.mark.parametrize("name", ["RK4", "Heun"])
def test_a_solve_is_pytorchs(
    julia_engine: Engine, hidden: tuple[int, ...], context_dim: int, exact: bool, name: str
) -> None:
    """And with stored evaluations, and evaluated again; the wide network has the products for a CPU's registers."""
    dynamics, solver = make(hidden=hidden, context_dim=context_dim), replace(FIXED, name=name)
    expected = solve(TORCH, dynamics, solver, exact)
    for memory in ("auto", "store", "checkpoint"):
        found = solve(julia_engine, dynamics, replace(solver, memory=memory), exact)
        agree(found, expected, 1e-10)
        assert (found[0].stats.nfe_backward == 0) == (memory != "checkpoint")


@pytest.mark.parametrize("exact", [False, True])
def test_many_dimensions_and_a_batch_in_pieces(julia_engine: Engine, exact: bool) -> None:
    """Twelve dimensions, where each sample's products are BLAS's, and more samples than a piece of the batch has."""
    torch.manual_seed(0)
    dynamics = Potential(12, (32, 32), initial="ot-flow").double()
    z0 = (0.5 * numbers(150, 12)).requires_grad_()
    probes, found = probes_for(z0.detach(), exact), []
    for engine in (julia_engine, TORCH):
        s = engine.integrate(dynamics, z0, probes, (0.0, 1.0), FIXED, hjb=True)
        gradient = torch.autograd.grad(loss(s.z, s.l, s.E, s.n, s.H), [z0, *dynamics.parameters()])
        found.append((s, list(gradient)))
    agree(found[0], found[1], 1e-10)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_adaptive_solves(julia_engine: Engine, together: bool, exact: bool) -> None:
    """Each sample on its own, or all by the same steps, which answer for z and l whether there is an H or not."""
    dynamics = make(context_dim=CONTEXT)
    solver = SolverConfig(name="Tsit5", rtol=1e-9, atol=1e-9, sensealg="Backprop", options={"together": together})
    expected = solve(TORCH, dynamics, replace(TIGHT, sensealg="Backprop"), exact)
    found, gradient = solve(julia_engine, dynamics, solver, exact)
    for x, y in zip(outputs(found)[:5], outputs(expected[0])[:5], strict=True):
        same(x.detach(), y.detach(), 1e-7)
    same(found.H.detach(), expected[0].H.detach(), 1e-3)  # |·| has a corner, and nobody looks at its error
    without, _ = solve(julia_engine, dynamics, solver, exact, hjb=False)
    assert without.stats.nfe == found.stats.nfe
    assert not bool(without.H.detach().any())
    same(without.z.detach(), found.z.detach(), 1e-14)
    assert len(gradient) == 2 + len(list(dynamics.parameters()))


@pytest.mark.parametrize(
    ("sensealg", "memory"),
    [
        ("InterpolatingAdjoint", "auto"),
        ("InterpolatingAdjoint", "checkpoint"),
        ("BacksolveAdjoint", "auto"),
        ("QuadratureAdjoint", "auto"),
        ("GaussAdjoint", "auto"),
        ("Backprop", "auto"),
    ],
)
@pytest.mark.parametrize("exact", [False, True])
def test_every_adjoint_gives_pytorchs_gradient(julia_engine: Engine, sensealg: str, memory: Any, exact: bool) -> None:
    dynamics, fine, found = make(context_dim=CONTEXT), replace(FIXED, step_size=0.01), []
    for rise in (60.0, 30.0):  # which ∂Φ/∂t has more than otherwise, so that |·| has no corner on the way: H is linear
        with torch.no_grad():
            dynamics.b[-1] = rise
        found.append(solve(TORCH, dynamics, fine, exact))
    expected = found[1]
    same(found[0][0].H.detach() - expected[0].H.detach(), torch.full((BATCH,), 30.0, dtype=torch.double))
    solver = SolverConfig(
        name="Tsit5", rtol=1e-9, atol=1e-9, sensealg=sensealg, memory=memory, options={"together": True}
    )
    agree(solve(julia_engine, dynamics, solver, exact), expected, 1e-5)


def test_a_network_is_seen_as_it_is(julia_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Natively: no call of Python's, no copy of the parameters; what changes is seen at once."""
    from pyrnode.engines import julia

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("Python was asked")

    monkeypatch.setattr(julia, "Foreign", refuse)
    dynamics = make()
    address = None
    for change in (lambda: None, lambda: dynamics.w.data.mul_(2), lambda: setattr(dynamics, "activation", "softplus")):
        change()
        agree(solve(julia_engine, dynamics, FIXED, True), solve(TORCH, dynamics, FIXED, True), 1e-10)
        place = next(iter(dynamics.solved_parameters())).data_ptr()
        theta = julia_engine._network(dynamics, tuple(dynamics.solved_parameters())).flat  # type: ignore[attr-defined]
        assert address in (None, place)
        assert theta.data_ptr() == place
        address = place
    dynamics.float()
    single = solve(julia_engine, dynamics, FIXED, True)
    assert single[0].H.dtype == torch.float32
    agree(single, solve(TORCH, dynamics, FIXED, True), 1e-4)


def test_an_empty_batch(julia_engine: Engine) -> None:
    found, gradient = solve(julia_engine, make(), FIXED, True, batch=0)
    assert found.z.shape == (0, D)
    assert found.H.shape == (0,)
    assert not any(bool(g.any()) for g in gradient)


def test_unit_vectors_of_other_networks(julia_engine: Engine) -> None:
    """They do not cross to Julia, which has them by itself."""
    torch.manual_seed(0)
    for dynamics in (MLP(D).double(), ModuleDynamics(Field().double(), (D,))):
        agree(*(solve(e, dynamics, FIXED, True, hjb=False) for e in (julia_engine, TORCH)), 1e-10)


# -- a user's own potential ------------------------------------------------------------------------------------------


def test_a_bowl_in_closed_form(julia_engine: Engine) -> None:
    """z(T) = e^{−k} z, l = −k d, E = k² |z|² e, H = ½ k² |z|² e − g where that is positive, e = (1 − e^{−2k})/(2k)."""
    bowl, z0 = PotentialDynamics(Bowl(), (D,)), 2 + numbers(BATCH, D).abs()
    k, decay = 0.8, (1 - math.exp(-1.6)) / 1.6
    found = julia_engine.integrate(bowl, z0, Probes.exact(z0), (0.0, 1.0), TIGHT, hjb=True)
    square = z0.square().sum(1)
    same(found.z, math.exp(-k) * z0)
    same(found.l, torch.full_like(square, -k * D))
    same(found.E, k**2 * square * decay)
    same(found.n, torch.full_like(square, k**2 * D))
    same(found.H, 0.5 * k**2 * square * decay - 0.5)


@pytest.mark.parametrize("features", [0, CONTEXT])
@pytest.mark.parametrize("exact", [False, True])
def test_a_users_potential(julia_engine: Engine, features: int, exact: bool) -> None:
    """Through Python, the residual with it, of fixed steps and of each sample's own."""
    torch.manual_seed(0)
    dynamics = PotentialDynamics(Phi(features), (D,), features).double()
    agree(*(solve(e, dynamics, FIXED, exact) for e in (julia_engine, TORCH)), 1e-10)
    adaptive = SolverConfig(name="DP5", rtol=1e-7, atol=1e-7, sensealg="Backprop")
    (found, _), (expected, _) = (solve(e, dynamics, adaptive, exact) for e in (julia_engine, TORCH))
    for x, y in zip(outputs(found)[:5], outputs(expected)[:5], strict=True):
        same(x.detach(), y.detach(), 1e-4)
    same(
        found.H.detach(), expected.H.detach(), 1e-3
    )  # the residual changes its sign, and each engine has its own steps


@pytest.mark.parametrize("own", [False, True])
def test_with_the_total_derivative(julia_engine: Engine, own: bool) -> None:
    """Which is nested autograd's, and Python's to evaluate, of our network too."""
    torch.manual_seed(0)
    dynamics: GradientDynamics = PotentialDynamics(Phi(), (D,)).double() if own else make()
    both = [solve(engine, dynamics, FIXED, False, total_derivative=True) for engine in (julia_engine, TORCH)]
    assert bool((both[0][0].D > 0).all())
    agree(*both, 1e-10)


def test_who_has_no_potential_is_told(julia_engine: Engine) -> None:
    z0 = numbers(BATCH, D)
    with pytest.raises(ConfigError, match=r"penalties.hjb needs .* not MLP: set network.kind = 'potential'"):
        julia_engine.integrate(MLP(D).double(), z0, Probes.exact(z0), (0.0, 1.0), FIXED, hjb=True)


# -- whole flows -----------------------------------------------------------------------------------------------------


def test_training_is_the_same() -> None:
    """The exact trace without being asked, λ_K, λ_J and hjb, conditional: the same losses, step by step."""
    generator = np.random.default_rng(2)
    c = generator.normal(size=(300, 1))
    x = 2 * c + generator.normal(size=(300, 2))
    found = []
    for engine in ("torch", "julia"):
        settings = {**QUICK, "engine": engine, "dtype": "float64", "seed": 3, "hjb": 0.1, "solver.sensealg": "Backprop"}
        settings |= {"solver.name": "RK4", "step_size": 0.25, "learning_rate": 0.01, "max_steps": 12}
        result = pyrnode.train(x, context=c, **settings)
        found.append([[record[name] for name in ("loss", "nll", "E", "n", "H")] for record in steps(result)])
    julia, expected = (np.array(records) for records in found)
    assert expected.shape == (12, 5)
    assert (expected[:, 4] > 0).all()
    assert np.abs(julia - expected).max() < 1e-10


def test_a_flow_on_either_engine() -> None:
    found = []
    for engine in ("torch", "julia"):
        settings = {"engine": engine, "network.kind": "potential", "hidden": (8, 8), "dtype": "float64", "seed": 1}
        solver = {"evaluation.solver.name": "RK4", "evaluation.solver.step_size": 0.1, "network.initial": "ot-flow"}
        flow = Flow.build(Config().override({**settings, **solver}), (D,))
        with torch.no_grad():
            x = numbers(5, D)
            z = flow.encode(x)
            found.append([flow.log_prob(x, divergence="exact"), flow.log_prob(x, divergence="hutchinson"), z])
            same(flow.decode(z), x, 1e-4)
    for x, y in zip(*found, strict=True):
        same(x, y, 1e-10)
