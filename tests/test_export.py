"""Export: the module against the flow, autograd and closed forms."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from pyrnode.composition import base_log_prob
from pyrnode.config import Config, Divergence, SolverConfig
from pyrnode.dynamics import MLP, ModuleDynamics
from pyrnode.dynamics.activations import ACTIVATIONS
from pyrnode.engines.plain import SMOOTH, LayeredRates, ModuleRates
from pyrnode.errors import ConfigError, DataError, EngineUnavailableError, SolverError
from pyrnode.export import to_torch
from pyrnode.export.programs import to_program
from pyrnode.flow import Flow
from pyrnode.probes import Probes
from tests.test_dynamics import CASES, EVENTS, jacobian, make
from tests.test_flow import FLOWS, build, data_for

ROOT = Path(__file__).parent.parent
QUICK = [
    "vector",
    "vector, two blocks",
    "vector, own module",
    "vector, potential",
    "images, one scale",
    "images, flattened",
]


def small(**overrides: object) -> Flow:
    """A flow in single precision, away from the identity."""
    return build((2,), **overrides).float()


def error(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).abs().max())


# -- f and its divergence --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMOOTH)
def test_activations_and_their_slopes(name: str) -> None:
    a = torch.linspace(-30, 30, 121, dtype=torch.double).requires_grad_()
    value, slope = SMOOTH[name].value(a), SMOOTH[name].slope(a)
    assert error(value, ACTIVATIONS[name].value(a)) < 3e-9  # the engine's softplus is linear above 20
    assert error(slope, torch.autograd.grad(value.sum(), a, create_graph=True)[0]) < 1e-14
    huge = torch.tensor([-1e4, 1e4]).requires_grad_()
    (second,) = torch.autograd.grad(SMOOTH[name].slope(huge).sum(), huge)
    assert second.tolist() == [0, 0]


def test_all_activations_are_there() -> None:
    assert SMOOTH.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize(("kind", "time", "activation"), CASES)
def test_rates_are_autograds(kind: str, time: str, activation: str) -> None:
    dynamics = make(kind, time, activation)
    z, probes = torch.randn(3, *EVENTS[kind]).double(), torch.randn(4, *EVENTS[kind]).double()
    f, div = LayeredRates(dynamics)(0.3, z, probes[:, None])
    full, eps = jacobian(dynamics, 0.3, z), probes.flatten(1)
    assert div is not None
    assert error(f, dynamics(0.3, z)) < 1e-12
    assert error(div, torch.einsum("ki,bij,kj->b", eps, full, eps)) < 1e-11
    general = ModuleRates(dynamics)(0.3, z, probes[:, None])[1]
    assert general is not None
    assert error(div, general) < 1e-11


def test_rates_of_a_single_layer() -> None:
    dynamics = MLP(3, (), time="concat").double()
    with torch.no_grad():
        dynamics.layers[0].weight.copy_(torch.arange(9.0).reshape(3, 3))
    div = LayeredRates(dynamics)(0.5, torch.randn(4, 3).double(), torch.eye(3).double()[:, None])[1]
    assert div is not None
    assert div.tolist() == [12.0] * 4


# -- the module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOWS)
@torch.no_grad()
def test_module_is_the_flow(name: str) -> None:
    flow = FLOWS[name]()
    x = data_for(flow)
    module = to_torch(flow, {"step_size": 0.05}, divergence="exact")
    z, log_det = module(x)
    assert error(z, flow.encode(x)) < 3e-6
    assert error(module.log_prob(x), flow.log_prob(x, divergence="exact")) < 1e-4
    assert error(log_det, module.log_prob(x) - base_log_prob(z)) < 1e-12
    assert error(module.inverse(z), x) < 1e-5
    assert list(module.state_dict()) == list(flow.state_dict())
    adaptive = to_torch(flow, {"rtol": 1e-9}, divergence="exact")
    evaluation = flow.config.evaluation.solver.name
    assert error(adaptive.log_prob(x), flow.log_prob(x, divergence="exact")) < (1e-7 if evaluation == "DP5" else 1e-6)


@pytest.mark.parametrize("name", QUICK)
def test_log_det_is_the_jacobians(name: str) -> None:
    flow = FLOWS[name]()
    module, x = to_torch(flow, {"step_size": 0.05}, divergence="exact"), data_for(flow, 1)
    full = torch.autograd.functional.jacobian(lambda v: module(v)[0], x).reshape(flow.dim, flow.dim)
    assert float(module(x)[1].detach()) == pytest.approx(float(torch.linalg.slogdet(full)[1]), abs=1e-6)


def test_linear_dynamics_have_a_closed_form() -> None:
    """``z' = A z``: ``z(T) = exp(T A) x`` and ``log det = T tr A``, plus those of the standardisation."""
    matrix = torch.tensor([[0.3, -0.8], [0.5, -0.4]], dtype=torch.double)

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(matrix.clone())

        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return z @ self.matrix.T

    config = Config().override({"dtype": "float64", "flow.end_time": 1.5, "flow.standardize": "none"})
    flow = Flow.build(config, (2,), dynamics=lambda shape: ModuleDynamics(Field(), shape))
    x = torch.randn(5, 2).double()
    for settings in ({"step_size": 0.02}, {"name": "DP8", "step_size": 0.3}, {"rtol": 1e-8}):
        z, log_det = to_torch(flow, settings)(x)
        assert error(z, x @ torch.linalg.matrix_exp(1.5 * matrix).T) < 1e-7
        assert error(log_det, torch.full((5,), 1.5 * -0.1).double()) < 1e-8


@torch.no_grad()
def test_density_integrates_to_one() -> None:
    module = to_torch(build((2,)), {"step_size": 0.1})
    centre, scale = module.sample(500, seed=0).mean(0), 1.0
    axis = torch.linspace(-12, 12, 121, dtype=torch.double)
    grid = torch.cartesian_prod(axis, axis) * scale + centre
    assert float(module.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1, abs=2e-4)


@pytest.mark.parametrize("name", QUICK)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    flow = FLOWS[name]()
    module, x = (
        to_torch(flow, {"step_size": 0.25}, divergence=Divergence("hutchinson", 2)),
        data_for(flow, 2).requires_grad_(),
    )
    generator = torch.Generator().manual_seed(1)
    tensors = [x, *module.parameters()]
    directions = [torch.randn(p.shape, generator=generator).double() for p in tensors]
    gradients = torch.autograd.grad(module.log_prob(x).sum(), tensors)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    values = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for p, d in zip(tensors, directions, strict=True):
                p.add_(step * d)
            values.append(float(module.log_prob(x).sum()))
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("solver", [{"step_size": 0.02}, {"rtol": 1e-9}])
def test_gradients_are_the_flows(solver: dict[str, Any]) -> None:
    flow = FLOWS["vector, two blocks"]()
    module, x = to_torch(flow, solver), data_for(flow).requires_grad_()
    mine = torch.autograd.grad(module.log_prob(x).sum(), [x, *module.parameters()])
    theirs = torch.autograd.grad(flow.log_prob(x).sum(), [x, *flow.parameters()])
    assert max(error(a, b) for a, b in zip(mine, theirs, strict=True)) < 1e-7


@torch.no_grad()
def test_estimate_uses_the_stored_probes_for_every_sample() -> None:
    flow = FLOWS["images, two scales"]()
    x = data_for(flow, 2)
    module = to_torch(flow, {"step_size": 0.25}, divergence=Divergence("hutchinson", 3, 4))
    noise = iter(range(len(flow.blocks)))

    def draw(z: Tensor) -> Probes:
        return Probes(module.get_buffer(f"noise_{next(noise)}").unsqueeze(1).expand(3, *z.shape), 1 / 3)

    solver = SolverConfig(step_size=0.25)
    expected = flow.solve(x, draw, solver)
    assert solver.name == "RK4"
    assert solver.step_size == 0.25
    assert error(module(x)[1], expected.log_det) < 1e-9
    again = to_torch(flow, {"step_size": 0.25}, divergence=Divergence("hutchinson", 3, 4))
    other = to_torch(flow, {"step_size": 0.25}, divergence=Divergence("hutchinson", 3, 5))
    assert torch.equal(module.log_prob(x), again.log_prob(x))
    assert error(module.log_prob(x), other.log_prob(x)) > 0.01
    assert error(module.log_prob(x)[:1], module.log_prob(x[:1])) < 1e-9


@torch.no_grad()
def test_estimate_is_unbiased() -> None:
    flow = FLOWS["vector"]()
    x = data_for(flow, 2)
    exact = to_torch(flow, {"step_size": 0.25}).log_prob(x)
    draws = torch.stack(
        [
            to_torch(flow, {"step_size": 0.25}, divergence=Divergence("hutchinson", seed=s)).log_prob(x)
            for s in range(60)
        ]
    )
    spread = draws.std(0) / math.sqrt(len(draws))
    assert bool(((draws.mean(0) - exact).abs() < 4 * spread).all())


@pytest.mark.parametrize("name", QUICK)
def test_functional_transforms(name: str) -> None:
    flow = FLOWS[name]()
    module, x = to_torch(flow, {"step_size": 0.5}), data_for(flow, 3)
    together = module.log_prob(x)
    assert error(vmap(lambda v: module.log_prob(v[None])[0])(x), together) < 1e-11
    each = vmap(grad(lambda v: module.log_prob(v[None])[0]))(x)
    y = x.clone().requires_grad_()
    assert error(each, torch.autograd.grad(module.log_prob(y).sum(), y)[0]) < 1e-11
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    parameters, buffers = stack_module_state([module, other])
    ensemble = vmap(lambda p, b: functional_call(module, (p, b), (x,))[0])(parameters, buffers)
    assert error(ensemble, torch.stack([module(x)[0], other(x)[0]])) < 1e-11


def test_adaptive_steps_are_refused_where_values_are_not_known() -> None:
    flow = small()
    module, x = to_torch(flow, {"rtol": 1e-4}), torch.randn(3, 2)
    for attempt in (
        lambda: vmap(lambda v: module.log_prob(v[None])[0])(x),
        lambda: grad(lambda v: module.log_prob(v).sum())(x),
        lambda: torch.export.export(module, (x,)),
        lambda: to_program(module, "encode", x),
    ):
        with pytest.raises(ConfigError, match=r"DP5 rtol 0\.0001 atol 0\.0001: .*use fixed steps"):
            attempt()


def test_module_is_a_module() -> None:
    flow = FLOWS["vector"]()
    module, x = to_torch(flow, {"step_size": 0.25}, divergence="hutchinson"), data_for(flow)
    before = module.log_prob(x)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    assert error(twin.log_prob(x), before) > 0.01
    assert torch.equal(module.log_prob(x), before)
    assert error(flow.log_prob(x), before) < 1
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin.log_prob(x), before)
    single = twin.to(torch.float32).log_prob(x.float())
    assert single.dtype == torch.float32
    assert error(single.double(), before) < 1e-4
    with torch.no_grad():
        assert not module.log_prob(x).requires_grad
    assert before.requires_grad
    assert not module.training
    assert "RK4 step 0.25" in repr(module)


def test_methods_of_the_flow() -> None:
    flow, x = small(), torch.randn(3, 2)
    solver, divergence = {"name": "Heun", "step_size": 0.5}, Divergence("hutchinson", 3, 2)
    module, same = flow.to_torch(solver, divergence=divergence), to_torch(flow, solver, divergence=divergence)
    assert torch.equal(module.log_prob(x), same.log_prob(x))
    assert module.extra_repr() == same.extra_repr()
    divergence = Divergence("hutchinson", 2, 3)
    density = flow.distribution(divergence=divergence, validate_args=False)
    assert error(density.log_prob(x), flow.log_prob(x, divergence=divergence)) < 1e-6
    assert density._validate_args is False


def test_parameters_are_copies() -> None:
    flow = small()
    x = torch.randn(4, 2)
    before = flow.log_prob(x)
    module = to_torch(flow)
    optimizer = torch.optim.Adam(module.parameters(), 0.1)
    (-module.log_prob(x).mean()).backward()
    optimizer.step()
    assert error(module.log_prob(x), before) > 0.01
    assert torch.equal(flow.log_prob(x), before)


@torch.no_grad()
def test_samples_are_decoded_normals() -> None:
    module = to_torch(small(), {"step_size": 0.25})
    x = module.sample(5, seed=3)
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(x, module.inverse(z))
    torch.manual_seed(3)
    assert torch.equal(module.sample(5), x)


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": {"step_size": 0.1, "rtol": 1e-3}}, "give step_size"),
        ({"solver": {"atol": 1e-3}}, "give step_size"),
        ({"solver": {"name": "RK4", "rtol": 1e-3}}, "RK4 has no error estimate"),
        ({"solver": {"step_size": 0.0}}, "step_size = 0.0: expected more than 0"),
        ({"solver": {"step_size": float("nan")}}, "step_size = nan"),
        ({"solver": {"step_size": "0.1"}}, "step_size = '0.1'"),
        ({"solver": {"step_size": 1e-5}}, "more than 10000 steps"),
        ({"solver": {"rtol": -1.0}}, "rtol = -1.0"),
        ({"divergence": "exakt"}, "did you mean 'exact'"),
        ({"divergence": {"probes": 0}}, "probes = 0"),
        ({"divergence": {"seed": -1}}, "seed = -1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_torch(small(), **settings)


def test_unknown_solver_lists_what_there_is() -> None:
    with pytest.raises(EngineUnavailableError, match="DP5"):
        to_torch(small(), solver="Vern7")


def test_bad_values() -> None:
    module = to_torch(small(), {"step_size": 0.5})
    with pytest.raises(DataError, match=r"input of shape \(4, 3\): expected \(batch, 2\)"):
        module(torch.randn(4, 3))
    with pytest.raises(DataError, match=r"expected \(batch, 2\)"):
        module.log_prob(torch.randn(2))
    with pytest.raises(DataError, match="type list"):
        module.log_prob([[0.0, 0.0]])  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"torch.float64 on cpu, and the module is torch.float32"):
        module.log_prob(torch.randn(4, 2).double())
    with pytest.raises(DataError, match="first in sample 1"):
        module.log_prob(torch.tensor([[0.0, 0.0], [float("nan"), 0.0]]))
    with pytest.raises(DataError, match=r"latents of shape \(4, 1\)"):
        module.inverse(torch.randn(4, 1))
    for n in (-1, 2.0, True):
        with pytest.raises(ConfigError, match="expected a number of samples, at least 0"):
            module.sample(n)  # type: ignore[arg-type]


def test_bad_values_of_discrete_data() -> None:
    module = to_torch(FLOWS["images, one scale"](), {"step_size": 0.5})
    with pytest.raises(DataError, match="give integers noise"):
        module.log_prob(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
    with pytest.raises(DataError, match="expected 0 to 17"):
        module.log_prob(torch.full((2, 1, 4, 4), 18.0).double())


def test_broken_parameters_and_failing_solves() -> None:
    flow = small()
    with torch.no_grad():
        next(flow.parameters())[0, 0] = float("nan")
    with pytest.raises(DataError, match=r"layers\.0\.weight is not finite"):
        to_torch(flow)
    stiff = build((2,), flow__network__activation="elu").float()
    with torch.no_grad():
        for parameter in stiff.parameters():
            parameter.mul_(1e5)
    with pytest.raises(SolverError, match=r"block 0 \(\(2,\)\): the state is not finite at t = 1 .*smaller step_size"):
        to_torch(stiff, {"step_size": 0.1}).log_prob(torch.randn(3, 2))
