"""Flows of potentials: the penalty, training, contexts, files and exports, against closed forms and autograd."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pyrnode
from pyrnode import Config, ConfigError, Divergence, Potential, PotentialDynamics, SolverConfig, export
from pyrnode.dynamics import MLP, GradientDynamics
from pyrnode.engines import Engine, Solution, create
from pyrnode.engines.foreign import Foreign
from pyrnode.engines.plain import ModuleRates, PotentialRates
from pyrnode.estimator import RNODEDensity
from pyrnode.flow import Flow
from pyrnode.probes import Probes
from tests.test_potential import BATCH, CONTEXT, D, Phi, Reference, make, numbers, same

QUICK: dict[str, Any] = {"network.kind": "potential", "hidden": [8, 8], "progress": False, "evaluate": False}


@pytest.fixture
def engine() -> Engine:
    return create("torch")


class Bowl(nn.Module):
    """``Φ = ½ k |z|² + g t``: the paths, and with them every integral, have a closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.g = (nn.Parameter(torch.tensor(x, dtype=torch.double)) for x in (0.8, 0.5))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return 0.5 * self.k * z.square().sum(1) + self.g * t


TIGHT = SolverConfig(name="DP8", rtol=1e-12, atol=1e-12, error_control="all")


def test_a_bowl_in_closed_form(engine: Engine) -> None:
    """z(T) = e^{−k} z, l = −k d, E = k² |z|² e, H = ½ k² |z|² e − g where that is positive, e = (1 − e^{−2k})/(2k)."""
    bowl, z0 = PotentialDynamics(Bowl(), (D,)), 2 + numbers(BATCH, D).abs()
    k, decay = 0.8, (1 - math.exp(-1.6)) / 1.6
    for probes in (Probes.exact(z0), Probes.draw(z0, 1, noise="rademacher")):  # for a multiple of I these are exact
        found = engine.integrate(bowl, z0, probes, (0.0, 1.0), TIGHT, hjb=True)
        square = z0.square().sum(1)
        same(found.z, math.exp(-k) * z0)
        same(found.l, torch.full_like(square, -k * D))
        same(found.E, k**2 * square * decay)
        same(found.n, torch.full_like(square, k**2 * D))
        same(found.H, 0.5 * k**2 * square * decay - 0.5)
        assert engine.integrate(bowl, z0, probes, (0.0, 1.0), TIGHT).H.count_nonzero() == 0


def solutions(
    engine: Engine, dynamics: GradientDynamics, solver: SolverConfig, z0: Tensor, probes: Probes, c: Tensor | None
) -> Solution:
    return engine.integrate(dynamics, z0, probes, (0.0, 1.0), solver, context=c, hjb=True)


SOLVERS = {
    "fixed": SolverConfig(name="RK4", step_size=0.25),
    "adaptive": SolverConfig(name="DP5", rtol=1e-4, atol=1e-4),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("context_dim", [0, CONTEXT])
def test_gradient_of_a_solve_is_autograds_through_its_steps(
    engine: Engine, solver: str, exact: bool, context_dim: int
) -> None:
    """The explicit pullback against nested autograd over the same discrete solve, all five integrals weighed."""
    dynamics, z0 = make(context_dim=context_dim), (0.7 * numbers(BATCH, D)).requires_grad_()
    c = numbers(BATCH, CONTEXT, seed=4).requires_grad_() if context_dim else None
    drawn = Probes.draw(z0.detach(), 2, generator=torch.Generator().manual_seed(3))
    probes = Probes.exact(z0.detach()) if exact else drawn
    leaves = [z0, *([] if c is None else [c]), *dynamics.parameters()]

    def gradient(create_graph: bool) -> tuple[list[Tensor], Tensor]:
        s = solutions(engine, dynamics, SOLVERS[solver], z0, probes, c)
        integrals = torch.stack((s.l, s.E, s.n, s.H), 1)
        value = (integrals * numbers(BATCH, 4, seed=6)).sum() + (s.z * numbers(BATCH, D, seed=7)).sum()
        return list(torch.autograd.grad(value, leaves, create_graph=create_graph)), integrals.detach()

    explicit, _ = gradient(create_graph=False)
    again, _ = gradient(create_graph=True)
    for x, y in zip(explicit, again, strict=True):
        same(x, y, 1e-12)
    (curved,) = torch.autograd.grad(again[0].square().sum(), z0)  # through `replay`, by nested autograd
    step, direction = 1e-5, numbers(BATCH, D, seed=8)
    values = []
    for sign in (1, -1):
        moved = (z0.detach() + sign * step * direction).requires_grad_()
        s = solutions(engine, dynamics, SOLVERS["fixed"], moved, probes, c)
        value = (torch.stack((s.l, s.E, s.n, s.H), 1) * numbers(BATCH, 4, seed=6)).sum()
        value = value + (s.z * numbers(BATCH, D, seed=7)).sum()
        values.append((value.detach(), torch.autograd.grad(value, moved)[0].square().sum()))
    if solver == "fixed":  # whose steps do not depend on the state
        (up, up_square), (down, down_square) = values
        assert float((up - down) / (2 * step)) == pytest.approx(float((explicit[0] * direction).sum()), rel=1e-6)
        expected = float((curved * direction).sum())
        assert float((up_square - down_square) / (2 * step)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("exact", [False, True])
def test_a_users_copy_of_the_potential_has_the_same_solve(engine: Engine, exact: bool) -> None:
    """The kernel against nested autograd over Φ alone: state, integrals and gradients."""

    class Copy(nn.Module):
        def __init__(self, potential: Potential) -> None:
            super().__init__()
            self.inner = potential

        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return self.inner.potential(t, z)

    ours, z0 = make(), 0.7 * numbers(BATCH, D)
    theirs = PotentialDynamics(Copy(make()), (D,))
    probes = Probes.exact(z0) if exact else Probes.draw(z0, 2, generator=torch.Generator().manual_seed(3))
    found = []
    for dynamics in (ours, theirs):
        s = solutions(engine, dynamics, SOLVERS["fixed"], z0, probes, None)
        value = s.z.sum() + (s.l + s.E + 0.5 * s.n + 0.3 * s.H).sum()
        found.append([s.z, s.l, s.E, s.n, s.H, *torch.autograd.grad(value, list(dynamics.parameters()))])
    for x, y in zip(*found, strict=True):
        same(x.detach(), y.detach(), 1e-11)


@pytest.mark.parametrize("exact", [False, True])
def test_what_is_kept_is_what_is_evaluated_again(engine: Engine, exact: bool) -> None:
    """Stored intermediates and re-evaluation give the same bits, and so does a second backward pass."""
    z0, c = 0.7 * numbers(BATCH, D), numbers(BATCH, CONTEXT, seed=4)
    probes = Probes.exact(z0) if exact else Probes.draw(z0, 2, generator=torch.Generator().manual_seed(3))
    found: list[list[Tensor]] = []
    for memory in ("store", "checkpoint"):
        dynamics = make(context_dim=CONTEXT)
        solver = replace(SOLVERS["fixed"], memory=memory)
        s = solutions(engine, dynamics, solver, z0, probes, c)
        value, leaves = (s.z.sum() + s.l + s.E + s.n + s.H).sum(), list(dynamics.parameters())
        found += [list(torch.autograd.grad(value, leaves, retain_graph=True)) for _ in range(2)]
    for gradient in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(gradient, found[0], strict=True))


@pytest.mark.parametrize("sensealg", ["Backprop", "BacksolveAdjoint"])
def test_both_ways_of_differentiating_agree(engine: Engine, sensealg: str) -> None:
    dynamics, z0 = make(), 0.3 * numbers(BATCH, D)
    solver = SolverConfig(name="DP8", rtol=1e-11, atol=1e-11, error_control="all", sensealg=sensealg)
    s = solutions(engine, dynamics, solver, z0, Probes.exact(z0), None)
    found = torch.autograd.grad((s.z.square().sum(1) + s.l + s.E + s.n).sum(), list(dynamics.parameters()))
    fine = replace(SOLVERS["fixed"], step_size=0.01)
    s = solutions(engine, dynamics, fine, z0, Probes.exact(z0), None)
    expected = torch.autograd.grad((s.z.square().sum(1) + s.l + s.E + s.n).sum(), list(dynamics.parameters()))
    for x, y in zip(found, expected, strict=True):
        same(x, y, 1e-6)


def test_who_has_no_potential_is_told(engine: Engine) -> None:
    z0 = numbers(BATCH, D)
    with pytest.raises(ConfigError, match=r"penalties.hjb needs .* not MLP: set network.kind = 'potential'"):
        engine.integrate(MLP(D).double(), z0, Probes.exact(z0), (0.0, 1.0), SOLVERS["fixed"], hjb=True)
    with pytest.raises(ConfigError, match=r"penalties\.hjb needs"):
        pyrnode.train("moons", samples=200, max_steps=1, hjb=0.1, progress=False, evaluate=False)
    flow = Flow.build(Config().override({"network.kind": "potential"}), (2,)).to_torch()
    with pytest.raises(ConfigError, match="the plain engine integrates z and l alone"):
        flow.engine.integrate(flow.blocks[0].dynamics, torch.zeros(1, 2), None, (0.0, 1.0), SOLVERS["fixed"], hjb=True)


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        ({"network.kind": "potential"}, (1, 8, 8), r"a potential of states \(1, 8, 8\).*flatten"),
        ({"network.kind": "potential", "hidden": (8, 9)}, (2,), "one positive width"),
        ({"network.kind": "potential", "activation": "silu"}, (2,), "activation of a potential"),
        ({"network.kind": "potential", "time": "concatsquash"}, (2,), "time of a potential"),
        ({"activation": "logcosh"}, (2,), "of a potential alone"),
        ({"hjb": -1.0}, (2,), "hjb = -1.0: expected at least 0"),
        ({"rank": 0}, (2,), "rank = 0: expected at least 1"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Flow.build(Config().override({"engine": "torch", **settings}), shape)


def steps(result: pyrnode.TrainingResult) -> list[dict[str, Any]]:
    """The records of optimiser steps."""
    return [record for record in result.history if "loss" in record]


def test_training_is_exact_without_being_asked() -> None:
    """With ``divergence = "auto"``, which an MLP of five dimensions estimates; and the loss has all its parts."""
    x = np.random.default_rng(0).normal(size=(300, 5))
    result = pyrnode.train(x, max_steps=3, hjb=0.1, validate_every=2, dtype="float64", seed=3, **QUICK)
    record, flow = steps(result)[0], result.flow
    penalties = result.config.penalties
    assert penalties.divergence == "auto"
    assert penalties.estimator(5).kind == "hutchinson"
    assert penalties.estimator(5, closed_trace=flow.closed_trace).kind == "exact"
    assert record["H"] > 0
    kinetic, jacobian, _ = flow.config.penalties.weights
    expected = record["nll"] + kinetic * record["E"] + jacobian * record["n"] + 0.1 * record["H"]
    assert record["loss"] == pytest.approx(expected, rel=1e-12)
    assert isinstance(flow.blocks[0].dynamics, Potential)


def test_it_learns_a_density() -> None:
    """Standard deviations 1 and 3 and a correlation: the entropy is reached within a tenth of a nat."""
    generator = np.random.default_rng(1)
    root = np.array([[1.0, 0.0], [1.5, 2.6]])
    x = generator.normal(size=(3000, 2)) @ root.T
    settings = {**QUICK, "evaluate": False, "learning_rate": 0.02, "batch_size": 250, "kinetic": 1e-3, "jacobian": 0.0}
    flow = pyrnode.train(x, max_steps=150, standardize="none", seed=1, **settings).flow
    fresh = torch.tensor(generator.normal(size=(4000, 2)) @ root.T)
    normal = torch.distributions.MultivariateNormal(torch.zeros(2).double(), scale_tril=torch.tensor(root))
    with torch.no_grad():
        gap = float((normal.log_prob(fresh) - flow.log_prob(fresh)).mean())
    assert -0.01 < gap < 0.1


@pytest.fixture(scope="module")
def conditional() -> Flow:
    generator = np.random.default_rng(2)
    c = generator.normal(size=(400, 1))
    x = 2 * c + generator.normal(size=(400, 2))
    return pyrnode.train(x, context=c, max_steps=60, learning_rate=0.02, dtype="float64", **QUICK).flow


def test_a_conditional_flow(conditional: Flow, tmp_path: Path) -> None:
    x, c = torch.tensor([[2.0, 2.0], [2.0, 2.0]]).double(), torch.tensor([[1.0], [-1.0]]).double()
    with torch.no_grad():
        log_prob = conditional.log_prob(x, c)
        assert float(log_prob[0]) > float(log_prob[1]) + 1  # 2 is where c = 1 sends it
        module = conditional.to_torch({"step_size": 0.02})
        same(module.log_prob(x, c), log_prob, 1e-4)
        z = conditional.encode(x, c)
        same(conditional.decode(z, c), x, 1e-4)
        conditional.save(tmp_path / "flow.safetensors")
        assert torch.equal(pyrnode.load(tmp_path / "flow.safetensors").log_prob(x, c), log_prob)
        export.save(module, tmp_path / "module.safetensors", to="safetensors")
        same(export.load(tmp_path / "module.safetensors").log_prob(x, c), module.log_prob(x, c), 1e-12)


def test_scores_have_their_errors_and_a_distribution(conditional: Flow) -> None:
    x, c = numbers(5, 2), numbers(5, 1, seed=1)
    with torch.no_grad():
        value, error = conditional.log_prob(x, c, divergence="exact", return_error=True)
        estimate, spread = conditional.log_prob(x, c, divergence=Divergence("hutchinson", 16), return_error=True)
        same(value, conditional.log_prob(x, c, divergence="exact"), 1e-6)
        assert bool(((estimate - value).abs() <= 5 * spread + error).all())
        assert float(error.max()) < float(spread.max())
        distribution = conditional.distribution(c[0])
        same(distribution.log_prob(x), conditional.log_prob(x, c[0]), 1e-12)
        assert distribution.sample((3,)).shape == (3, 2)


@pytest.mark.parametrize("hidden", [(5,), (4, 4, 4)])
@pytest.mark.parametrize("time", ["concat", "none"])
@pytest.mark.parametrize("context_dim", [0, CONTEXT])
def test_rates_for_export_are_autograds(hidden: tuple[int, ...], time: str, context_dim: int) -> None:
    dynamics = make(hidden=hidden, time=time, context_dim=context_dim)
    context = numbers(BATCH, CONTEXT, seed=3) if context_dim else None
    z, probes = numbers(BATCH, D), numbers(4, 1, D, seed=1)
    f, div = PotentialRates(dynamics, context)(0.3, z, probes)
    g, other = ModuleRates(dynamics, context)(0.3, z, probes)
    assert div is not None
    assert other is not None
    same(f, g, 1e-13)
    same(div, other, 1e-12)


def test_a_users_potential_in_a_flow_and_its_module() -> None:
    torch.manual_seed(0)
    config = Config().override({"dtype": "float64", "evaluation.solver.rtol": 1e-9, "evaluation.solver.atol": 1e-9})
    flow = Flow.build(config, (D,), dynamics=lambda shape: PotentialDynamics(Phi(), shape).double())
    x = 0.5 * numbers(BATCH, D)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow.encode(v[None])[0], x[0])
    with torch.no_grad():
        normal = -0.5 * (flow.encode(x[:1]).square().sum() + D * math.log(2 * math.pi))
        assert float(flow.log_prob(x[:1])) == pytest.approx(float(normal + torch.linalg.slogdet(jacobian)[1]), abs=1e-6)
        module = flow.to_torch({"step_size": 0.01})
        same(module.log_prob(x), flow.log_prob(x), 1e-7)
    with pytest.raises(ConfigError, match="dynamics of your own"):
        flow.save("nowhere.safetensors")
    result = pyrnode.train(
        np.random.default_rng(0).normal(size=(200, D)),
        dynamics=lambda shape: PotentialDynamics(Phi(), shape),
        hjb=0.1,
        max_steps=2,
        progress=False,
        evaluate=False,
    )
    assert steps(result)[0]["H"] > 0


def test_the_estimator() -> None:
    x = np.random.default_rng(0).normal(3.0, 2.0, size=(200, 2))
    settings: dict[str, Any] = {"hidden": (8, 8), "max_steps": 20, "random_state": 0}
    model = RNODEDensity(network="potential", activation="logcosh", **settings).fit(x)
    assert isinstance(model.flow_.blocks[0].dynamics, Potential)
    assert model.score_samples(x[:3]).shape == (3,)
    with pytest.raises(ConfigError, match="hidden"):
        RNODEDensity(network="potential", hidden=(8, 9)).fit(x)


def test_what_julia_calls_back_has_products_for_unit_vectors_too() -> None:
    """Of what Python evaluates Julia takes no closed trace: from there, the same dynamics give εᵀ∂f/∂z for every ε."""
    dynamics, z0 = make(), numbers(BATCH, D)
    foreign = Foreign(dynamics, z0, None, Probes.exact(z0), total_derivative=False)
    foreign.z.copy_(z0)
    assert foreign.eps is not None
    assert foreign.w is not None
    foreign.eps.copy_(Probes.exact(z0).eps)
    foreign.linearize(0.3, probe=True, tape=True)
    reference = Reference(dynamics, 0.3, z0, None)
    same(foreign.f, reference.f)
    same(foreign.w, reference.products(foreign.eps))
