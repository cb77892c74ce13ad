"""Conditional flows ``p(x | c)``, from training to export, against closed forms, Jacobians and finite differences."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, TransformedDistribution

import pyrnode
from pyrnode import RNODEDensity, anomalies, export
from pyrnode.cli import main
from pyrnode.composition import base_log_prob
from pyrnode.config import Config, DataConfig, Divergence
from pyrnode.contexts import Contexts
from pyrnode.data import Splits, TensorSamples, load
from pyrnode.distribution import FlowDistribution, FlowTransform
from pyrnode.dynamics import ConvNet, ModuleDynamics
from pyrnode.engines.plain import LayeredRates, ModuleRates
from pyrnode.errors import CheckpointError, ConfigError, DataError
from pyrnode.evaluation import evaluate
from pyrnode.export import to_torch
from pyrnode.flow import Flow
from pyrnode.transforms import Chain, Standardize
from tests.test_dynamics import EVENTS, ConditionalField, jacobian, make
from tests.test_export import error
from tests.test_flow import TIGHT, data_for

WIDTH = 2


def build(event_shape: tuple[int, ...], *, levels: int | None = None, own: bool = False, **overrides: object) -> Flow:
    """An untrained conditional flow, moved away from the identity."""
    config = Config().override({**TIGHT, **{k.replace("__", "."): v for k, v in overrides.items()}})
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(50, *event_shape, generator=generator).double() * 2 + 1 if levels is None else None
    contexts = torch.randn(50, WIDTH, generator=generator).double() * torch.tensor([0.5, 20.0]).double() + 3
    own_dynamics = (lambda shape: ModuleDynamics(ConditionalField().double(), shape, WIDTH)) if own else None
    flow = Flow.build(
        config,
        event_shape,
        levels=levels,
        transform=None if sample is None else Chain([Standardize.fit(sample)]),
        context_dim=WIDTH,
        context_transform=Chain([Standardize.fit(contexts)]),
        dynamics=own_dynamics,
    )
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return flow


FLOWS = {
    "vector": lambda: build((3,)),
    "vector, two blocks": lambda: build((3,), flow__blocks=2, flow__network__time="concatsquash"),
    "vector, own module": lambda: build((3,), own=True),
    "images, two scales": lambda: build((1, 4, 4), levels=17, flow__scales=2, flow__network__hidden=(4,)),
    "images, gated": lambda: build((1, 4, 4), levels=17, flow__network__time="concatsquash"),
}


@pytest.fixture(params=FLOWS)
def flow(request: pytest.FixtureRequest) -> Flow:
    return FLOWS[request.param]()


def contexts_for(n: int) -> Tensor:
    c = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    return c * torch.tensor([0.5, 20.0]).double() + 3


# -- the flow --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_decode_undoes_encode(flow: Flow) -> None:
    x, context = data_for(flow), contexts_for(4)
    back = flow.decode(flow.encode(x, context), context)
    if flow.levels is None:
        assert torch.allclose(back, x, rtol=0, atol=1e-6)
    else:
        assert torch.equal(back.double(), x.floor())


def test_log_prob_is_the_jacobians(flow: Flow) -> None:
    x, context = data_for(flow, 1), contexts_for(1)
    full = torch.autograd.functional.jacobian(lambda v: flow.encode(v, context), x).reshape(flow.dim, flow.dim)
    with torch.no_grad():
        expected = base_log_prob(flow.encode(x, context)) + torch.linalg.slogdet(full)[1]
        assert float(flow.log_prob(x, context, divergence="exact")) == pytest.approx(float(expected), abs=1e-6)


@torch.no_grad()
def test_every_sample_has_its_own_context(flow: Flow) -> None:
    x, context = data_for(flow, 4), contexts_for(4)
    whole = flow.log_prob(x, context)
    for i in range(4):
        assert error(flow.log_prob(x[i : i + 1], context[i : i + 1]), whole[i : i + 1]) < 1e-8
        assert error(flow.log_prob(x[i : i + 1], context[i]), whole[i : i + 1]) < 1e-8
    assert error(whole, flow.log_prob(x, context[0])) > 1e-3


@torch.no_grad()
def test_samples_by_context() -> None:
    flow, context = FLOWS["vector"](), contexts_for(2)
    both = flow.sample(5, context, seed=3)
    assert both.shape == (2, 5, 3)
    z = torch.randn(10, 3, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    assert error(flow.encode(both.flatten(0, 1), context.repeat_interleave(5, 0)), z) < 1e-6
    one = flow.sample(10, context[0], seed=3)
    assert one.shape == (10, 3)
    assert error(flow.encode(one, context[0]), z) < 1e-6


@torch.no_grad()
def test_more_samples_than_one_solve_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, x, context = FLOWS["vector"](), torch.randn(7, 3).double(), contexts_for(7)
    whole = flow.log_prob(x, context), flow.decode(x, context)
    monkeypatch.setattr(flow, "chunk", 3)
    assert error(flow.log_prob(x, context), whole[0]) < 1e-8
    assert error(flow.decode(x, context), whole[1]) < 1e-7


def test_gradient_for_the_context() -> None:
    flow, x = FLOWS["vector"](), torch.randn(3, 3).double()
    context = contexts_for(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: flow.log_prob(x, c), (context,), eps=1e-5, atol=1e-5)


@torch.no_grad()
def test_stated_error_holds_the_truth() -> None:
    flow = FLOWS["images, gated"]()
    x, context = data_for(flow, 12), contexts_for(12)
    exact = flow.log_prob(x, context, divergence="exact")
    estimate, stated = flow.log_prob(x, context, divergence=Divergence("hutchinson", 16), return_error=True)
    assert int(((estimate - exact).abs() < 3 * stated).sum()) >= 11
    own, _ = flow.log_prob(x[2:3], context[2:3], divergence=Divergence("hutchinson", 16), return_error=True)
    assert error(own, estimate[2:3]) < 1e-7


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (None, r"conditional on 2 features: .* context, \(2,\) for one .* or \(4, 2\)"),
        (torch.zeros(4), r"context of shape \(4,\): expected \(2,\)"),
        (torch.zeros(3, 2), r"context of shape \(3, 2\): expected .* or \(4, 2\)"),
        (torch.zeros(4, 3), r"context of shape \(4, 3\)"),
        (torch.zeros(4, 2, 1), r"context of shape \(4, 2, 1\)"),
        (torch.full((4, 2), math.nan), "the context.* NaN or infinite values"),
    ],
)
def test_contexts_that_do_not_fit(context: Tensor | None, message: str) -> None:
    flow, x = FLOWS["vector"](), torch.zeros(4, 3)
    module = to_torch(flow)
    for call in (flow.log_prob, flow.encode, flow.decode, module.log_prob, module.inverse):
        with pytest.raises(DataError, match=message):
            call(x.double(), None if context is None else context.double())


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (None, r"conditional on 2 features: .* context, \(2,\) for one .* or \(n, 2\)"),
        (torch.zeros(3).double(), r"context of shape \(3,\): expected \(2,\)"),
        (torch.tensor(1.0).double(), r"context of shape \(\): expected \(2,\)"),
        (torch.full((2,), math.nan).double(), "the context.* NaN or infinite values"),
    ],
)
def test_contexts_that_cannot_be_sampled_for(context: Tensor | None, message: str) -> None:
    flow = FLOWS["vector"]()
    for call in (flow.sample, to_torch(flow).sample):
        with pytest.raises(DataError, match=message):
            call(3, context)
    with pytest.raises(DataError, match=message):
        flow.distribution(context).sample((3,))


def test_contexts_that_are_no_tensors() -> None:
    flow, x = FLOWS["vector"](), torch.zeros(4, 3).double()
    expected = flow.log_prob(x, torch.tensor([1.0, 2.0]).double())
    assert error(flow.log_prob(x, [1.0, 2.0]), expected) == 0  # type: ignore[arg-type]
    assert error(flow.distribution([1.0, 2.0]).log_prob(x), expected) == 0  # type: ignore[arg-type]
    for bad, message in (("ab", "context of type str: expected numbers"), (torch.zeros(4, 2).cdouble(), "complex")):
        for call in (flow.log_prob, flow.encode, flow.decode):
            with pytest.raises(DataError, match=message):
                call(x, bad)  # type: ignore[arg-type]
        with pytest.raises(DataError, match=message):
            flow.distribution(bad)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"context of type list: expected a torch tensor, \(2,\) for one"):
        to_torch(flow).log_prob(x, [1.0, 2.0])  # type: ignore[arg-type]


def test_unconditional_flows_refuse_a_context() -> None:
    flow = Flow.build(Config(), (3,))
    for call in (flow.log_prob, flow.decode, to_torch(flow).log_prob):
        with pytest.raises(DataError, match=r"unconditional .*: leave the context out"):
            call(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(DataError, match="unconditional"):
        flow.sample(4, torch.zeros(2))
    with pytest.raises(DataError, match=r"pass context\[:, None\]"):
        Flow.build(Config(), (3,), context_dim=1).log_prob(torch.zeros(4, 3), torch.zeros(4))


def test_dynamics_and_data_must_agree_on_the_context() -> None:
    with pytest.raises(ConfigError, match="take a context of 3 features, the data has 2"):
        Flow.build(Config(), (1, 4, 4), levels=4, context_dim=2, dynamics=lambda s: ConvNet(s, (4,), context_dim=3))  # type: ignore[arg-type]


def test_a_file_keeps_the_context(tmp_path: Path) -> None:
    flow, x, context = FLOWS["vector, two blocks"](), torch.randn(4, 3), contexts_for(4)
    flow.save(tmp_path / "flow.safetensors")
    assert error(pyrnode.load(tmp_path / "flow.safetensors").log_prob(x, context), flow.log_prob(x, context)) == 0


# -- training --------------------------------------------------------------------------------------------------------


def simulated(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``x = A c + s(c) ε``: a Gaussian whose mean and width depend on a context of two features."""
    generator = torch.Generator().manual_seed(seed)
    c, noise = (torch.randn(n, 2, generator=generator).double() for _ in range(2))
    return mean_of(c) + width_of(c) * noise, c


def mean_of(c: Tensor) -> Tensor:
    return c @ torch.tensor([[1.5, -0.5], [0.5, 1.0]]).double()


def width_of(c: Tensor) -> Tensor:
    return 0.3 * torch.exp(0.4 * c[:, :1]).expand(-1, 2)


def exact(x: Tensor, c: Tensor) -> Tensor:
    return Independent(Normal(mean_of(c), width_of(c)), 1).log_prob(x)


SETTINGS: dict[str, Any] = {
    "flow.network.hidden": [32, 32],
    "flow.network.activation": "tanh",
    "max_steps": 400,
    "batch_size": 250,
    "learning_rate": 0.01,
    "schedule": "cosine",
    "penalties.divergence": "exact",
    "validate_every": 50,
    "solver.step_size": 0.5,
}


def test_training_finds_the_conditional_density(tmp_path: Path) -> None:
    """Which a flow that was given the contexts of other samples could not."""
    x, c = simulated(4000)
    result = pyrnode.train(x, context=c, epochs=200, **SETTINGS, progress=False, out=tmp_path / "run")
    fresh, given = simulated(1000, seed=1)
    with torch.no_grad():
        gap = exact(fresh, given) - result.flow.log_prob(fresh.float(), given).double()
    assert abs(float(gap.mean())) < 0.06  # 1.3 nats without the context
    samples = result.flow.sample(2000, torch.tensor([1.0, -1.0]), seed=0).double()
    at = torch.tensor([[1.0, -1.0]]).double()
    assert error(samples.mean(0), mean_of(at)[0]) < 0.08
    assert error(samples.std(0), width_of(at)[0]) < 0.08
    assert result.report is not None
    assert result.report.baselines == {}
    assert "the baselines know no context" in str(result.report)
    assert result.report.score.nats == pytest.approx(float(exact(fresh, given).mean()), abs=0.2)
    assert not (tmp_path / "run" / "density.png").exists()
    loaded = pyrnode.load(tmp_path / "run")
    assert error(loaded.log_prob(fresh[:5], given[:5]), result.flow.log_prob(fresh[:5], given[:5])) == 0
    report = evaluate(result.flow, fresh.float(), context=given)
    assert report.score.nats == pytest.approx(float((exact(fresh, given) - gap).mean()), abs=1e-5)
    with pytest.raises(DataError, match="conditional on 2 features"):
        evaluate(result.flow, fresh.float())


def test_training_resumes_bit_for_bit_with_a_context(tmp_path: Path) -> None:
    x, c = simulated(300)
    settings = {**SETTINGS, "flow.network.hidden": [6], "batch_size": 40, "checkpoint_every": 4}
    whole, parts = ({"progress": False, "evaluate": False, "out": tmp_path / name} for name in ("whole", "parts"))
    full = pyrnode.train(x, context=c, epochs=10, **{**settings, "max_steps": 24}, **whole)  # type: ignore[arg-type]
    pyrnode.train(x, context=c, epochs=10, **{**settings, "max_steps": 24, "schedule": "cosine"}, **parts)  # type: ignore[arg-type]
    (tmp_path / "parts" / "model.safetensors").unlink()
    for given, features in ((None, 0), (c[:, :1], 1)):
        with pytest.raises(CheckpointError, match=f"context has 2 features, the one given {features}: pass that which"):
            pyrnode.train(x, context=given, resume=True, **parts)  # type: ignore[arg-type]
    again = pyrnode.train(x, context=c, resume=True, **parts)  # type: ignore[arg-type]
    for (name, a), (_, b) in zip(full.flow.state_dict().items(), again.flow.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_the_users_own_conditional_dynamics_are_trained() -> None:
    class Shift(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(2, 2)

        def forward(self, t: Tensor, z: Tensor, c: Tensor) -> Tensor:
            return self.linear(c)  # type: ignore[no-any-return]

    x, c = simulated(400)
    settings = {**SETTINGS, "max_steps": 150, "batch_size": 100, "flow.standardize": "none", "learning_rate": 0.05}
    result = pyrnode.train(
        x, context=c, epochs=50, **settings, dynamics=lambda _: Shift(), progress=False, evaluate=False
    )
    weight = result.flow.blocks[0].dynamics.module.linear.weight  # type: ignore[union-attr]
    assert error(weight.double(), -torch.tensor([[1.5, 0.5], [-0.5, 1.0]]).double()) < 0.2  # undoes A


def test_images_by_class() -> None:
    """Discrete data, a context of one-hot classes: samples of a class look like it."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 2, (400,), generator=generator)
    noise = torch.randint(0, 4, (400, 1, 4, 4), generator=generator)
    x = (noise + 12 * label[:, None, None, None]).to(torch.uint8)
    settings = {**SETTINGS, "levels": 16, "max_steps": 150, "batch_size": 50, "penalties.divergence": "hutchinson"}
    settings |= {"flow.network.hidden": [8], "scales": 1}
    onehot = torch.nn.functional.one_hot(label, 2)
    result = pyrnode.train(x, context=onehot, epochs=50, **settings, progress=False, evaluate=False)
    samples = result.flow.sample(20, torch.eye(2), seed=0).double()
    assert float(samples[0].mean()) < 5
    assert float(samples[1].mean()) > 10


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (np.zeros(50), r"pass context\[:, None\] for one feature, or .*one_hot\(context\)"),
        (np.zeros((49, 2)), r"shape \(49, 2\): expected \(50, m\)"),
        (np.zeros((50, 0)), r"shape \(50, 0\): expected \(50, m\)"),
        (np.where(np.arange(100).reshape(50, 2) == 7, np.nan, 1.0), "NaN or infinite values, the first in row 3"),
        (np.full((50, 2), "a"), "the context has type"),
    ],
)
def test_contexts_that_cannot_be_trained_on(context: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(torch.randn(50, 2), context=context)


def test_contexts_are_divided_as_the_samples_are() -> None:
    x = torch.arange(100.0).reshape(50, 2)
    for context in (x + 1, (x + 1).numpy(), pd.DataFrame((x + 1).numpy()), (x + 1).long()):
        splits = load(x, config=DataConfig(limit=20), context=context)
        for part in ("train", "validation", "test"):
            samples = getattr(splits, part)
            assert torch.equal(samples.context, samples.tensor() + 1)
    with pytest.raises(DataError, match="Splits have contexts of their own"):
        load(splits, context=x)
    samples = TensorSamples(x)
    with pytest.raises(DataError, match=r"contexts of shape \(50, 2\) in the validation split: expected \(50, 3\)"):
        Splits("s", samples.carrying(context=torch.zeros(50, 3)), *[samples.carrying(context=x)] * 2, (2,))


def test_data_with_a_test_set_of_its_own_takes_no_context(data_dir: Path) -> None:
    with pytest.raises(DataError, match="mnist has a test set of its own"):
        load("mnist", config=DataConfig(dir=str(data_dir)), context=torch.zeros(60_000, 1))


# -- contexts that samples share -------------------------------------------------------------------------------------


def embeddings(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many contexts each embedding has had, as they come."""
    counts, dynamics = list[int](), flow.blocks[0].dynamics
    embed = dynamics.embed
    monkeypatch.setattr(dynamics, "embed", lambda c: (counts.append(len(c)), embed(c))[1])
    return counts


@pytest.mark.parametrize("name", ["vector", "vector, own module", "images, gated"])
def test_samples_that_share_a_context_are_those_of_a_copy_for_each(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flow, c = FLOWS[name](), contexts_for(3)
    z = torch.randn(3, 40, flow.dim, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    shared = Contexts.repeated(c, 40, (WIDTH,))
    counts = embeddings(flow, monkeypatch)
    monkeypatch.setattr(flow, "chunk", 50)  # from within the second one's samples to within the third's
    with torch.no_grad():
        found = flow.sample(40, c, seed=9)
        assert counts == [2, 2, 1]
        expected = flow.decode(z.flatten(0, 1), shared.whole())
    assert torch.equal(shared.whole(), c.repeat_interleave(40, 0))
    assert error(found.flatten(0, 1).double(), expected.double()) < 1e-9


def test_a_grid_of_values_and_contexts_has_each_context_once(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, c, x = build((3,)), contexts_for(4).requires_grad_(), data_for(build((3,)), 5)[:, None]
    counts = embeddings(flow, monkeypatch)
    found = flow.distribution(c).log_prob(x)
    assert found.shape == (5, 4)
    assert counts == [4]
    copied = c.expand(5, 4, -1).reshape(20, -1)
    expected = flow.log_prob(x.expand(5, 4, -1).reshape(20, -1), copied).reshape(5, 4)
    assert error(found, expected) < 1e-9
    gradients = [torch.autograd.grad(values.sin().sum(), [c, *flow.parameters()]) for values in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        assert error(one, other) < 1e-8


def test_periodic_columns_share_them_too() -> None:
    flow, c = build((2,), columns__period={"0": 6.0}), contexts_for(3)
    x = torch.rand(4, 1, 2, dtype=torch.float64)
    copied = flow.log_prob(x.expand(4, 3, 2).reshape(12, 2), c.repeat(4, 1)).reshape(4, 3)
    assert error(flow.distribution(c).log_prob(x), copied) < 1e-9


# -- torch.distributions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exported", [False, True])
def test_a_batch_of_distributions(exported: bool) -> None:
    flow, context = FLOWS["vector"](), contexts_for(6).reshape(3, 2, WIDTH)
    source = to_torch(flow, {"rtol": 1e-9}) if exported else flow
    density = FlowDistribution(source, context)
    assert (density.batch_shape, density.event_shape) == ((3, 2), (3,))
    x = density.rsample((5,))
    assert x.shape == (5, 3, 2, 3)
    expected = flow.log_prob(x.flatten(0, 2), context.expand(5, 3, 2, WIDTH).flatten(0, 2)).reshape(5, 3, 2)
    assert error(density.log_prob(x), expected) < 1e-6
    one = x[0, 0, 0]  # broadcast over the contexts
    assert error(density.log_prob(one), flow.log_prob(one.expand(6, 3), context.flatten(0, 1)).reshape(3, 2)) < 1e-6
    wide = density.expand((4, 3, 2))
    assert wide.sample((2,)).shape == (2, 4, 3, 2, 3)
    assert wide.log_prob(x[0]).shape == (4, 3, 2)
    with pytest.raises(DataError, match=r"do not go with contexts \(3, 2\)"):
        density.log_prob(torch.zeros(5, 3).double())
    mixture = MixtureSameFamily(Categorical(torch.ones(3, 2).double()), FlowDistribution(source, context))
    assert error(mixture.log_prob(one), density.log_prob(one).logsumexp(-1) - math.log(2)) < 1e-9


def test_a_conditional_transform() -> None:
    flow, context = FLOWS["vector"](), contexts_for(4)
    base = Independent(Normal(torch.zeros(3).double(), torch.ones(3).double()), 1).expand((4,))
    density = TransformedDistribution(base, FlowTransform(flow, context))
    x = density.rsample((2,))
    assert x.shape == (2, 4, 3)
    assert error(density.log_prob(x), FlowDistribution(flow, context).log_prob(x)) < 1e-6


def test_distributions_need_the_context_that_the_flow_takes() -> None:
    with pytest.raises(DataError, match="conditional on 2 features"):
        FLOWS["vector"]().distribution()
    with pytest.raises(DataError, match=r"context of shape \(4, 3\)"):
        FLOWS["vector"]().distribution(torch.zeros(4, 3))
    with pytest.raises(DataError, match="unconditional"):
        Flow.build(Config(), (3,)).distribution(torch.zeros(4, 3))
    with pytest.raises(DataError, match="conditional on 2 features"):
        FlowTransform(to_torch(FLOWS["vector"]()))


@torch.no_grad()
def test_the_distribution_of_one_context() -> None:
    flow, context = FLOWS["vector"](), contexts_for(1)[0]
    density, other = flow.distribution(context), flow.distribution(context + 1)
    assert (density.batch_shape, density.event_shape) == ((), (3,))
    x = density.sample((4,))
    assert x.shape == (4, 3)
    assert error(density.log_prob(x), flow.log_prob(x, context)) < 1e-8
    assert float(torch.distributions.kl_divergence(density, density)) == 0
    assert float(torch.distributions.kl_divergence(density, other)) > 0


# -- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVENTS)
@pytest.mark.parametrize("time", ["concat", "concatsquash", "none"])
def test_rates_are_autograds(kind: str, time: str) -> None:
    dynamics = make(kind, time, context_dim=WIDTH)
    z, probes = torch.randn(3, *EVENTS[kind]).double(), torch.randn(4, *EVENTS[kind]).double()
    context = torch.randn(3, WIDTH).double()
    f, div = LayeredRates(dynamics, context)(0.3, z, probes[:, None])
    full, eps = jacobian(dynamics, 0.3, z, context), probes.flatten(1)
    assert div is not None
    assert error(f, dynamics(0.3, z, context)) < 1e-12
    assert error(div, torch.einsum("ki,bij,kj->b", eps, full, eps)) < 1e-11
    general = ModuleRates(dynamics, context)(0.3, z, probes[:, None])[1]
    assert general is not None
    assert error(div, general) < 1e-11


@torch.no_grad()
def test_module_is_the_flow(flow: Flow) -> None:
    x, context = data_for(flow), contexts_for(4)
    expected = flow.log_prob(x, context, divergence="exact")
    for solver in ({"step_size": 0.05}, {"rtol": 1e-9}):
        module = to_torch(flow, solver, divergence="exact")
        z, _ = module(x, context)
        assert error(module.log_prob(x, context), expected) < 1e-4
        assert error(module.inverse(z, context), x) < 1e-5
    assert list(module.state_dict()) == list(flow.state_dict())
    assert module.sample(3, context).shape == (4, 3, *flow.event_shape)
    z = torch.randn(4, flow.dim, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    assert error(module.sample(4, context[0], seed=1), module.inverse(z, context[:1].expand(4, -1))) < 1e-9


def test_module_under_vmap_and_autograd() -> None:
    module, x, context = to_torch(FLOWS["vector"]()), torch.randn(4, 3).double(), contexts_for(4).requires_grad_()
    each = torch.vmap(lambda one, c: module.log_prob(one[None], c[None])[0])(x, context)
    assert error(each, module.log_prob(x, context)) < 1e-10
    assert torch.autograd.gradcheck(lambda c: module.log_prob(x, c), (context,), eps=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("vector, own module", "encode"),
        ("images, two scales", "encode"),
        ("images, gated", "encode"),
        ("images, gated", "decode"),
        ("vector", "sample"),
    ],
)
def test_programs_take_the_context(name: str, program: str, tmp_path: Path) -> None:
    module = to_torch(FLOWS[name](), {"step_size": 0.5})
    result = export.save(module, tmp_path / "flow.pt2", program=program)
    assert len(result.differences) == (3 if program == "encode" else 1)
    run = torch.export.load(tmp_path / "flow.pt2").module()
    context = contexts_for(7)
    with torch.no_grad():
        z = torch.randn(7, module.dim).double()
        if program == "encode":
            x = module.inverse(z, context)
            assert error(run(x, context)[2], module.log_prob(x, context)) < 1e-9
        elif program == "decode":
            assert error(run(z, context), module.inverse(z, context)) < 1e-9
        else:
            assert run(5, context[0]).shape == (5, *module.event_shape)


@pytest.mark.parametrize(
    ("name", "program"), [("images, gated", "encode"), ("vector, own module", "decode"), ("vector", "sample")]
)
def test_onnx_takes_the_context(name: str, program: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module = to_torch(FLOWS[name]().float(), {"step_size": 0.5})
    path = tmp_path / "flow.onnx"
    export.save(module, path, to="onnx", program=program)
    session = runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    context = contexts_for(7).float()
    with torch.no_grad():
        z = torch.randn(7, module.dim)
        x = module.inverse(z, context)
        if program == "encode":
            found = session.run(None, {"x": x.numpy(), "context": context.numpy()})[2]
            assert error(torch.from_numpy(found), module.log_prob(x, context)) < 2e-3
        elif program == "decode":
            found = session.run(None, {"z": z.numpy(), "context": context.numpy()})[0]
            assert error(torch.from_numpy(found), x) < 1e-3
        else:
            found = session.run(None, {"n": np.asarray(5), "context": context[0].numpy()})[0]
            assert found.shape == (5, *module.event_shape)


@pytest.mark.parametrize("name", [name for name in FLOWS if "own" not in name])
def test_safetensors_keep_the_context(name: str, tmp_path: Path) -> None:
    module, x, context = to_torch(FLOWS[name](), {"step_size": 0.25}), data_for(FLOWS[name]()), contexts_for(4)
    assert export.save(module, tmp_path / "flow.safetensors", to="safetensors").largest < 1e-12
    assert error(export.load(tmp_path / "flow.safetensors").log_prob(x, context), module.log_prob(x, context)) < 1e-12


# -- estimator, scores and command line ------------------------------------------------------------------------------

QUICK: dict[str, Any] = {"hidden": (16,), "max_steps": 150, "learning_rate": 0.02, "random_state": 0}


def test_estimator_with_a_context() -> None:
    x, c = (value.numpy() for value in simulated(1200))
    model = RNODEDensity(**QUICK, calibration_fraction=0.2).fit(x, context=pd.DataFrame(c))
    fresh, given = simulated(300, seed=1)
    gap = exact(fresh, given).numpy() - model.score_samples(fresh.numpy(), given.numpy())
    assert abs(gap.mean()) < 0.25
    assert model.score(fresh.numpy(), context=given.numpy()) == pytest.approx(
        model.score_samples(fresh.numpy(), given.numpy()).sum()
    )
    p = model.p_values(fresh.numpy(), given.numpy())
    assert (p <= 0.1).mean() == pytest.approx(0.1, abs=0.08)
    assert model.sample(4, random_state=0, context=[1.0, -1.0]).shape == (4, 2)
    assert model.sample(4, random_state=0, context=given.numpy()[:3]).shape == (3, 4, 2)
    swapped = model.score_samples(fresh.numpy(), given.numpy()[::-1].copy())
    assert swapped.mean() < model.score_samples(fresh.numpy(), given.numpy()).mean() - 1
    with pytest.raises(DataError, match="conditional on 2 features"):
        model.score_samples(fresh.numpy())
    with pytest.raises(DataError, match=r"context has shape \(3, 2\): expected \(300, m\)"):
        model.score_samples(fresh.numpy(), given.numpy()[:3])


def test_estimator_refuses_unusable_contexts() -> None:
    x, model = np.random.default_rng(0).normal(size=(40, 2)), RNODEDensity(**{**QUICK, "max_steps": 2})
    with pytest.raises(DataError, match=r"pass context\[:, None\]"):
        model.fit(x, context=np.arange(40.0))
    with pytest.raises(DataError, match="context contains NaN"):
        model.fit(x, context=np.full((40, 1), np.nan))
    with pytest.raises(DataError, match=r"expected \(40, m\)"):
        model.fit(x, context=x[:30])
    with pytest.raises(DataError, match="unconditional"):
        model.fit(x).score_samples(x, x)


def test_sample_weights_and_contexts_stay_together() -> None:
    x, c = (value.numpy() for value in simulated(600))
    weight = (np.arange(600) % 3 > 0).astype(float)  # every third sample counts nothing
    broken = np.where(weight[:, None] > 0, c, -c)  # and has a wrong context
    model = RNODEDensity(**QUICK).fit(x, sample_weight=weight, context=broken)
    fresh, given = simulated(300, seed=1)
    assert abs((exact(fresh, given).numpy() - model.score_samples(fresh.numpy(), given.numpy())).mean()) < 0.35


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, c = simulated(100)
    settings = {**SETTINGS, "flow.network.hidden": [4], "max_steps": 3, "batch_size": 20}
    run = tmp_path / "run"
    pyrnode.train(x, context=c, epochs=3, **settings, out=run, progress=False, evaluate=False)
    out = tmp_path / "samples.npy"
    assert main(["sample", str(run), "-n", "5", "--context", "0.5", "-1", "--out", str(out)]) == 0
    assert np.load(out).shape == (5, 2)
    assert main(["sample", str(run), "-n", "5", "--out", str(out)]) != 0
    assert "conditional on 2 features" in capsys.readouterr().err
    assert main(["sample", str(run), "-n", "5", "--context", "0.5", "--out", str(out)]) != 0
    assert "context of shape (1,): expected (2,)" in capsys.readouterr().err
    assert main(["evaluate", str(run)]) != 0
    assert "pyrnode.evaluate(pyrnode.load(run), x, context=c) in Python" in capsys.readouterr().err
    assert main(["score", str(run), "x.npy", "--out", str(out)]) != 0
    assert "scores of files know no context: use flow.log_prob(x, context)" in capsys.readouterr().err
    assert main(["export", str(run), "--to", "safetensors", "--out", str(tmp_path / "flow.safetensors")]) == 0
    assert main(["verify", str(tmp_path / "flow.safetensors")]) == 0
    np.save(tmp_path / "x.npy", x.numpy())
    with pytest.raises(ConfigError, match="scores of files know no context"):
        anomalies.score_file(pyrnode.load(run), tmp_path / "x.npy", tmp_path / "scores.csv")
    assert not (tmp_path / "scores.csv").exists()


def test_both_engines_train_alike(julia_engine: Any) -> None:
    x, c = simulated(200)
    losses = []
    for engine in ("torch", "julia"):
        settings = {**SETTINGS, "flow.network.hidden": [8], "max_steps": 10, "batch_size": 40, "dtype": "float64"}
        settings |= {"solver.sensealg": "Backprop", "engine": engine}
        result = pyrnode.train(x, context=c, epochs=5, **settings, progress=False, evaluate=False)
        losses.append([record["loss"] for record in result.history if "loss" in record])
    assert np.allclose(*losses, rtol=0, atol=1e-9)
