"""Potentials: every explicit product, trace, norm and residual, and their pullbacks, against autograd in double."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyrnode import ConfigError, Potential, PotentialDynamics
from pyrnode.dynamics import Cotangents, GradientDynamics, ModuleDynamics
from pyrnode.dynamics.nested import BoundModule
from pyrnode.dynamics.scalar import CURVES, curvature, gradient

D, BATCH, CONTEXT = 3, 4, 2

DEPTHS = ((5,), (4, 4), (4, 4, 4, 4))
CASES = [*itertools.product(("logcosh",), DEPTHS, ("concat", "none"), (0, CONTEXT))]
CASES += [("softplus", DEPTHS[2], "concat", CONTEXT), ("tanh", DEPTHS[2], "concat", CONTEXT)]


def make(
    activation: str = "logcosh",
    hidden: tuple[int, ...] = (4, 4),
    time: str = "concat",
    context_dim: int = 0,
    rank: int = 2,
) -> Potential:
    """A potential in double precision whose parameters are all away from zero."""
    made = Potential(D, hidden, activation=activation, time=time, context_dim=context_dim, rank=rank).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator, dtype=torch.double))
    return made


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def inputs(dynamics: GradientDynamics, own_times: bool = False) -> tuple[Any, Tensor, Tensor | None]:
    t = torch.rand(BATCH, generator=torch.Generator().manual_seed(1), dtype=torch.double) if own_times else 0.3
    c = dynamics.embed(numbers(BATCH, CONTEXT, seed=5)).detach() if dynamics.context_dim else None
    return t, numbers(BATCH, D, seed=2), c


def times(t: Any) -> Tensor:
    return t.clone() if isinstance(t, Tensor) else torch.full((BATCH,), t, dtype=torch.double)


class Reference:
    """f, the full Jacobian, its trace and norm, and the Hamilton-Jacobi residual, of Φ alone, by autograd."""

    def __init__(self, dynamics: GradientDynamics, t: Any, z: Tensor, c: Tensor | None) -> None:
        self.z, self.c = z.clone().requires_grad_(), None if c is None else c.clone().requires_grad_()
        time = times(t).requires_grad_()
        phi = dynamics.potential(time, self.z, self.c).sum()
        slope, rise = torch.autograd.grad(phi, (self.z, time), create_graph=True, allow_unused=True)
        assert slope is not None
        rise = torch.zeros_like(time) if rise is None else rise
        self.f, self.hjb = -slope, rise - 0.5 * slope.square().sum(1)
        rows = [torch.autograd.grad(self.f[:, i].sum(), self.z, create_graph=True)[0] for i in range(D)]
        self.jacobian = torch.stack(rows, 1)  # (batch, out, in)
        self.trace = self.jacobian.diagonal(dim1=1, dim2=2).sum(1)
        self.frobenius = self.jacobian.square().sum((1, 2))

    def products(self, eps: Tensor) -> Tensor:
        return torch.einsum("kbi,bij->kbj", eps, self.jacobian)

    def cotangents(self, dynamics: Potential, outputs: list[Tensor], bars: list[Tensor]) -> list[Tensor]:
        leaves = [self.z, *([] if self.c is None else [self.c]), *dynamics.solved_parameters()]
        found = torch.autograd.grad(outputs, leaves, bars, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).detach().abs().max()) <= tolerance * max(1.0, float(expected.detach().abs().max()))


def pulled(bound: Any, linearization: Any, bars: Cotangents) -> list[Tensor]:
    z_bar, c_bar = bound.pullback(linearization, bars)
    return [z_bar, *([] if c_bar is None else [c_bar]), *bound.gradients()]


@pytest.mark.parametrize(("activation", "hidden", "time", "context_dim"), CASES)
@pytest.mark.parametrize(("probes", "own_times"), [(1, False), (2, True)])
def test_products_residual_and_pullback(
    activation: str, hidden: tuple[int, ...], time: str, context_dim: int, probes: int, own_times: bool
) -> None:
    dynamics = make(activation, hidden, time, context_dim)
    t, z, c = inputs(dynamics, own_times)
    eps, reference = numbers(probes, BATCH, D, seed=3), Reference(dynamics, t, z, c)
    f_bar, w_bar, h_bar = numbers(BATCH, D, seed=11), numbers(probes, BATCH, D, seed=12), numbers(BATCH, seed=13)

    bound = dynamics.bind(hjb=True)
    with torch.no_grad():
        at = bound.linearize(t, z, eps, c=c, tape=True)
        found = pulled(bound, at, Cotangents(f_bar, w_bar, hjb=h_bar))
    assert at.w is not None
    assert at.hjb is not None
    same(at.f, reference.f)
    same(at.w, reference.products(eps))
    same(at.hjb, reference.hjb)
    outputs = [reference.f, reference.products(eps), reference.hjb]
    for x, y in zip(found, reference.cotangents(dynamics, outputs, [f_bar, w_bar, h_bar]), strict=True):
        same(x, y)


@pytest.mark.parametrize(("activation", "hidden", "time", "context_dim"), CASES)
@pytest.mark.parametrize("norm", [False, True])
def test_exact_trace_and_norm_and_their_pullback(
    activation: str, hidden: tuple[int, ...], time: str, context_dim: int, norm: bool
) -> None:
    dynamics = make(activation, hidden, time, context_dim)
    t, z, c = inputs(dynamics)
    reference, eps = Reference(dynamics, t, z, c), torch.eye(D, dtype=torch.double)[:, None].expand(D, BATCH, D)
    f_bar, trace_bar, norm_bar = numbers(BATCH, D, seed=11), numbers(BATCH, seed=12), numbers(BATCH, seed=13)

    bound = dynamics.bind(exact=True)
    with torch.no_grad():
        at = bound.linearize(t, z, eps, c=c, tape=True)
        bars = Cotangents(f_bar, trace=trace_bar, frobenius=norm_bar if norm else None)
        found = pulled(bound, at, bars)
        alone = bound.pullback_state(bound.linearize(t, z, eps, c=c, tape=True), bars)
    assert at.w is None
    closed = bound.trace_and_norm(at)
    assert closed is not None
    closed = bound.trace_and_norm(at)
    assert closed is not None
    same(closed[0], reference.trace)
    same(closed[1], reference.frobenius)
    outputs, given = [reference.f, reference.trace], [f_bar, trace_bar]
    if norm:
        outputs, given = [*outputs, reference.frobenius], [*given, norm_bar]
    for x, y in zip(found, reference.cotangents(dynamics, outputs, given), strict=True):
        same(x, y)
    same(alone, found[0], 1e-14)


@pytest.mark.parametrize(("activation", "hidden", "time", "context_dim"), CASES)
def test_f_alone_and_what_is_differentiable_of_itself(
    activation: str, hidden: tuple[int, ...], time: str, context_dim: int
) -> None:
    dynamics = make(activation, hidden, time, context_dim)
    t, z, c = inputs(dynamics)
    reference, f_bar = Reference(dynamics, t, z, c), numbers(BATCH, D, seed=11)
    bound = dynamics.bind(hjb=True, exact=True)
    with torch.no_grad():
        at = bound.linearize(t, z, None, c=c, tape=True)
        found = pulled(bound, at, Cotangents(f_bar))
        alone = bound.pullback_state(bound.linearize(t, z, None, c=c, tape=True), Cotangents(f_bar))
    assert at.w is None
    assert at.hjb is None
    for x, y in zip(found, reference.cotangents(dynamics, [reference.f], [f_bar]), strict=True):
        same(x, y)
    same(alone, found[0], 1e-14)
    same(dynamics.rate(t, z, c), reference.f)
    eps, scalar = numbers(2, 1, D, seed=3), dynamics.scalar()
    w = torch.einsum("ki,bij,kj->b", eps[:, 0], -reference.jacobian, eps[:, 0])
    same(curvature(scalar, gradient(scalar, scalar.point(t, z), c), eps), w)


@pytest.mark.parametrize("curve", CURVES)
def test_derivatives_of_the_curves(curve: str) -> None:
    phi = CURVES[curve]
    a = torch.linspace(-6, 6, 49, dtype=torch.double, requires_grad=True)  # 0 is among them
    root = phi.root(a)
    expected = [phi.value(a, root)]
    for _ in range(3):
        expected.append(torch.autograd.grad(expected[-1].sum(), a, create_graph=True)[0])
    slope = phi.slope(root)
    bend = phi.bend(root, slope)
    for found, derivative in zip((slope, bend, phi.twist(root, slope, bend)), expected[1:], strict=True):
        same(found, derivative, 1e-12)
    if curve == "logcosh":
        same(expected[0], torch.log(2 * torch.cosh(a)), 1e-13)


def test_the_total_derivative_is_nested_autograds() -> None:
    dynamics = make()
    t, z, _ = inputs(dynamics)
    bound = dynamics.bind(total_derivative=True, hjb=True)
    at = bound.linearize(t, z, numbers(1, BATCH, D), tape=True)
    assert isinstance(bound, BoundModule)
    assert at.r is not None
    assert at.hjb is not None
    reference = Reference(dynamics, t, z, None)
    step = 1e-5
    later, earlier = (dynamics(0.3 + s, z + s * reference.f.detach()) for s in (step, -step))
    same(at.r, (later - earlier) / (2 * step), 1e-8)
    same(at.hjb, reference.hjb)


class Phi(nn.Module):
    """A user's own potential, with a context of `features`."""

    def __init__(self, features: int = 0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D + 1 + features, 6), nn.Linear(6, 1)

    def forward(self, t: Tensor, z: Tensor, *c: Tensor) -> Tensor:
        phi: Tensor = self.last(torch.tanh(self.first(torch.cat((z, t[:, None], *c), 1))))[:, 0]
        return phi + 0.25 * z.pow(4).sum(1)


@pytest.mark.parametrize("features", [0, CONTEXT])
@pytest.mark.parametrize("own_times", [False, True])
def test_a_users_potential(features: int, own_times: bool) -> None:
    torch.manual_seed(0)
    dynamics = PotentialDynamics(Phi(features), (D,), features).double()
    t, z, c = inputs(dynamics, own_times)
    reference, eps = Reference(dynamics, t, z, c), numbers(2, BATCH, D, seed=3)
    f_bar, w_bar, h_bar = numbers(BATCH, D, seed=11), numbers(2, BATCH, D, seed=12), numbers(BATCH, seed=13)
    with torch.inference_mode():  # as a caller may be in
        same(dynamics.bind().linearize(t, z, eps, c=c).f, reference.f)
        same(dynamics.rate(t, z, c), reference.f)
    bound = dynamics.bind(hjb=True)
    at = bound.linearize(t, z, eps, c=c, tape=True)
    assert at.w is not None
    assert at.hjb is not None
    same(at.f, reference.f)
    same(at.w, reference.products(eps))
    same(at.hjb, reference.hjb)
    found = pulled(bound, at, Cotangents(f_bar, w_bar, hjb=h_bar))
    outputs = [reference.f, reference.products(eps), reference.hjb]
    for x, y in zip(found, reference.cotangents(dynamics, outputs, [f_bar, w_bar, h_bar]), strict=True):  # type: ignore[arg-type]
        same(x, y)


def test_what_is_no_potential_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gave \(2, 3\) for z of shape \(2, 3\); expected \(2,\)"):
        PotentialDynamics(_Vector(), (D,))
    with pytest.raises(ConfigError, match=r"expected vectors \(d,\).*flatten"):
        PotentialDynamics(Phi(), (1, 4, 4))
    with pytest.raises(ConfigError, match="BatchNorm1d mixes"):
        PotentialDynamics(nn.Sequential(nn.BatchNorm1d(3)), (D,))
    assert not isinstance(ModuleDynamics(_Vector(), (D,)), GradientDynamics)


class _Vector(nn.Module):
    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return z


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": (4, 5)}, r"hidden = \(4, 5\).*one positive width"),
        ({"hidden": ()}, "hidden"),
        ({"activation": "elu"}, "activation of a potential.*'elu'.*logcosh"),
        ({"time": "concatsquash"}, "time of a potential.*concat"),
        ({"rank": 0}, "rank = 0"),
        ({"initial": "zero"}, "initial.*identity"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Potential(D, **settings)


def test_where_it_begins() -> None:
    generator = torch.Generator().manual_seed(0)
    quiet = Potential(D, (8, 8), context_dim=2, generator=generator)
    z = 3 * torch.randn(50, D, generator=generator)
    assert float(quiet(0.4, z, torch.randn(50, 2)).detach().abs().max()) < 1e-4
    z.requires_grad_()
    quiet(0.4, z, torch.randn(50, 2)).square().sum().backward()
    assert all(p is not None and bool(p.grad.any()) for p in (quiet.w, quiet.A, quiet.b) if p.grad is not None)
    theirs = Potential(D, (8, 8), initial="ot-flow", rank=10, generator=generator)
    assert theirs.A.shape == (D + 1, D + 1)
    assert bool((theirs.w == 1).all())
    assert not bool(theirs.b.any())
    assert float(theirs.A.detach().abs().max()) <= (6 / 8) ** 0.5
    again = Potential(D, (8, 8), initial="ot-flow", generator=torch.Generator().manual_seed(3))
    once = Potential(D, (8, 8), initial="ot-flow", generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), once.parameters(), strict=True))
