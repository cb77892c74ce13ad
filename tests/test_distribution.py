"""The flow among torch.distributions: against closed forms, autograd's Jacobian, quadrature and finite differences."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import (
    AffineTransform,
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
)
from torch.distributions import kl_divergence as torch_kl

from pyrnode.config import Config, Divergence
from pyrnode.distribution import FlowDistribution, FlowTransform, kl_divergence
from pyrnode.dynamics import MLP
from pyrnode.errors import ConfigError, DataError
from pyrnode.export import to_torch
from pyrnode.flow import Flow
from tests.test_flow import FLOWS, build, data_for

MATRIX = torch.tensor([[0.3, -0.8], [0.5, -0.4]], dtype=torch.double)
QUICK = ["vector", "vector, own module", "images, one scale"]


def linear(matrix: Tensor = MATRIX) -> Flow:
    """``z' = A z`` as the built-in network without a hidden layer."""
    config = Config().override(
        {"dtype": "float64", "flow.standardize": "none", "evaluation.solver": {"rtol": 1e-9, "atol": 1e-9}}
    )
    flow = Flow.build(config, (2,), dynamics=lambda shape: MLP(shape[0], (), time="none"))
    with torch.no_grad():
        layer = flow.blocks[0].dynamics.layers[0]
        layer.weight.copy_(matrix)
    return flow


def gaussian(matrix: Tensor = MATRIX, scale: float = 1.0) -> MultivariateNormal:
    """The density of x where ``exp(A) x`` is normal with standard deviation `scale`."""
    encode = torch.linalg.matrix_exp(matrix)
    return MultivariateNormal(torch.zeros(2).double(), precision_matrix=encode.T @ encode / scale**2)


def base(d: int, scale: float = 1.0) -> Independent:
    return Independent(Normal(torch.zeros(d).double(), scale * torch.ones(d).double()), 1)


def error(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).abs().max())


# -- Distribution ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exported", [False, True])
def test_linear_flow_is_a_gaussian(exported: bool) -> None:
    flow = to_torch(linear(), {"step_size": 0.02}) if exported else linear()
    density, truth = FlowDistribution(flow), gaussian()
    x = truth.sample((7,))
    assert error(density.log_prob(x), truth.log_prob(x)) < 1e-8
    torch.manual_seed(0)
    samples = density.sample((20000,))
    assert not samples.requires_grad
    assert error(samples.T.cov(), truth.covariance_matrix) < 0.06  # three standard errors


@pytest.mark.parametrize("name", QUICK)
def test_shapes_and_log_prob(name: str) -> None:
    flow = FLOWS[name]()
    density, x = FlowDistribution(flow), data_for(flow, 6)
    assert density.event_shape == flow.event_shape
    assert density.batch_shape == ()
    assert error(density.log_prob(x), flow.log_prob(x)) < 1e-12
    assert error(density.log_prob(x.reshape(3, 2, *flow.event_shape)), flow.log_prob(x).reshape(3, 2)) < 1e-12
    assert density.log_prob(x[0]).shape == ()
    assert density.rsample().shape == flow.event_shape
    assert density.sample((2, 3)).shape == (2, 3, *flow.event_shape)
    assert density.sample((0,)).shape == (0, *flow.event_shape)
    assert density.log_prob(density.sample((0,))).shape == (0,)
    wide = density.expand((4, 1))
    assert (wide.batch_shape, wide.event_shape) == ((4, 1), density.event_shape)
    assert wide.rsample((5,)).shape == (5, 4, 1, *flow.event_shape)
    assert wide.log_prob(x[0]).shape == (4, 1)
    assert error(wide.log_prob(x[:4].unsqueeze(1)), flow.log_prob(x[:4])[:, None]) < 1e-12
    assert wide.expand((2, 4, 1)).sample().shape == (2, 4, 1, *flow.event_shape)
    assert repr(wide) == f"FlowDistribution(event_shape={flow.event_shape}, batch_shape=(4, 1))"


def test_seeds_of_estimates_are_those_of_the_flow() -> None:
    flow = FLOWS["vector"]()
    x = data_for(flow, 3)
    divergence = Divergence("hutchinson", 2, 5)
    density = FlowDistribution(flow, divergence=divergence)
    assert error(density.log_prob(x), flow.log_prob(x, divergence=divergence)) < 1e-12


def test_samples_follow_the_global_generator() -> None:
    flow = FLOWS["vector"]()
    density = FlowDistribution(flow)
    torch.manual_seed(3)
    first = density.sample((4,))
    torch.manual_seed(3)
    assert torch.equal(first, density.sample((4,)))
    torch.manual_seed(3)
    z = torch.randn(4, 3, dtype=torch.double)
    assert error(flow.encode(first), z) < 1e-7


@pytest.mark.parametrize("exported", [False, True])
def test_rsample_is_reparameterised(exported: bool) -> None:
    """The gradient of ``E ‖x‖²`` for the parameters, against finite differences with the same noise."""
    flow = build((2,), evaluation__solver={"rtol": 1e-10, "atol": 1e-10})
    subject = to_torch(flow, {"step_size": 0.1}) if exported else flow
    density, parameters = FlowDistribution(subject), list(subject.parameters())

    def value() -> Tensor:
        torch.manual_seed(1)
        return density.rsample((8,)).square().sum(-1).mean()

    gradients = torch.autograd.grad(value(), parameters)
    directions = [torch.randn_like(p) for p in parameters]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    values = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for p, d in zip(parameters, directions, strict=True):
                p.add_(step * d)
            values.append(float(value()))
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)


def test_the_distribution_is_the_flow_itself() -> None:
    flow = linear()
    density, x = FlowDistribution(flow), torch.randn(3, 2).double()
    (-density.log_prob(x).mean()).backward()
    weight = flow.blocks[0].dynamics.layers[0].weight
    assert weight.grad is not None
    other = MATRIX.clone().requires_grad_()
    encode = torch.linalg.matrix_exp(other)
    loss = 0.5 * (x @ encode.T).square().sum(1).mean() - other.trace()
    (expected,) = torch.autograd.grad(loss, other)
    assert error(weight.grad, expected) < 1e-8
    with torch.no_grad():
        weight.zero_()
    assert error(density.log_prob(x), base(2).log_prob(x)) < 1e-9


# -- with torch's own ------------------------------------------------------------------------------------------------


def test_mixture_independent_and_transformed() -> None:
    flow = FLOWS["vector"]()
    density, x = FlowDistribution(flow), data_for(flow, 5)
    want = flow.log_prob(x).detach()
    mixture = MixtureSameFamily(Categorical(logits=torch.randn(3).double()), density.expand((3,)))
    assert error(mixture.log_prob(x), want) < 1e-12
    assert mixture.sample((2,)).shape == (2, 3)
    joint = Independent(density.expand((5,)), 1)
    assert float(joint.log_prob(x).detach()) == pytest.approx(float(want.sum()), abs=1e-10)
    scale = torch.tensor([2.0, 0.5, 3.0]).double()
    moved = TransformedDistribution(density, [AffineTransform(1.0, scale, event_dim=1)])
    assert moved.event_shape == (3,)
    assert error(moved.log_prob(1 + scale * x), want - scale.log().sum()) < 1e-10
    assert moved.rsample((4,)).shape == (4, 3)


def test_kl_divergence_by_monte_carlo() -> None:
    density, truth = FlowDistribution(linear()), gaussian()
    other = MultivariateNormal(torch.tensor([0.5, 0.0]).double(), torch.eye(2).double())
    assert float(torch_kl(density, truth).detach().abs()) < 1e-8
    state = torch.get_rng_state()
    for p, q, exact in ((density, other, torch_kl(truth, other)), (other, density, torch_kl(other, truth))):
        estimate, spread = kl_divergence(p, q)
        assert abs(float(estimate.detach() - exact)) < 4 * float(spread)
        assert 0.002 < float(spread) < 0.05
        assert torch.equal(torch_kl(p, q), estimate)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch_kl(density.expand((3,)), other.expand((3,))).shape == (3,)
    assert float(torch_kl(density, density).detach()) == 0
    first, second = (kl_divergence(density, other, samples=100, seed=s)[0] for s in (1, 2))
    assert float(first.detach()) != float(second.detach())


def test_kl_divergence_has_the_exact_gradient() -> None:
    """``KL(flow ‖ N(0, I))`` for ``exp(A) x`` normal: ½(tr exp(−A) exp(−A)ᵀ − d) + tr A."""
    flow = linear()
    weight = flow.blocks[0].dynamics.layers[0].weight
    (gradient,) = torch.autograd.grad(kl_divergence(FlowDistribution(flow), base(2), samples=40000)[0], weight)
    matrix = MATRIX.clone().requires_grad_()
    decode = torch.linalg.matrix_exp(-matrix)
    (exact,) = torch.autograd.grad(0.5 * decode.square().sum() + matrix.trace(), matrix)
    assert error(gradient, exact) < 0.05


def test_validation_is_left_as_it_is() -> None:
    before = Distribution._validate_args
    flow = FLOWS["images, one scale"]()
    x = data_for(flow, 2)
    checked, unchecked = FlowDistribution(flow, validate_args=True), FlowDistribution(flow, validate_args=False)
    assert torch.equal(checked.log_prob(x), unchecked.log_prob(x))
    assert not bool(checked.support.check(x + 17).any())
    assert bool(checked.support.check(x).all())
    with pytest.raises(ValueError, match="within the support"):
        checked.log_prob(x + 17)
    assert checked.expand((2,))._validate_args is True
    assert unchecked.expand((2,))._validate_args is False
    assert Distribution._validate_args is before
    assert not checked.has_enumerate_support


# -- Transform -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("cache", [0, 1])
def test_transformed_normals_are_gaussian(scale: float, cache: int) -> None:
    transform = FlowTransform(linear(), cache_size=cache)
    density, truth = TransformedDistribution(base(2, scale), transform), gaussian(scale=scale)
    x = truth.sample((6,))
    assert error(density.log_prob(x), truth.log_prob(x)) < 1e-8
    assert density.log_prob(density.rsample((3,))).shape == (3,)
    assert density.expand((4,)).sample().shape == (4, 2)


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("exported", [False, True])
def test_transform(name: str, exported: bool) -> None:
    flow = FLOWS[name]()
    transform = FlowTransform(to_torch(flow, {"step_size": 0.05}) if exported else flow)
    z = 0.5 * torch.randn(1, flow.dim, generator=torch.Generator().manual_seed(1)).double()
    x = transform(z)
    assert x.shape == (1, *flow.event_shape)
    assert error(transform.inv(x), z) < 1e-6
    full = torch.autograd.functional.jacobian(transform, z).reshape(flow.dim, flow.dim)
    exact = torch.linalg.slogdet(full)[1]
    assert float(transform.log_abs_det_jacobian(z, x).detach()) == pytest.approx(float(exact), abs=2e-6)
    assert float(transform.inv.log_abs_det_jacobian(x, z).detach()) == pytest.approx(-float(exact), abs=2e-6)
    assert transform.bijective
    assert (transform.domain.event_dim, transform.codomain.event_dim) == (1, len(flow.event_shape))
    assert bool(transform.codomain.check(x).all())
    assert transform.forward_shape((5, flow.dim)) == (5, *flow.event_shape)
    assert transform.inverse_shape((5, *flow.event_shape)) == (5, flow.dim)
    density = TransformedDistribution(base(flow.dim), transform)
    value = data_for(flow, 3)
    assert density.event_shape == flow.event_shape
    assert error(density.log_prob(value), flow.log_prob(value)) < 1e-4
    pulled = TransformedDistribution(density, transform.inv)
    assert error(pulled.log_prob(z), base(flow.dim).log_prob(z)) < 1e-5


def test_cache_saves_solves(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = linear()
    calls: list[int] = []
    solve = flow.solve

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return solve(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(flow, "solve", counted)
    x = torch.randn(3, 2).double()
    for size, solves in ((0, 2), (1, 1)):
        calls.clear()
        density = TransformedDistribution(base(2), FlowTransform(flow).with_cache(size))
        assert error(density.log_prob(x), gaussian().log_prob(x)) < 1e-8
        assert len(calls) == solves
    transform = FlowTransform(flow)
    assert transform.with_cache(0) is transform
    assert transform.with_cache(1) == transform
    assert transform != FlowTransform(flow)
    with pytest.raises(ValueError, match="cache_size must be 0 or 1"):
        FlowTransform(flow, cache_size=2)


def test_copies_and_pickles() -> None:
    module = to_torch(linear(), {"step_size": 0.1})
    density, x = FlowDistribution(module), torch.randn(3, 2).double()
    for twin in (copy.deepcopy(density), pickle.loads(pickle.dumps(density))):
        assert torch.equal(twin.log_prob(x), density.log_prob(x))


# -- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input() -> None:
    flow = FLOWS["vector"]()
    density, transform = FlowDistribution(flow), FlowTransform(flow)
    with pytest.raises(DataError, match=r"values of shape \(4, 2\): expected \(\.\.\., 3\)"):
        density.log_prob(torch.randn(4, 2))
    with pytest.raises(DataError, match=r"values of shape list"):
        density.log_prob([1.0])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="first in sample 0"):
        FlowDistribution(flow, validate_args=False).log_prob(torch.full((1, 3), float("nan")))
    with pytest.raises(DataError, match="expected floating-point"):
        FlowDistribution(FLOWS["images, one scale"]()).log_prob(torch.zeros(1, 1, 4, 4, dtype=torch.long))
    with pytest.raises(DataError, match=r"latents of shape \(2,\)"):
        transform(torch.randn(2))
    with pytest.raises(DataError, match="NaN"):
        transform(torch.full((1, 3), float("inf")))
    with pytest.raises(DataError, match=r"shape \(5,\): expected \(\.\.\., 3\)"):
        transform.forward_shape((5,))
    with pytest.raises(ConfigError, match="unknown kind 'exakt'"):
        FlowDistribution(flow, divergence="exakt")
    with pytest.raises(ConfigError, match="give them to to_torch"):
        FlowTransform(to_torch(flow), divergence={"seed": 2})
    with pytest.raises(ConfigError, match="expected a pyrnode flow"):
        FlowDistribution(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cannot be compared"):
        kl_divergence(density, base(2))
    with pytest.raises(ConfigError, match="samples = 1"):
        kl_divergence(density, base(3), samples=1)
