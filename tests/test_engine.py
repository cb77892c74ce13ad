"""The contract of an engine, against closed forms, finite differences and torchdiffeq."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyrnode.config import SolverConfig
from pyrnode.dynamics import MLP, Dynamics, ModuleDynamics
from pyrnode.dynamics.layers import Time
from pyrnode.engines import Engine, Solution, create
from pyrnode.engines.augmented import Augmented
from pyrnode.engines.pytorch import TorchEngine
from pyrnode.engines.runge_kutta import Rate
from pyrnode.errors import ConfigError, EngineUnavailableError, SolverError
from pyrnode.probes import Probes
from pyrnode.solvers import METHODS
from tests.test_dynamics import EVENTS, ConditionalField, Field, make

ENGINES = ["torch", pytest.param("julia", marks=pytest.mark.needs_julia)]
FIXED = [name for name, m in METHODS.items() if not m.adaptive]
ADAPTIVE = [name for name, m in METHODS.items() if m.adaptive]
TIGHT = SolverConfig(name="DP8", rtol=1e-12, atol=1e-12)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return create(request.param)


class Linear(nn.Module):
    """``f(z) = A z``: everything about it has a closed form."""

    def __init__(self, A: Tensor) -> None:
        super().__init__()
        self.A = nn.Parameter(A)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return z @ self.A.T


def exact_gradient(solver: SolverConfig) -> SolverConfig:
    """The gradient of the discrete solve, in both engines."""
    return replace(solver, sensealg="Backprop")


def parts(solution: Solution, *names: str) -> list[Tensor]:
    """Some of a solution's outputs, free of autograd's graph."""
    return [getattr(solution, name).detach() for name in names or ("z", "l", "E", "n")]


def linear_case() -> tuple[Dynamics, Tensor, Tensor]:
    A = torch.tensor([[0.3, -0.9, 0.2], [0.8, -0.2, 0.1], [0.0, 0.4, -0.5]], dtype=torch.double)
    z0 = torch.randn(4, 3, dtype=torch.double)
    return ModuleDynamics(Linear(A), (3,)), A, z0


def solve(engine: Engine, dynamics: Dynamics, z0: Tensor, solver: SolverConfig, **kwargs: bool) -> Solution:
    probes = Probes.draw(z0.detach(), 2, generator=torch.Generator().manual_seed(3))
    return engine.integrate(dynamics, z0, probes, (0.0, 1.0), solver, **kwargs)


def test_linear_dynamics_in_closed_form(engine: Engine) -> None:
    """z(T) = e^A z, l = tr A, n = ‖A‖_F², E = z'ᵀ(∫ e^{Aᵀt} AᵀA e^{At} dt) z', D = ∫ ‖A² z(t)‖²."""
    dynamics, A, z0 = linear_case()
    solution = engine.integrate(dynamics, z0, Probes.exact(z0), (0.0, 1.0), TIGHT, total_derivative=True)
    nodes, weights = (torch.tensor(x) for x in np.polynomial.legendre.leggauss(20))
    paths = [torch.matrix_exp(A * (0.5 * (float(s) + 1))) @ z0.T for s in nodes]
    E = sum(0.5 * w * (A @ z).square().sum(0) for w, z in zip(weights, paths, strict=True))
    D = sum(0.5 * w * (A @ A @ z).square().sum(0) for w, z in zip(weights, paths, strict=True))
    for found, expected in (
        (solution.z, (torch.matrix_exp(A) @ z0.T).T),
        (solution.l, A.trace().expand(4)),
        (solution.E, E),
        (solution.n, A.square().sum().expand(4)),
        (solution.D, D),
    ):
        assert torch.allclose(found, torch.as_tensor(expected), rtol=0, atol=1e-9)


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_hutchinson_is_unbiased(engine: Engine, noise: str) -> None:
    dynamics, A, z0 = linear_case()
    probes = Probes.draw(z0, 20_000, noise=noise, generator=torch.Generator().manual_seed(0))
    solution = engine.integrate(dynamics, z0, probes, (0.0, 1.0), SolverConfig(name="RK4", step_size=1.0))
    eps = probes.eps
    for found, expected, draws in (
        (solution.l, A.trace(), torch.einsum("kbi,ij,kbj->kb", eps, A, eps)),
        (solution.n, A.square().sum(), (eps @ A).square().sum(-1)),
    ):
        error = draws.std(0) / math.sqrt(len(draws))
        assert bool(((found - expected).abs() < 4 * error).all())
        assert float(error.max()) < 0.03


def test_noise_is_held_for_the_whole_solve(engine: Engine) -> None:
    """For linear dynamics l is then εᵀAε exactly, whatever the solver: new noise at each evaluation would differ."""
    dynamics, A, z0 = linear_case()
    probes = Probes.draw(z0, 1, generator=torch.Generator().manual_seed(0))
    for name in ("RK4", "DP5"):
        solution = engine.integrate(dynamics, z0, probes, (0.0, 1.0), SolverConfig(name=name))
        expected = torch.einsum("bi,ij,bj->b", probes.eps[0], A, probes.eps[0])
        assert torch.allclose(solution.l, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", FIXED)
def test_order_of_convergence(engine: Engine, name: str) -> None:
    dynamics, z0 = make("mlp"), torch.randn(4, 3).double()
    exact = solve(engine, dynamics, z0, TIGHT)
    errors = []
    for step in (1 / 16, 1 / 32):
        found = solve(engine, dynamics, z0, SolverConfig(name=name, step_size=step))
        errors.append([float((a - b).norm()) for a, b in zip(parts(found), parts(exact), strict=True)])
    orders = [math.log2(coarse / fine) for coarse, fine in zip(*errors, strict=True)]
    assert orders == pytest.approx([METHODS[name].order] * 4, abs=0.25)


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("tolerance", [1e-5, 1e-8])
def test_adaptive_error_follows_the_tolerance(engine: Engine, name: str, tolerance: float) -> None:
    dynamics, z0 = make("conv", activation="tanh"), torch.randn(4, *EVENTS["conv"]).double()
    exact = solve(engine, dynamics, z0, TIGHT)
    found = solve(engine, dynamics, z0, SolverConfig(name=name, rtol=tolerance, atol=tolerance))
    z_error, l_error = (
        float((a - b).abs().max()) for a, b in zip(parts(found, "z", "l"), parts(exact, "z", "l"), strict=True)
    )
    assert z_error < 20 * tolerance
    assert l_error < 20 * tolerance * exact.z[0].numel() ** 0.5
    assert found.stats.accepted >= 1
    assert found.stats.status == "Success"


@pytest.mark.parametrize(("name", "theirs"), [("Euler", "euler"), ("Midpoint", "midpoint"), ("Heun", "heun2")])
def test_fixed_steps_are_torchdiffeqs(engine: Engine, name: str, theirs: str) -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    dynamics, z0 = make("mlp"), torch.randn(4, 3).double()
    found = solve(engine, dynamics, z0, SolverConfig(name=name, step_size=0.25))
    with torch.no_grad():
        times = torch.tensor([0.0, 1.0]).double()
        expected = torchdiffeq.odeint(
            lambda t, z: dynamics(float(t), z), z0, times, method=theirs, options={"step_size": 0.25}
        )
    assert torch.allclose(found.z, expected[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "theirs"), [("BS3", "bosh3"), ("DP5", "dopri5"), ("DP8", "dopri8")])
def test_adaptive_agree_with_torchdiffeq(engine: Engine, name: str, theirs: str) -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    dynamics, z0 = make("mlp"), torch.randn(4, 3).double()
    found = solve(engine, dynamics, z0, SolverConfig(name=name, rtol=1e-9, atol=1e-9))
    with torch.no_grad():
        times = torch.tensor([0.0, 1.0]).double()
        expected = torchdiffeq.odeint(
            lambda t, z: dynamics(float(t), z), z0, times, method=theirs, rtol=1e-10, atol=1e-10
        )
    assert torch.allclose(found.z, expected[-1], rtol=0, atol=1e-8)


def test_penalties_in_error_control_only_when_asked(engine: Engine) -> None:
    dynamics, z0 = make("mlp"), 6 * torch.randn(40, 3).double()  # where n bends more than the state does
    loose = SolverConfig(name="BS3", rtol=1e-3, atol=1e-6)
    density, everything, exact = (
        solve(engine, dynamics, z0, solver) for solver in (loose, replace(loose, error_control="all"), TIGHT)
    )
    assert everything.stats.nfe > density.stats.nfe
    (true,) = parts(exact, "n")
    errors = [float((parts(solution, "n")[0] / true - 1).abs().mean()) for solution in (density, everything)]
    assert errors[1] < 0.75 * errors[0]


def weighted_loss(solution: Solution) -> Tensor:
    """A scalar in which every output takes part."""
    batch = torch.arange(1.0, len(solution.l) + 1, dtype=solution.l.dtype)
    parts = (
        solution.z.sin().flatten(1).sum(1),
        -1.3 * solution.l,
        0.7 * solution.E,
        0.4 * solution.n,
        0.2 * solution.D,
    )
    return (torch.stack(parts) * batch).sum()


GRADIENTS = [
    *(
        SolverConfig(name=name, memory=memory, sensealg="Backprop")  # type: ignore[arg-type]
        for name in FIXED
        for memory in ("store", "checkpoint")
    ),
    *(SolverConfig(name=name, rtol=1e-8, atol=1e-8, sensealg="Backprop") for name in ADAPTIVE),
    SolverConfig(name="RK4", step_size=0.02, sensealg="BacksolveAdjoint"),
    SolverConfig(name="Tsit5", rtol=1e-9, atol=1e-9, sensealg="BacksolveAdjoint"),
]


@pytest.mark.parametrize("solver", GRADIENTS, ids=lambda s: f"{s.name}-{s.sensealg}-{s.memory}")
@pytest.mark.parametrize("kind", [*EVENTS, "module", "total"])
def test_gradients_are_finite_differences(engine: Engine, kind: str, solver: SolverConfig) -> None:
    if solver.memory == "store" and kind in ("module", "total"):
        solver = replace(solver, memory="auto")  # refused: test_storing_needs_an_explicit_product
    total = kind == "total"
    dynamics = ModuleDynamics(Field().double(), (3,)) if kind == "module" else make("mlp" if total else kind)
    z0 = torch.randn(3, *dynamics.event_shape, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    weighted_loss(solve(engine, dynamics, z0, solver, total_derivative=total)).backward()
    generator = torch.Generator().manual_seed(2)
    for variable in (z0, *dynamics.parameters()):
        direction = torch.randn(variable.shape, generator=generator, dtype=torch.double)
        assert variable.grad is not None
        slope = float((variable.grad * direction).sum())
        values = []
        for shift in (-2e-5, 4e-5):
            with torch.no_grad():
                variable.add_(direction, alpha=shift)
                values.append(float(weighted_loss(solve(engine, dynamics, z0, solver, total_derivative=total))))
        with torch.no_grad():
            variable.add_(direction, alpha=-2e-5)
        difference = (values[1] - values[0]) / 4e-5
        assert slope == pytest.approx(difference, rel=1e-6, abs=1e-6)


CONDITIONAL = [
    SolverConfig(memory="store", sensealg="Backprop"),
    SolverConfig(memory="checkpoint", sensealg="Backprop"),
    SolverConfig(name="Tsit5", rtol=1e-8, atol=1e-8, sensealg="Backprop"),
    SolverConfig(name="RK4", step_size=0.02, sensealg="BacksolveAdjoint"),
    SolverConfig(name="Tsit5", rtol=1e-9, atol=1e-9, sensealg="BacksolveAdjoint"),
]


@pytest.mark.parametrize("solver", CONDITIONAL, ids=lambda s: f"{s.name}-{s.sensealg}-{s.memory}")
@pytest.mark.parametrize(
    "case", ["mlp-concat", "mlp-concatsquash", "conv-none", "conv-concatsquash", "module", "total"]
)
def test_conditional_gradients_are_finite_differences(engine: Engine, case: str, solver: SolverConfig) -> None:
    """Of the context, the start state and every parameter, those that embed the context among them."""
    kind, _, time = case.partition("-")
    total = kind == "total"
    if solver.memory == "store" and kind in ("module", "total"):
        solver = replace(solver, memory="auto")
    dynamics: Dynamics
    if kind == "module":
        dynamics = ModuleDynamics(ConditionalField().double(), (3,), context_dim=2)
    else:
        dynamics = make("mlp" if total else kind, time or "concat", context_dim=2)
    generator = torch.Generator().manual_seed(1)
    z0 = torch.randn(3, *dynamics.event_shape, generator=generator).double().requires_grad_()
    context = torch.randn(3, 2, generator=generator).double().requires_grad_()
    probes = Probes.draw(z0.detach(), 2, generator=generator)

    def loss() -> Tensor:
        return weighted_loss(
            engine.integrate(dynamics, z0, probes, (0.0, 1.0), solver, context=context, total_derivative=total)
        )

    loss().backward()
    for variable in (context, z0, *dynamics.parameters()):
        direction = torch.randn(variable.shape, generator=generator, dtype=torch.double)
        assert variable.grad is not None
        slope = float((variable.grad * direction).sum())
        values = []
        for shift in (-2e-5, 4e-5):
            with torch.no_grad():
                variable.add_(direction, alpha=shift)
                values.append(float(loss()))
        with torch.no_grad():
            variable.add_(direction, alpha=-2e-5)
        assert slope == pytest.approx((values[1] - values[0]) / 4e-5, rel=1e-6, abs=1e-6)


def test_every_sample_has_its_own_context(engine: Engine) -> None:
    dynamics = make("mlp", context_dim=2)
    z0, context = torch.randn(1, 3).double().expand(4, 3), torch.randn(4, 2).double()
    solver = SolverConfig(name="DP5", rtol=1e-8, atol=1e-8)
    together = engine.integrate(dynamics, z0, Probes.exact(z0), (0.0, 1.0), solver, context=context)
    for i in range(4):
        own = slice(i, i + 1)
        alone = engine.integrate(dynamics, z0[own], Probes.exact(z0[own]), (0.0, 1.0), solver, context=context[own])
        for shared, single in zip(parts(together), parts(alone), strict=True):
            assert torch.allclose(shared[own], single, rtol=1e-12, atol=1e-12)
    assert float((parts(together, "l")[0][:2].diff()).abs()) > 1e-3


def test_context_that_does_not_fit_is_refused(engine: Engine) -> None:
    z0, context = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    solver, span = SolverConfig(), (0.0, 1.0)
    with pytest.raises(ConfigError, match=r"context of shape None: expected \(4, 2\)"):
        engine.integrate(make("mlp", context_dim=2), z0, None, span, solver)
    with pytest.raises(ConfigError, match=r"context of shape \(3, 2\): expected \(4, 2\)"):
        engine.integrate(make("mlp", context_dim=2), z0, None, span, solver, context=context[:3])
    with pytest.raises(ConfigError, match=r"context of shape \(4, 2\): expected None"):
        engine.integrate(make("mlp"), z0, None, span, solver, context=context)


def test_stored_and_recomputed_intermediates_give_the_same_gradient(engine: Engine) -> None:
    gradients = []
    for memory in ("store", "checkpoint"):
        dynamics, z0 = make("conv"), torch.ones(2, *EVENTS["conv"]).double()
        solver = exact_gradient(SolverConfig(memory=memory))  # type: ignore[arg-type]
        weighted_loss(solve(engine, dynamics, z0, solver)).backward()
        gradients.append([p.grad for p in dynamics.parameters()])
    for stored, recomputed in zip(*gradients, strict=True):
        assert torch.allclose(stored, recomputed, rtol=1e-12, atol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_result_does_not_depend_on_batch_mates(engine: Engine, name: str) -> None:
    dynamics = ModuleDynamics(Explosive(), (3,))  # the closer to 1 a sample starts, the harder it is
    z0 = torch.linspace(0.05, 0.99, 6).double()[:, None].expand(6, 3).contiguous()
    solver = SolverConfig(name=name)
    probes = Probes.draw(z0, 1, generator=torch.Generator().manual_seed(3))
    together = engine.integrate(dynamics, z0, probes, (0.0, 1.0), solver)
    alone = engine.integrate(dynamics, z0[:1], Probes(probes.eps[:, :1], 1.0), (0.0, 1.0), solver)
    for shared, own in zip(parts(together), parts(alone), strict=True):
        assert torch.allclose(shared[:1], own, rtol=1e-12, atol=1e-12)
    assert together.stats.nfe_max > alone.stats.nfe_max


@pytest.mark.parametrize("name", ["BS3", "DP5", "Tsit5", "DP8"])
def test_products_are_made_where_a_step_stands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With many probes at the stages of accepted steps that have a weight, and nowhere else; the result is the same."""
    dynamics, z0 = make("conv"), 4 * torch.randn(6, *EVENTS["conv"]).double()
    solver = SolverConfig(name=name, rtol=1e-7, atol=1e-7)
    tableau = METHODS[name].tableau
    weights = [row for row in (tableau.b, tableau.e, tableau.e3) if row is not None]
    weighted = sum(any(i < len(row) and row[i] for row in weights) for i in range(1, len(tableau.b))) + 1
    made, rate = 0, Augmented.rate

    def counted(self: Augmented, t: Time, z: Tensor, rows: Tensor | None) -> Rate:
        nonlocal made
        made += len(z)
        return rate(self, t, z, rows)

    monkeypatch.setattr(Augmented, "rate", counted)
    found = []
    for apart in (True, False):
        monkeypatch.setattr(Augmented, "apart", apart)
        made = 0
        with torch.no_grad():
            solution = TorchEngine().integrate(dynamics, z0, Probes.exact(z0), (0.0, 1.0), solver)
        accepted, all_of_them = (
            len(z0) * (1 + weighted * steps)
            for steps in (solution.stats.accepted, solution.stats.accepted + solution.stats.rejected)
        )
        if apart:  # of a step that the integrals alone reject they were made
            assert accepted - 1e-6 < made < all_of_them
        else:
            assert made == pytest.approx(all_of_them)
        found.append(solution)
    assert found[0].stats == found[1].stats
    assert found[0].stats.rejected > 0
    for both in zip(*map(parts, found), strict=True):
        assert torch.allclose(*both, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", [SolverConfig(step_size=0.05), SolverConfig(name="DP5", rtol=1e-9, atol=1e-9)])
def test_backward_in_time_undoes_forward(engine: Engine, solver: SolverConfig) -> None:
    dynamics, z0 = make("mlp"), torch.randn(4, 3).double()
    forward = solve(engine, dynamics, z0, solver)
    probes = Probes.draw(z0, 2, generator=torch.Generator().manual_seed(3))
    back = engine.integrate(dynamics, forward.z.detach(), probes, (1.0, 0.0), solver)
    assert torch.allclose(back.z, z0, rtol=0, atol=1e-6)
    assert torch.allclose(back.l, -forward.l, rtol=0, atol=1e-6)


def test_evaluations_are_counted(engine: Engine) -> None:
    calls = 0

    class Counted(Linear):
        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return super().forward(t, z)

    dynamics = ModuleDynamics(Counted(torch.eye(3, dtype=torch.double)), (3,))
    z0 = torch.ones(1, 3).double()
    for solver in (SolverConfig(step_size=0.3), SolverConfig(name="DP5")):
        solver = exact_gradient(solver)
        calls = 0
        solution = solve(engine, dynamics, z0, solver)
        assert solution.stats.nfe == solution.stats.nfe_max == calls
        calls = 0
        solution.z.sum().backward()
        assert solution.stats.nfe_backward == calls


def test_last_fixed_step_is_shortened(engine: Engine) -> None:
    dynamics, A, z0 = linear_case()
    found = solve(engine, dynamics, z0, SolverConfig(name="Euler", step_size=0.4))
    identity = torch.eye(3).double()
    expected = z0 @ ((identity + 0.2 * A) @ (identity + 0.4 * A) @ (identity + 0.4 * A)).T
    assert torch.allclose(found.z, expected, rtol=0, atol=1e-12)


class Explosive(nn.Module):
    """``z' = z²``: reaches infinity at t = 1/z(0)."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return z * z


@pytest.mark.parametrize(
    ("solver", "statuses", "message"),
    [
        (SolverConfig(step_size=0.1), ["Unstable"], r"not finite after step \d+ of 10 \(RK4, t = .* in 1 of 2 samples"),
        (
            SolverConfig(name="DP5"),
            ["DtLessThanMin", "Unstable"],
            r"1 of 2 samples stopped before the end time \(first at t = 0.1",
        ),
        (SolverConfig(name="DP5", maxiters=3), ["MaxIters"], r"maxiters = 3 steps did not suffice"),
    ],
)
def test_failure_has_a_name(engine: Engine, solver: SolverConfig, statuses: list[str], message: str) -> None:
    dynamics = ModuleDynamics(Explosive(), (1,))
    with pytest.raises(SolverError, match=message) as failure:
        engine.integrate(dynamics, torch.tensor([[10.0], [0.1]]), None, (0.0, 1.0), solver)
    assert failure.value.status in statuses


def test_non_finite_start(engine: Engine) -> None:
    dynamics = ModuleDynamics(Explosive(), (1,))
    with pytest.raises(SolverError, match=r"not finite at t = 0 for 1 of 2 samples") as failure:
        engine.integrate(dynamics, torch.tensor([[1e30], [0.1]]), None, (0.0, 1.0), SolverConfig(name="DP5"))
    assert failure.value.status == "Unstable"


LACKS: dict[str, list[tuple[SolverConfig, type[Exception], str]]] = {
    "torch": [
        (SolverConfig(name="RK45"), EngineUnavailableError, "unknown solver .* 'RK45'.*known: .*RK4"),
        (SolverConfig(sensealg="Backprob"), EngineUnavailableError, "did you mean 'Backprop'"),
        (SolverConfig(name="DP5", memory="store"), ConfigError, "needs a fixed-step solver"),
        (SolverConfig(options={"lazy": False}), ConfigError, "have none"),
        (SolverConfig(step_size="auto"), ConfigError, "resolved by training"),
    ],
    "julia": [
        (SolverConfig(name="RK45"), EngineUnavailableError, "unknown solver .* 'RK45'.*`pyrnode solvers` lists them"),
        (SolverConfig(sensealg="Backprob"), EngineUnavailableError, "did you mean 'Backprop'"),
        (SolverConfig(name="DP5", memory="store"), ConfigError, "needs a fixed-step solver"),
        (SolverConfig(options={"lazy": False}), ConfigError, r"options given \(lazy\); its options are"),
        (SolverConfig(step_size="auto"), ConfigError, "resolved by training"),
    ],
}


@pytest.mark.parametrize("case", range(5))
def test_what_the_engine_lacks(engine: Engine, case: int) -> None:
    solver, error, message = LACKS[engine.name][case]
    with pytest.raises(error, match=message):
        engine.integrate(MLP(2), torch.zeros(1, 2), None, (0.0, 1.0), solver)


@pytest.mark.parametrize("memory", ["auto", "checkpoint"])
@pytest.mark.parametrize(
    ("state", "eps", "message"),
    [
        ((5, 4), (1, 5, 4), r"state of shape \(5, 4\): expected \(batch, 3\)"),
        ((5, 3, 1), (1, 5, 3, 1), r"state of shape \(5, 3, 1\): expected \(batch, 3\)"),
        ((5, 3), (1, 4, 3), r"probes \(1, 4, 3\) .* expected \(k, 5, 3\)"),
        ((5, 3), (5, 3), r"probes \(5, 3\) .* expected \(k, 5, 3\)"),
    ],
)
def test_what_does_not_fit_the_dynamics(engine: Engine, state: Any, eps: Any, message: str, memory: Any) -> None:
    probes, solver = Probes(torch.ones(eps), 1.0), SolverConfig(memory=memory)
    with pytest.raises(ConfigError, match=message):
        engine.integrate(MLP(3), torch.zeros(state), probes, (0.0, 1.0), solver)
    if eps == (1, 5, 4):
        with pytest.raises(ConfigError, match=r"of torch.float64 .* of torch.float32"):
            engine.integrate(MLP(4), torch.zeros(state), Probes(probes.eps.double(), 1.0), (0.0, 1.0), solver)


@pytest.mark.parametrize("name", ["RK4", "DP5"])
@pytest.mark.parametrize("kind", [*EVENTS, "module"])
def test_an_empty_batch(engine: Engine, kind: str, name: str) -> None:
    dynamics = ModuleDynamics(Field().double(), (3,)) if kind == "module" else make(kind)
    z0 = torch.zeros(0, *dynamics.event_shape).double().requires_grad_()
    for probes in (None, Probes(z0.detach()[None], 1.0)):
        solution = engine.integrate(dynamics, z0, probes, (0.0, 1.0), SolverConfig(name=name))
        assert solution.z.shape == z0.shape
        assert [x.shape for x in (solution.l, solution.E, solution.n, solution.D)] == [(0,)] * 4
        (solution.z.sum() + solution.l.sum()).backward()
        assert z0.grad is not None
        assert z0.grad.shape == z0.shape
        for p in dynamics.parameters():
            assert p.grad is not None
            assert not p.grad.any()


def test_storing_needs_an_explicit_product(engine: Engine) -> None:
    dynamics, solver = ModuleDynamics(Field(), (3,)), SolverConfig(memory="store", sensealg="Backprop")
    with pytest.raises(ConfigError, match="explicit product"):
        engine.integrate(dynamics, torch.zeros(1, 3), None, (0.0, 1.0), solver)


@pytest.mark.parametrize(
    "solver",
    [
        SolverConfig(),
        SolverConfig(sensealg="Backprop"),
        SolverConfig(memory="store", sensealg="Backprop"),
        SolverConfig(memory="checkpoint", sensealg="Backprop"),
        SolverConfig(name="DP5"),
    ],
)
def test_second_backward_gives_the_same(engine: Engine, solver: SolverConfig) -> None:
    dynamics = make("mlp")
    loss = weighted_loss(solve(engine, dynamics, torch.ones(2, 3).double(), solver))
    first = torch.autograd.grad(loss, list(dynamics.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(dynamics.parameters()))
    for a, b in zip(first, second, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "solver", [SolverConfig(), SolverConfig(name="DP5"), SolverConfig(sensealg="BacksolveAdjoint")]
)
def test_solve_is_freed_with_its_graph(engine: Engine, solver: SolverConfig) -> None:
    """A reference cycle through autograd's graph would keep each step's tensors until the collector happens to run."""
    ways = ("_Solve", "Checkpointed", "Stored", "BacksolveAdjoint", "Fused")  # of both engines
    gc.collect()
    gc.disable()
    try:
        loss = weighted_loss(solve(engine, make("mlp"), torch.ones(2, 3).double(), solver))
        loss.backward()
        kept = [weakref.ref(o) for o in gc.get_objects() if type(o).__name__ in ways]
        assert len(kept) == 1
        del loss
        assert kept[0]() is None
    finally:
        gc.enable()


def test_pieces_of_a_batch_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large batches go through in pieces; the result and the gradient must not notice."""
    results = []
    for piece in (2**30, 1):
        monkeypatch.setattr("pyrnode.engines.augmented._PIECE", piece)
        for solver in (SolverConfig(memory="checkpoint"), SolverConfig(name="Tsit5")):
            dynamics, z0 = (
                make("conv"),
                torch.randn(5, *EVENTS["conv"], generator=torch.Generator().manual_seed(1)).double(),
            )
            solution = solve(create("torch"), dynamics, z0, solver)
            weighted_loss(solution).backward()
            results.append([*parts(solution), *(p.grad for p in dynamics.parameters())])
    for whole, pieces in zip(results[0] + results[1], results[2] + results[3], strict=True):
        assert torch.allclose(whole, pieces, rtol=1e-10, atol=1e-10)


def test_parameter_changed_before_backward(engine: Engine) -> None:
    dynamics = make("mlp")
    loss = solve(engine, dynamics, torch.ones(2, 3).double(), SolverConfig()).z.sum()
    with torch.no_grad():
        next(dynamics.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_unknown_engine() -> None:
    with pytest.raises(ConfigError, match="unknown engine 'jax'; known: auto, julia, torch"):
        create("jax")
