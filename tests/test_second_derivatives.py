"""Derivatives of derivatives: score matching, Hessians, Jacobian-vector products. Never zero for want of a formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyrnode import Config, Divergence, Flow, ModuleDynamics, Probes, SolverConfig
from pyrnode.engines import Engine

TIGHT = SolverConfig(name="DP8", rtol=1e-10, atol=1e-10)


class Field(nn.Module):
    """Dynamics of a user's own."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim + 1, 8), nn.Tanh(), nn.Linear(8, dim))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        out: Tensor = self.net(torch.cat((z, t[:, None]), 1))
        return out


def build(own: bool = False, shape: tuple[int, ...] = (2,), **settings: Any) -> Flow:
    config = Config().override(
        {"engine": "torch", "dtype": "float64", "flow.network.hidden": [6, 6], "flow.standardize": "none", **settings}
    )
    make = (lambda shape: ModuleDynamics(Field(*shape), shape)) if own else None
    flow = Flow.build(config, shape, dynamics=make)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel())))
    return flow


def hessian_by_differences(f: Any, x: Tensor, h: float = 1e-5) -> Tensor:
    """Of a function ``(2,) -> ()``, from its gradient."""

    def gradient(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(f(x), x)
        return g

    rows = []
    for e in torch.eye(len(x), dtype=x.dtype):
        rows.append((gradient(x + h * e) - gradient(x - h * e)) / (2 * h))
    return torch.stack(rows)


SOLVERS: dict[str, Any] = {
    "RK4": {"name": "RK4", "step_size": 0.25},
    "RK4 stored": {"name": "RK4", "step_size": 0.25, "memory": "store"},
    "RK4 checkpointed": {"name": "RK4", "step_size": 0.25, "memory": "checkpoint"},
    "DP5": {"name": "DP5", "rtol": 1e-8, "atol": 1e-8},
    "Tsit5 backsolved": {"name": "Tsit5", "rtol": 1e-8, "atol": 1e-8, "sensealg": "BacksolveAdjoint"},
}


@pytest.mark.parametrize("own", [False, True], ids=["layers", "module"])
@pytest.mark.parametrize("name", SOLVERS)
def test_hessian_of_the_log_density(name: str, own: bool) -> None:
    if own and name == "RK4 stored":
        pytest.skip("memory = 'store' is for dynamics with an explicit product")
    flow = build(own)
    solver = SolverConfig().changed(SOLVERS[name])

    def log_prob(x: Tensor) -> Tensor:
        return flow.log_prob(x[None], solver=solver).sum()

    x = torch.tensor([0.3, -0.7], dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(log_prob, x)
    assert float(hessian.abs().min()) > 1e-3  # it was all zeros
    assert torch.allclose(hessian, hessian_by_differences(log_prob, x), rtol=0, atol=2e-7)
    module = flow.to_torch({"name": "DP8", "step_size": 0.1})
    exact = torch.autograd.functional.hessian(lambda x: module.log_prob(x[None]).sum(), x)
    assert torch.allclose(hessian, exact, rtol=0, atol=2e-3 if name.startswith("RK4") else 1e-6)


def test_products_and_batches() -> None:
    flow, x = build(), torch.randn(3, 2, dtype=torch.float64)
    v = torch.randn(3, 2, dtype=torch.float64)
    module = flow.to_torch({"name": "DP8", "step_size": 0.1})

    def ours(x: Tensor) -> Tensor:
        return flow.log_prob(x, solver=TIGHT).sum()

    def theirs(x: Tensor) -> Tensor:
        return module.log_prob(x).sum()

    for product in (torch.autograd.functional.hvp, torch.autograd.functional.vhp, torch.autograd.functional.jvp):
        assert torch.allclose(product(ours, x, v)[1], product(theirs, x, v)[1], rtol=0, atol=1e-7), product.__name__
    density = flow.distribution(solver=TIGHT)
    hessian = torch.autograd.functional.hessian(lambda x: density.log_prob(x).sum(), x)
    assert torch.allclose(hessian, torch.autograd.functional.hessian(theirs, x), rtol=0, atol=1e-7)


def test_third_derivative() -> None:
    flow, x = build(), torch.tensor([[0.2, 0.5]], dtype=torch.float64, requires_grad=True)
    module = flow.to_torch({"name": "RK4", "step_size": 0.25})
    found = []
    for log_prob in (lambda x: flow.log_prob(x, solver={"name": "RK4", "step_size": 0.25}), module.log_prob):
        value = log_prob(x).sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(value, x, create_graph=True)
            value = g[0, 0]
        found.append(float(value.detach()))
    assert found[0] == pytest.approx(found[1], abs=1e-9)
    assert abs(found[0]) > 1e-3


def test_a_penalty_on_the_score_reaches_the_parameters() -> None:
    """``g = ∇ log p(x)``, and ``mean ‖g‖²`` in the loss: its share of the gradient was dropped without a word."""
    flow, x = build(), torch.randn(5, 2, dtype=torch.float64)
    module = flow.to_torch({"name": "RK4", "step_size": 0.25})
    gradients = []
    for subject, log_prob in ((flow, lambda x: flow.log_prob(x, solver="RK4")), (module, module.log_prob)):
        y = x.clone().requires_grad_()
        lp = log_prob(y)
        (g,) = torch.autograd.grad(lp.sum(), y, create_graph=True)
        loss = -lp.mean() + 10 * g.square().sum(1).mean()
        gradients.append(torch.cat([p.flatten() for p in torch.autograd.grad(loss, list(subject.parameters()))]))
    assert torch.allclose(*gradients, rtol=0, atol=1e-9)
    (without,) = [torch.autograd.grad(-flow.log_prob(x, solver="RK4").mean(), list(flow.parameters()))]
    assert float((gradients[0] - torch.cat([p.flatten() for p in without])).norm()) > 0.1


@pytest.mark.parametrize("total_derivative", [False, True])
def test_every_integral_is_differentiated_twice(total_derivative: bool) -> None:
    """The gradient's gradient of l, E, n and D, by ``gradgradcheck``."""
    flow = build()
    probes = Probes.draw(torch.zeros(2, 2, dtype=torch.float64), 2, generator=torch.Generator().manual_seed(0))
    solver = SolverConfig(name="RK4", step_size=0.5)

    def integrals(z: Tensor) -> tuple[Tensor, ...]:
        (block,) = flow.blocks
        s = flow.engine.integrate(block.dynamics, z, probes, (0.0, 1.0), solver, total_derivative=total_derivative)
        return s.z, s.l, s.E, s.n, s.D

    z = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(integrals, (z,), atol=1e-6)


def test_images() -> None:
    image = build(shape=(1, 4, 4), **{"flow.network.hidden": [3], "flow.scales": 2, "flow.blocks": 1})
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    v = torch.randn_like(x)
    module = image.to_torch({"name": "RK4", "step_size": 0.25}, divergence="exact")
    ours = torch.autograd.functional.hvp(lambda x: image.log_prob(x, solver="RK4", divergence="exact").sum(), x, v)[1]
    theirs = torch.autograd.functional.hvp(lambda x: module.log_prob(x).sum(), x, v)[1]
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-8)


def test_probed_and_conditional() -> None:
    config = Config().override({"engine": "torch", "dtype": "float64", "flow.network.hidden": [5]})
    flow = Flow.build(config, (3,), context_dim=2)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel())))
    x = torch.randn(2, 3, dtype=torch.float64)
    c = torch.randn(2, 2, dtype=torch.float64)
    (joint,) = torch.autograd.functional.hessian(lambda c: flow.log_prob(x, c, solver="RK4").sum(), (c,))
    module = flow.to_torch({"name": "RK4", "step_size": 0.25})
    (expected,) = torch.autograd.functional.hessian(lambda c: module.log_prob(x, c).sum(), (c,))
    assert torch.allclose(joint[0], expected[0], rtol=0, atol=1e-9)

    noise = torch.Generator().manual_seed(0)
    fixed = Probes.draw(x, 2, generator=noise)

    def estimate(x: Tensor) -> Tensor:
        return flow.solve(x, lambda z: fixed, SolverConfig(), context=flow.condition(c, 2)).log_prob.sum()

    hessian = torch.autograd.functional.hessian(estimate, x)
    assert torch.allclose(hessian, hessian.permute(2, 3, 0, 1), rtol=0, atol=1e-9)  # symmetric, as a Hessian is
    assert float(hessian.abs().max()) > 1e-2
    seeded = torch.autograd.functional.hessian(
        lambda x: flow.log_prob(x, c, divergence=Divergence("hutchinson", 2), solver="RK4").sum(), x
    )
    assert float(seeded.abs().max()) > 1e-2


def test_first_derivatives_are_the_same_with_and_without_a_graph() -> None:
    flow, x = build(), torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(flow.log_prob(x).sum(), [x, *flow.parameters()])
    graphed = torch.autograd.grad(flow.log_prob(x).sum(), [x, *flow.parameters()], create_graph=True)
    for a, b in zip(plain, graphed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.needs_julia
def test_julia_says_that_it_gives_first_derivatives_alone(julia_engine: Engine) -> None:
    from pyrnode.errors import ConfigError

    flow = build()
    flow.engine = julia_engine
    x = torch.zeros(1, 2, dtype=torch.float64)
    with pytest.raises(ConfigError, match="to_torch"):
        torch.autograd.functional.hessian(lambda x: flow.log_prob(x).sum(), x)
