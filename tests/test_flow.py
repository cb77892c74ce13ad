"""The flow: one contract over everything that can be composed, and its density against quadrature and Jacobians."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pyrnode
from pyrnode import files
from pyrnode.composition import base_log_prob
from pyrnode.config import Config, Divergence
from pyrnode.dynamics import ModuleDynamics
from pyrnode.edges import Edges
from pyrnode.errors import CheckpointError, ConfigError, DataError, SolverError
from pyrnode.flow import Flow
from pyrnode.radial import Radial
from pyrnode.transforms import Chain, Standardize, Transform, Whiten
from tests.test_dynamics import Field

TIGHT = {
    "dtype": "float64",
    "evaluation.solver.rtol": 1e-9,
    "evaluation.solver.atol": 1e-9,
    "flow.network.hidden": (8, 8),
}


def build(event_shape: tuple[int, ...], *, levels: int | None = None, own: bool = False, **overrides: object) -> Flow:
    """An untrained flow, moved away from the identity."""
    config = Config().override({**TIGHT, **{k.replace("__", "."): v for k, v in overrides.items()}})
    transform = None
    if levels is None:
        sample = torch.randn(50, *event_shape).double() * 2 + 1
        fitted: list[Transform] = []
        if config.flow.opens(event_shape, levels):  # by column two edges, a lower, an upper one, and again
            rows = [(-4.0, 6.0, 10.0, 0.05, 0.1), (-5.0, 0.0, 4.0, 0.05, 0.0), (0.0, 7.0, 4.0, 0.0, 0.05)]
            columns = torch.tensor([rows[i % 3] for i in range(math.prod(event_shape))], dtype=torch.float64)
            fitted.append(Edges(*columns.T))
            sample = fitted[0](sample)[0]
        if config.flow.scales_features:
            fitted.append(Standardize.fit(sample))
        if config.flow.whitens(event_shape):
            fitted.append(Whiten.fit(fitted[-1](sample)[0]))
        if config.flow.draws_in(event_shape):
            fitted.append(Radial(*torch.tensor([1.5, 0.7], dtype=torch.float64)))
        transform = Chain(fitted)
    dynamics = (lambda shape: ModuleDynamics(Field().double(), shape)) if own else None
    flow = Flow.build(config, event_shape, levels=levels, transform=transform, dynamics=dynamics)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return flow


FLOWS = {
    "vector": lambda: build((3,)),
    "vector, two blocks": lambda: build((3,), flow__blocks=2, flow__network__time="concatsquash"),
    "vector, as it is": lambda: build((3,), flow__standardize="none", flow__network__activation="tanh"),
    "vector, whitened": lambda: build((3,), flow__standardize="whiten"),
    "vector, tails drawn in": lambda: build((3,), flow__standardize="radial"),
    "vector, edges opened": lambda: build((3,), flow__standardize="auto"),
    "vector, own module": lambda: build((3,), own=True),
    "vector, potential": lambda: build((3,), flow__network__kind="potential"),
    "images, one scale": lambda: build((1, 4, 4), levels=17),
    "images, two scales": lambda: build((1, 8, 8), levels=17, flow__alpha=0.05),
    "images, colour": lambda: build((3, 4, 4), levels=256, flow__scales=2, flow__network__time="none"),
    "images, by channel": lambda: build((3, 4, 4), levels=8, flow__standardize="channels", flow__scales=1),
    "images, flattened": lambda: build((1, 3, 2), levels=17, flow__flatten=True, flow__standardize="whiten"),
    "images, fixed step": lambda: build((1, 4, 4), levels=17, evaluation__solver={"name": "RK4", "step_size": 0.05}),
}


@pytest.fixture(params=FLOWS)
def flow(request: pytest.FixtureRequest) -> Flow:
    return FLOWS[request.param]()


def data_for(flow: Flow, n: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if flow.levels is None:
        return torch.randn(n, *flow.event_shape, generator=generator, dtype=torch.double)
    return torch.rand(n, *flow.event_shape, generator=generator, dtype=torch.double) * flow.levels


@torch.no_grad()
def test_decode_undoes_encode(flow: Flow) -> None:
    x = data_for(flow)
    z = flow.encode(x)
    assert z.shape == (4, flow.dim)
    back = flow.decode(z)
    if flow.levels is None:
        assert torch.allclose(back, x, rtol=0, atol=1e-6)
    else:
        assert torch.equal(back.double(), x.floor())


def test_log_prob_is_the_jacobians(flow: Flow) -> None:
    """``log p(x) = log N(z) + log |det ∂z/∂x|``, the determinant by autograd through the solver."""
    x = data_for(flow, 1)
    full = torch.autograd.functional.jacobian(lambda v: flow.encode(v), x).reshape(flow.dim, flow.dim)
    with torch.no_grad():
        expected = base_log_prob(flow.encode(x)) + torch.linalg.slogdet(full)[1]
        assert float(flow.log_prob(x, divergence="exact")) == pytest.approx(float(expected), abs=1e-6)


@torch.no_grad()
def test_estimated_log_prob_is_unbiased(flow: Flow) -> None:
    x = data_for(flow, 2)
    exact = flow.log_prob(x, divergence="exact")
    draws = torch.stack([flow.log_prob(x, divergence=Divergence("hutchinson", 4, s)) for s in range(40)])
    error = draws.std(0) / math.sqrt(len(draws))
    assert bool(((draws.mean(0) - exact).abs() < 5 * error + 1e-9).all())


@torch.no_grad()
def test_same_seed_same_numbers(flow: Flow) -> None:
    assert torch.equal(flow.sample(3, seed=1), flow.sample(3, seed=1))
    assert not torch.equal(flow.sample(3, seed=1), flow.sample(3, seed=2))
    x = data_for(flow)
    first, second = (flow.log_prob(x, divergence=Divergence("hutchinson", seed=4)) for _ in range(2))
    assert torch.equal(first, second)


@torch.no_grad()
def test_estimates_do_not_depend_on_the_batch(flow: Flow) -> None:
    """Neither on its other samples nor on the place in it; integers get dequantisation noise of their own too."""
    x = data_for(flow, 6)
    x = x if flow.levels is None else x.long()
    whole = flow.log_prob(x, divergence=Divergence("hutchinson", 2))
    for rows in ([4], [5, 0, 4], [1, 1]):
        part = flow.log_prob(x[rows], divergence=Divergence("hutchinson", 2))
        torch.testing.assert_close(part, whole[rows], rtol=0, atol=1e-8)
        torch.testing.assert_close(flow.encode(x[rows]), flow.encode(x)[rows], rtol=0, atol=1e-8)
    assert not torch.allclose(flow.log_prob(x, divergence=Divergence("hutchinson", 2, 1)), whole)


@torch.no_grad()
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_the_stated_error_is_that_of_the_number(flow: Flow, divergence: str) -> None:
    x = data_for(flow, 20 if flow.levels is None else 4)
    estimate, error = flow.log_prob(x, divergence=divergence, return_error=True)
    plain = flow.log_prob(x, divergence={"kind": divergence, "probes": 16})
    torch.testing.assert_close(estimate, plain, rtol=0, atol=1e-6)
    exact = flow.log_prob(x, solver=replace(flow.solver, name="DP8", rtol=1e-11, atol=1e-11), divergence="exact")
    covered = (estimate - exact).abs() < error
    assert float(covered.double().mean()) >= (1 if divergence == "exact" else 0.4)


@torch.no_grad()
def test_no_samples_have_no_numbers(flow: Flow) -> None:
    nothing = data_for(flow, 1)[:0]
    assert flow.log_prob(nothing).shape == (0,)
    assert flow.encode(nothing).shape == (0, flow.dim)
    with pytest.raises(ConfigError, match="probes = 0: expected at least 1"):
        flow.log_prob(data_for(flow), divergence={"kind": "hutchinson", "probes": 0})


@torch.no_grad()
def test_samples_are_in_the_datas_space(flow: Flow) -> None:
    samples = flow.sample(5, seed=0)
    assert samples.shape == (5, *flow.event_shape)
    if flow.levels is not None:
        assert samples.dtype == torch.uint8
        assert int(samples.max()) < flow.levels
    assert bool(torch.isfinite(flow.log_prob(samples)).all())


def test_log_prob_is_differentiable_in_data_and_parameters(flow: Flow) -> None:
    x = data_for(flow, 2).requires_grad_()
    flow.log_prob(x, divergence="exact").sum().backward()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    assert x.grad is not None
    with torch.no_grad():
        ahead, behind = (flow.log_prob(x + s * 1e-5 * direction, divergence="exact").sum() for s in (1, -1))
    assert float((x.grad * direction).sum()) == pytest.approx(float(ahead - behind) / 2e-5, rel=1e-4, abs=1e-5)
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in flow.parameters())


@torch.no_grad()
def test_saved_flow_is_the_same_flow(flow: Flow, tmp_path: object) -> None:
    path = f"{tmp_path}/flow.safetensors"
    if isinstance(flow.blocks[0].dynamics, ModuleDynamics):
        with pytest.raises(ConfigError, match="dynamics of your own"):
            flow.save(path)
        return
    flow.save(path)
    loaded = pyrnode.load(path)
    x = data_for(flow)
    assert torch.equal(loaded.log_prob(x), flow.log_prob(x))
    assert loaded.config == flow.config
    assert repr(loaded) == repr(flow)


@torch.no_grad()
def test_log_prob_does_not_depend_on_the_batch(flow: Flow) -> None:
    x = data_for(flow, 6)
    whole, alone = flow.log_prob(x, divergence="exact"), flow.log_prob(x[2:3], divergence="exact")
    assert torch.allclose(whole[2:3], alone, rtol=0, atol=1e-9)


@torch.no_grad()
def test_two_dimensional_density_integrates_to_one() -> None:
    flow = build((2,), flow__blocks=2)
    x, y = torch.meshgrid(*[torch.linspace(-14, 16, 301, dtype=torch.double)] * 2, indexing="ij")
    points = torch.stack((x.flatten(), y.flatten()), 1)
    solver = pyrnode.SolverConfig(name="RK4", step_size=0.1)
    mass = float(flow.log_prob(points, solver=solver, divergence="exact").exp().sum()) * 0.1**2
    assert mass == pytest.approx(1, abs=1e-3)


@torch.no_grad()
def test_sampling_follows_the_density() -> None:
    """The mean of −log p over samples is the entropy, which quadrature gives too."""
    flow = build((1,))
    grid = torch.linspace(-30, 30, 4001, dtype=torch.double)[:, None]
    log_p = flow.log_prob(grid, divergence="exact")
    entropy = -float((log_p.exp() * log_p).sum()) * 0.015
    scores = -flow.log_prob(flow.sample(4000, seed=0), divergence="exact")
    assert float(scores.mean()) == pytest.approx(entropy, abs=4 * float(scores.std()) / math.sqrt(4000))


@pytest.mark.parametrize(
    ("shape", "scales", "blocks"), [((1, 28, 28), 3, 10), ((3, 32, 32), 4, 14), ((1, 8, 8), 2, 6), ((1, 5, 7), 1, 2)]
)
def test_scales_of_images(shape: tuple[int, int, int], scales: int, blocks: int) -> None:
    flow = Flow.build(Config().override({"flow.blocks": 2, "flow.network.hidden": (4,)}), shape, levels=256)
    assert len(flow.blocks) == blocks
    explicit = Flow.build(
        Config().override({"flow.blocks": 2, "scales": scales, "flow.network.hidden": (4,)}), shape, levels=256
    )
    assert repr(explicit) == repr(flow)


@torch.no_grad()
def test_untrained_flow_is_the_normal_behind_its_transform() -> None:
    flow = Flow.build(Config().override({"dtype": "float64"}), (1, 4, 4), levels=17)
    x = torch.rand(3, 1, 4, 4).double() * 17
    y, log_det = flow.transform(x)
    assert torch.allclose(flow.log_prob(x), base_log_prob(y.flatten(1)) + log_det, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4, 3), r"input of shape \(4, 3\): expected \(batch, 2\)"),
        (torch.zeros(2), r"input of shape \(2,\): expected \(batch, 2\)"),
        (torch.tensor([[0.0, 1.0], [math.nan, 0.0]]), "NaN or infinite values, first in sample 1"),
    ],
)
def test_bad_input(x: Tensor, message: str) -> None:
    flow = build((2,))
    for method in (flow.log_prob, flow.encode):
        with pytest.raises(DataError, match=message):
            method(x)


def test_other_bad_calls() -> None:
    flow = build((2,))
    with pytest.raises(DataError, match=r"latents of shape \(3, 5\)"):
        flow.decode(torch.zeros(3, 5))
    with pytest.raises(ConfigError, match="n = -1: expected a number of samples, at least 0"):
        flow.sample(-1)
    with pytest.raises(ConfigError, match="more samples than any memory holds"):
        flow.sample(2**62)
    with pytest.raises(ConfigError, match=r"seed = 1180591620717411303424: expected a whole number from -2\*\*63"):
        flow.sample(1, seed=2**70)
    with pytest.raises(DataError, match=r"input of shape \(2,\): expected \(batch, 2\); of one sample, pass x\[None\]"):
        flow.log_prob(torch.zeros(2))
    with pytest.raises(ConfigError, match=r"x\.pt: a flow is saved as safetensors"):
        flow.save("x.pt")
    with pytest.raises(CheckpointError, match="is a folder, not a file"):
        files.read(Path(__file__).parent, "flow")
    with pytest.raises(ConfigError, match="unknown kind 'exakt'"):
        flow.log_prob(torch.zeros(1, 2), divergence="exakt")
    with pytest.raises(CheckpointError, match="does not exist"):
        pyrnode.load("nowhere.safetensors")


@pytest.mark.parametrize(
    ("shape", "overrides", "message"),
    [
        ((3,), {"network.kind": "conv"}, "needs images"),
        ((1, 4, 4), {"network.kind": "mlp"}, "needs vectors"),
        ((2, 3), {}, r"data of shape \(2, 3\): expected vectors"),
        ((1, 6, 6), {"scales": 3}, "a 3x3 image cannot be halved; at most 2"),
    ],
)
def test_network_that_does_not_fit(shape: tuple[int, ...], overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Flow.build(Config().override(overrides), shape, levels=17 if len(shape) == 3 else None)


def test_solver_failure_names_the_block() -> None:
    flow = build((2,), flow__blocks=2)
    with torch.no_grad():
        for parameter in flow.blocks[1].parameters():
            parameter.fill_(math.nan)
    with pytest.raises(SolverError, match=r"block 1 \(\(2,\)\): the dynamics are not finite") as failure:
        flow.log_prob(torch.zeros(3, 2))
    assert failure.value.block == 1
    assert failure.value.status == "Unstable"
