"""Embeddings: networks between contexts and blocks, their gradients, training, files, and what is refused."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pyrnode
from pyrnode import evaluation, export, native
from pyrnode.cli import main
from pyrnode.config import Config, SolverConfig
from pyrnode.contexts import Contexts
from pyrnode.data import load
from pyrnode.distribution import FlowDistribution
from pyrnode.embedding import Embedding, Recipe, check_dividable
from pyrnode.errors import CheckpointError, ConfigError, DataError
from pyrnode.export import to_torch
from pyrnode.files import read, write
from pyrnode.flow import Flow
from pyrnode.native import mlp
from pyrnode.transforms import Standardize
from tests import networks
from tests.networks import Recurrent, convolutional
from tests.test_native_mlp import calls

IMAGE, SERIES = (1, 6, 6), (5, 2)
SETTINGS: dict[str, Any] = {
    "flow.network.hidden": [16],
    "flow.network.activation": "tanh",
    "max_steps": 12,
    "batch_size": 40,
    "learning_rate": 0.01,
    "validate_every": 4,
    "checkpoint_every": 4,
    "penalties.divergence": "exact",
    "solver.step_size": 0.5,
}
QUIET: dict[str, Any] = {"progress": False, "evaluate": False}


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


def images(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Vectors whose mean is where an image is bright: ``(n, 2)``, and the images."""
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(n, *IMAGE, generator=generator)
    brightness = torch.stack([c[:, 0, :3].mean((1, 2)), c[:, 0, 3:].mean((1, 2))], 1)
    return 4 * brightness + 0.2 * torch.randn(n, 2, generator=generator), c


def build(
    embedding: Any = convolutional, shape: tuple[int, ...] = IMAGE, *, dtype: str = "float64", **overrides: Any
) -> Flow:
    """An untrained flow of two columns, moved away from the identity."""
    settings = {
        "flow.network.hidden": [8, 8],
        "flow.network.activation": "tanh",
        "evaluation.solver.rtol": 1e-9,
        "evaluation.solver.atol": 1e-9,
    }
    config = Config().override({**settings, "dtype": dtype, **{k.replace("__", "."): v for k, v in overrides.items()}})
    flow = Flow.build(config, (2,), embedding=embedding, context_shape=shape)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return flow.eval()


def example(flow: Flow, n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return x, torch.randn(n, *flow.context_shape, generator=generator, dtype=torch.float64)


CASES = {"image": (convolutional, IMAGE), "series": (Recurrent, SERIES), "vector": (networks.Tied, (3,))}


@pytest.fixture(params=CASES)
def flow(request: pytest.FixtureRequest) -> Flow:
    return build(*CASES[request.param])


# -- use -------------------------------------------------------------------------------------------------------------


def by_hand(flow: Flow, c: Tensor) -> tuple[Flow, Tensor]:
    """The same blocks without an embedding, and the vectors that it makes."""
    assert flow.embedding is not None
    plain = Flow.build(flow.config, (2,), context_dim=flow.context_dim)
    plain.parts.load_state_dict(flow.parts.state_dict())
    return plain, flow.embedding.network(flow.context_transform(c)[0].to(flow.reference.dtype))


@torch.no_grad()
def test_a_raw_context_is_the_vector_that_the_network_makes_of_it(flow: Flow) -> None:
    x, c = example(flow)
    plain, vectors = by_hand(flow, c)
    plain.context_transform.transforms = nn.ModuleList()
    expected = plain.log_prob(x, vectors)
    assert error(flow.log_prob(x, c), expected) < 1e-9
    assert error(flow.encode(x, c), plain.encode(x, vectors)) < 1e-9
    assert error(flow.decode(x, c), plain.decode(x, vectors)) < 1e-8
    assert error(flow.log_prob(x, c[0]), plain.log_prob(x, vectors[0])) < 1e-9
    assert error(flow.sample(3, c, seed=1), plain.sample(3, vectors, seed=1)) < 1e-8
    assert error(flow.sample(3, c[0], seed=1), plain.sample(3, vectors[0], seed=1)) < 1e-8
    assert error(flow.log_prob(x, c.flip(0)), expected) > 1e-3
    estimate, stated = flow.log_prob(x, c, return_error=True)
    assert error(estimate, expected) < 1e-6
    assert float(stated.max()) < 1e-5
    one, _ = flow.log_prob(x, c[0], return_error=True)
    assert error(one, flow.log_prob(x, c[0])) < 1e-6


@torch.no_grad()
def test_distributions_and_modules_take_raw_contexts(flow: Flow) -> None:
    x, c = example(flow)
    grid = FlowDistribution(flow, c.reshape(3, 2, *flow.context_shape))
    assert (grid.batch_shape, grid.sample((4,)).shape) == ((3, 2), (4, 3, 2, 2))
    expected = torch.stack([flow.log_prob(x, each) for each in c], 1).reshape(6, 3, 2)
    assert error(grid.log_prob(x[:, None, None]), expected) < 1e-8
    module = to_torch(flow, {"rtol": 1e-9})
    assert error(module.log_prob(x, c), flow.log_prob(x, c)) < 1e-7
    assert error(module.log_prob(x, c[0]), flow.log_prob(x, c[0])) < 1e-7
    assert error(module.sample(3, c, seed=1), flow.sample(3, c, seed=1)) < 1e-6
    assert error(FlowDistribution(module, c).log_prob(x), flow.log_prob(x, c)) < 1e-7


@torch.no_grad()
def test_each_context_is_embedded_once_however_many_samples_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, counts = build(), list[int]()
    assert flow.embedding is not None
    forward = flow.embedding.network.forward
    monkeypatch.setattr(flow.embedding.network, "forward", lambda c: (counts.append(len(c)), forward(c))[1])
    x, c = example(flow)
    flow.log_prob(x, c[0])
    flow.sample(50, c[:3])
    flow.distribution(c[:4]).log_prob(x[:, None])
    to_torch(flow).sample(20, c[:2])
    assert counts[:3] == [1, 3, 4]


@torch.no_grad()
def test_many_samples_in_pieces() -> None:
    flow = build()
    x, c = example(flow, 20)
    whole = flow.log_prob(x, c), flow.sample(9, c[:3], seed=0)
    flow.chunk = 7
    assert error(flow.log_prob(x, c), whole[0]) < 1e-9
    assert error(flow.sample(9, c[:3], seed=0), whole[1]) < 1e-9


@torch.no_grad()
def test_periodic_columns_take_them_too() -> None:
    flow = build(columns__period={"0": 6.0})
    x, c = example(flow)
    each = torch.stack([flow.log_prob(x[i : i + 1], c[i])[0] for i in range(6)])
    assert error(flow.log_prob(x, c), each) < 1e-8
    moved = x + torch.tensor([6.0, 0.0])
    assert error(flow.log_prob(moved, c), each) < 1e-6


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (None, r"conditional on contexts of shape \(1, 6, 6\): .* context, \(1, 6, 6\) for one .* or \(6, 1, 6, 6\)"),
        (torch.zeros(6, 6, 6), r"context of shape \(6, 6, 6\): expected \(1, 6, 6\) for one"),
        (torch.zeros(5, 1, 6, 6), r"context of shape \(5, 1, 6, 6\): expected"),
        (torch.zeros(6, 3), r"context of shape \(6, 3\)"),
        (torch.full((6, 1, 6, 6), torch.nan), "the context has NaN or infinite values"),
    ],
)
def test_contexts_that_do_not_fit(context: Tensor | None, message: str) -> None:
    flow, x = build(dtype="float32"), torch.zeros(6, 2)
    for call in (flow.log_prob, flow.encode, flow.decode, to_torch(flow).log_prob):
        with pytest.raises(DataError, match=message):
            call(x, context)
    if context is None:
        with pytest.raises(DataError, match="conditional on contexts of shape"):
            flow.distribution()


def test_integers_are_contexts_as_they_are() -> None:
    flow = build(dtype="float32")
    x, c = torch.zeros(4, 2), torch.randint(0, 255, (4, *IMAGE), dtype=torch.uint8)
    assert error(flow.log_prob(x, c), flow.log_prob(x, c.float())) == 0


# -- gradients -------------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "fixed steps": {"name": "RK4", "step_size": 0.25, "adaptive": False},
    "fixed steps, stored": {"name": "RK4", "step_size": 0.25, "adaptive": False, "memory": "store"},
    "fixed steps, checkpointed": {"name": "RK4", "step_size": 0.25, "adaptive": False, "memory": "checkpoint"},
    "adaptive": {"name": "DP5", "rtol": 1e-9, "atol": 1e-9},
    "adaptive, checkpointed": {"name": "DP5", "rtol": 1e-9, "atol": 1e-9, "memory": "checkpoint"},
    "backsolve": {"name": "DP5", "rtol": 1e-10, "atol": 1e-10, "sensealg": "BacksolveAdjoint"},
}


def gradients(flow: Flow, solver: dict[str, Any], *, shared: bool = False) -> dict[str, Tensor]:
    """Of the embedding's parameters, and of the contexts."""
    x, c = example(flow)
    c.requires_grad_()
    context: Any = Contexts(c[:2], torch.tensor([0, 1, 1, 0, 1, 0])) if shared else c
    x, context = flow.admit(x, context)
    passage = flow.solve(x, flow.draw(flow.divergence, None), SolverConfig(**solver), context=context)  # type: ignore[arg-type]
    value = (passage.log_prob + 0.1 * passage.total("E") + 0.1 * passage.total("n")).sum()
    assert flow.embedding is not None
    named = {"context": c, **dict(flow.embedding.named_parameters())}
    return dict(zip(named, torch.autograd.grad(value, list(named.values())), strict=True))


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_reach_the_embedding(way: str, shared: bool, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every memory mode, with and without the kernels in C: those of an accurate solve by plain operations."""
    monkeypatch.setenv(native.VARIABLE, "0")
    expected = gradients(build(), WAYS["adaptive"], shared=shared)
    if kernels:
        monkeypatch.delenv(native.VARIABLE)
    called = calls(monkeypatch)
    found = gradients(build(), WAYS[way], shared=shared)
    assert bool(called) == (kernels and way in ("fixed steps", "adaptive") and mlp.library(torch.float64) is not None)
    tolerance = 2e-3 if "fixed" in way else 1e-5
    for name, value in expected.items():
        assert float(value.abs().max()) > 1e-3, name
        assert error(found[name], value) < tolerance * max(1.0, float(value.abs().max())), name


@pytest.mark.parametrize("kind", ["images", "potential"])
def test_gradients_reach_it_through_the_other_kernels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of convolutional networks, and of potentials: those that finite differences give, and those without kernels."""
    generator = torch.Generator().manual_seed(4)
    config = Config().override({"flow.network.hidden": [4, 4], "flow.network.activation": "softplus", "scales": 1})
    if kind == "potential":
        config = config.override({"flow.network.kind": "potential", "flow.network.rank": 2})
    shape, levels = ((2,), None) if kind == "potential" else ((1, 4, 4), 9)
    flow = Flow.build(config, shape, levels=levels, embedding=Recurrent, context_shape=SERIES)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    x = torch.rand(5, *shape, generator=generator) * (9 if levels else 1)
    c = torch.randn(5, *SERIES, generator=generator)
    solver, found = SolverConfig(name="RK4", step_size=0.25, adaptive=False), []
    assert flow.embedding is not None
    for variable in ("0", "1"):
        monkeypatch.setenv(native.VARIABLE, variable)
        value = flow.log_prob(x, c, solver=solver, divergence="exact" if levels is None else "hutchinson").sum()
        found.append(torch.autograd.grad(value, list(flow.embedding.parameters())))
    for one, other in zip(*found, strict=True):
        assert float(one.abs().max()) > 1e-3
        assert error(one, other) < 1e-3 * max(1.0, float(one.abs().max()))


def test_gradients_are_those_of_finite_differences() -> None:
    flow = build(Recurrent, SERIES)
    x, c = example(flow, 3)
    assert flow.embedding is not None
    weight = flow.embedding.network.get_parameter("cells.weight_ih_l0")
    (found,) = torch.autograd.grad(flow.log_prob(x, c).sum(), weight)
    for place in ((0, 0), (5, 1), (11, 0)):
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight[place] += step
                values.append(float(flow.log_prob(x, c).sum()))
                weight[place] -= step
        assert float(found[place]) == pytest.approx((values[0] - values[1]) / 2e-5, abs=1e-5)


def test_potentials_and_the_users_own_dynamics_train_it_too() -> None:
    flow = build(flow__network__kind="potential", flow__network__activation="logcosh", flow__network__rank=2)
    found = gradients(flow, WAYS["fixed steps, stored"])
    assert all(float(value.abs().max()) > 1e-4 for value in found.values())

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2 + 3, 2)

        def forward(self, t: Tensor, z: Tensor, c: Tensor) -> Tensor:
            return torch.tanh(self.linear(torch.cat([z, c], 1)))

    x, c = images(60)
    result = pyrnode.train(x, context=c, embedding=convolutional, dynamics=lambda _: Own(), **SETTINGS, **QUIET)
    before = Embedding.build(Recipe.of(convolutional), IMAGE, torch.float32, 0)
    assert result.flow.embedding is not None
    assert error(result.flow.embedding.network[0].weight, before.network[0].weight) > 1e-3  # type: ignore[index]


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "soap"])
def test_the_optimiser_has_its_parameters_with_decay_clipping_and_average(optimizer: str) -> None:
    x, c = images(200)
    rate = 1.0 if optimizer == "sgd" else 0.01
    settings = {**SETTINGS, "max_steps": 4, "optimizer": optimizer, "learning_rate": rate, "weight_decay": 0.0}
    runs = {}
    for name, more in {
        "plain": {},
        "decay": {"weight_decay": 0.5},
        "clipped": {"clip_norm": 1e-6},
        "average": {"ema": 0.9},
    }.items():
        given = {**settings, "clip_norm": None, "ema": None, **more}
        flow = pyrnode.train(x, context=c, embedding=convolutional, **given, **QUIET).flow
        runs[name] = flow.state_dict()["embedding.network.0.weight"]
    start = Embedding.build(Recipe.of(convolutional), IMAGE, torch.float32, 0).network.state_dict()["0.weight"]
    assert error(runs["plain"], start) > 1e-5
    assert error(runs["decay"], runs["plain"]) > 1e-5
    if optimizer == "sgd":
        assert error(runs["clipped"], start) < 4e-6 < error(runs["plain"], start)
    assert error(runs["average"], runs["plain"]) > 1e-6


def test_training_finds_a_density_that_depends_on_an_image(tmp_path: Path) -> None:
    x, c = images(1500)
    settings = {**SETTINGS, "max_steps": 250, "batch_size": 150, "validate_every": 50, "schedule": "cosine"}
    result = pyrnode.train(
        x, context=c, embedding=convolutional, epochs=500, **settings, progress=False, out=tmp_path / "run"
    )
    fresh, given = images(400, seed=1)
    with torch.no_grad():
        score = float(result.flow.log_prob(fresh, given).mean())
        mixed = float(result.flow.log_prob(fresh, given.flip(0)).mean())
    entropy = 2 * (np.log(0.2) + 0.5 * np.log(2 * np.pi * np.e))
    assert score == pytest.approx(-entropy, abs=0.35)
    assert mixed < score - 3
    assert result.report is not None
    report = evaluation.evaluate(result.flow, fresh, context=given)
    assert report.score.nats == pytest.approx(score, abs=1e-4)
    loaded = pyrnode.load(tmp_path / "run", embedding=convolutional)
    assert error(loaded.log_prob(fresh, given), result.flow.log_prob(fresh, given)) == 0
    card = (tmp_path / "run" / "model_card.md").read_text()
    assert "given a context of shape 1×6×6, from which an embedding network makes 3 features" in card
    assert "embedding='tests.networks:convolutional'" in card


def test_vectors_are_standardised_before_it_and_other_shapes_are_not() -> None:
    x, c = images(100)
    flow = pyrnode.train(x, context=c, embedding=convolutional, **SETTINGS, **QUIET).flow
    assert len(flow.context_transform.transforms) == 0
    vectors = 1000 + 50 * c.flatten(1)[:, :3].double()
    flow = pyrnode.train(x, context=vectors, embedding=networks.Tied, **SETTINGS, **QUIET).flow
    (standardize,) = flow.context_transform.transforms
    assert isinstance(standardize, Standardize)
    assert error(standardize.mean, torch.full((3,), 1000.0).double()) < 30


@pytest.mark.parametrize("given", ["factory", "module"])
def test_a_run_with_dropout_and_running_means_resumes_bit_for_bit(given: str, tmp_path: Path) -> None:
    made = functools.partial(convolutional, dropout=0.3, normalised=True)
    x, c = images(200)

    def run(out: str, steps: int, **more: Any) -> Flow:
        torch.manual_seed(steps)  # what the global generator is at does not count
        embedding = made if given == "factory" else fixed
        settings = {**SETTINGS, "max_steps": 12, "ema": 0.9}
        stop = Stop(steps)
        return pyrnode.train(
            x, context=c, embedding=embedding, out=tmp_path / out, callbacks=stop, **settings, **more, **QUIET
        ).flow

    torch.manual_seed(0)
    fixed = made()
    full = run("whole", 100)
    run("parts", 6)
    again = run("parts", 100, resume=True)
    assert full.embedding is not None
    assert "embedding.network.1.running_mean" in full.state_dict()
    for (name, a), (_, b) in zip(full.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert (tmp_path / "parts" / "model.safetensors").exists() == (given == "factory")


class Stop(pyrnode.Callback):
    """Ends training after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_start(self, run: pyrnode.TrainingRun) -> None:
        self.run = run

    def on_step(self, record: dict[str, Any]) -> None:
        if record["step"] == self.steps:
            self.run.stop()


def test_a_restart_puts_the_embedding_back() -> None:
    """Its weights and its running means, which a batch that fails has spoilt."""
    broken = {"at": 6}

    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = convolutional(normalised=True)
            self.calls = 0

        def forward(self, c: Tensor) -> Tensor:
            out: Tensor = self.inner(c)
            if self.training:
                broken["at"] -= 1
                if broken["at"] == 0:
                    self.inner[1].running_mean.fill_(torch.nan)  # type: ignore[index]
                    return out * torch.nan
            return out

    x, c = images(200)
    result = pyrnode.train(x, context=c, embedding=Once, **SETTINGS, **QUIET)
    assert [r["event"] for r in result.history if r.get("event") == "restart"] == ["restart"]
    assert all(bool(torch.isfinite(value).all()) for value in result.flow.state_dict().values())
    assert result.history[-1]["step"] == 12


def test_validation_and_use_are_without_dropout() -> None:
    x, c = images(200)
    made = functools.partial(convolutional, dropout=0.5)
    result = pyrnode.train(x, context=c, embedding=made, **SETTINGS, **QUIET)
    assert not result.flow.training
    one, other = (result.flow.log_prob(x, c) for _ in range(2))
    assert torch.equal(one, other)
    held = load(x, context=c).validation
    value = -result.flow.log_prob(held.tensor(), held.context, divergence="exact").mean() / 2
    best = min(r["validation"] for r in result.history if "validation" in r)
    assert float(value.detach()) == pytest.approx(best, abs=1e-4)


def test_a_module_is_copied_and_lazy_layers_are_made() -> None:
    x, c = images(100)
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(4), nn.Tanh())
    flow = pyrnode.train(x, context=c, embedding=lazy, **SETTINGS, **QUIET).flow
    assert flow.context_dim == 4
    assert isinstance(lazy[1].weight, nn.UninitializedParameter)
    module = convolutional()
    before = module.state_dict()["0.weight"].clone()
    flow = pyrnode.train(x, context=c, embedding=module, **SETTINGS, **QUIET).flow
    assert torch.equal(module.state_dict()["0.weight"], before)
    assert error(flow.state_dict()["embedding.network.0.weight"], before) > 1e-4


def test_validation_rows_of_ones_own_bring_images() -> None:
    (x, c), (held, given) = images(100), images(30, seed=3)
    more = {"validation": held, "validation_context": given}
    result = pyrnode.train(x, context=c, embedding=convolutional, **more, **SETTINGS, **QUIET)
    value = -result.flow.log_prob(held, given, divergence="exact").mean() / 2
    best = min(r["validation"] for r in result.history if "validation" in r)
    assert float(value.detach()) == pytest.approx(best, abs=1e-4)
    with pytest.raises(DataError, match=r"validation_context has shape \(30, 2\): expected \(30, 1, 6, 6\)"):
        pyrnode.train(x, context=c, validation=held, validation_context=held, embedding=convolutional, **QUIET)


@pytest.mark.parametrize(
    ("embedding", "context", "message"),
    [
        (None, IMAGE, r"contexts of shape \(1, 6, 6\): a flow takes vectors, \(n, m\); pass embedding="),
        (networks.TimeFirst, SERIES, "other features beside others than alone: .*batch_first=True"),
        (nn.GRU(2, 3), SERIES, "gives a tuple for 2 contexts: .*of a recurrent network take the last state"),
        (nn.Identity(), IMAGE, r"gives \(2, 1, 6, 6\) of torch.float32 .*end it with nn.Flatten"),
        (nn.Linear(7, 2), IMAGE, r"fails on contexts of shape \(2, 1, 6, 6\): RuntimeError"),
        (networks.failing, IMAGE, "tests.networks:failing failed with OSError: no weights for 3 features"),
        (networks.no_module, IMAGE, "tests.networks:no_module gives a int: expected an nn.Module"),
        (3, IMAGE, "embedding = 3: expected an nn.Module, a function or class"),
        ("tests.networks", IMAGE, "expected 'module:function'"),
        ("tests.networks:nothing", IMAGE, "cannot be imported: AttributeError"),
        (functools.partial(convolutional, 4), IMAGE, "give settings by their names"),
        (convolutional, None, "embedding is given, but no context"),
    ],
)
def test_what_cannot_be_an_embedding(embedding: Any, context: tuple[int, ...] | None, message: str) -> None:
    x = images(50)[0]
    c = None if context is None else torch.randn(50, *context, generator=torch.Generator().manual_seed(0))
    with pytest.raises((ConfigError, DataError), match=message):
        pyrnode.train(x, context=c, embedding=embedding, **SETTINGS, **QUIET)


def test_dropout_is_drawn_anew_in_each_step() -> None:
    drawn = list[float]()

    class Noted(Rectified):
        def forward(self, c: Tensor) -> Tensor:
            if self.training:
                drawn.append(float(torch.rand(())))
            return super().forward(c)

    x, c = images(60)
    pyrnode.train(x, context=c, embedding=Noted, **SETTINGS, **QUIET)
    assert len(set(drawn)) == len(drawn) >= 12


@torch.no_grad()
def test_a_vector_that_all_samples_share_is_standardised_too() -> None:
    x, c = images(60)
    flow = pyrnode.train(x, context=7 + 3 * c.flatten(1)[:, :3], embedding=networks.Tied, **SETTINGS, **QUIET).flow
    one = 7 + c.flatten(1)[0, :3]
    assert error(flow.log_prob(x, one), flow.log_prob(x, one.expand(60, 3))) < 1e-5


class Rectified(nn.Module):
    """Writes to its input, as ``nn.ReLU(inplace=True)`` in the first place does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(36, 3)

    def forward(self, c: Tensor) -> Tensor:
        vectors: Tensor = self.linear(c.relu_().sub_(1).flatten(1))
        return vectors


def test_what_writes_to_its_input_does_not_write_to_the_users_data() -> None:
    x, c = images(60)
    kept = c.clone()
    flow = pyrnode.train(x, context=c, embedding=Rectified, **SETTINGS, **QUIET).flow
    one, other = (flow.log_prob(x, c) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(flow.log_prob(x[:1], c[0]), one[:1])
    assert torch.equal(c, kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_features_of_another_type_are_refused(dtype: torch.dtype) -> None:
    class Other(Rectified):
        def forward(self, c: Tensor) -> Tensor:
            return super().forward(c).to(dtype)

    x, c = images(60)
    with pytest.raises(ConfigError, match=f"gave {dtype} for contexts of torch.float32: it must compute in the type"):
        pyrnode.train(x, context=c, embedding=Other, **SETTINGS, **QUIET)


@pytest.mark.parametrize("embedding", [networks.Centred, networks.Unbounded])
def test_an_embedding_is_tried_on_more_than_two_contexts(embedding: Any) -> None:
    """The first two of which may be the same, and hide that rows are mixed."""
    contexts = torch.zeros(6, 4)
    contexts[3:] = 1
    made = Embedding.build(Recipe.of(embedding), (4,), torch.float32, 0)
    with pytest.raises(ConfigError, match=r"beside others than alone|NaN or infinite features"):
        made.check(contexts)
    x, c = images(60)
    c[:] = c[:1]
    c[::3] = 1
    flags = r"beside others than alone|NaN or infinite features"
    with pytest.raises(ConfigError, match=flags):
        pyrnode.train(x, context=c.flatten(1)[:, :4], embedding=embedding, **SETTINGS, **QUIET)


@pytest.mark.parametrize(("offset", "dtype"), [(1e9, torch.float64), (1e6, torch.float32), (1e3, torch.float64)])
def test_images_that_only_rounding_tells_apart_are_refused(offset: float, dtype: torch.dtype) -> None:
    x, c = images(60)
    c = c.to(dtype) * (1e-4 if offset == 1e3 else 1.0) + offset
    with pytest.raises(DataError, match=r"the contexts differ by .* which is rounding in float32: subtract their mean"):
        pyrnode.train(x, context=c, embedding=convolutional, **SETTINGS, **QUIET)
    settings = {**SETTINGS, "dtype": "float64", "max_steps": 2}
    if dtype == torch.float64:
        pyrnode.train(x, context=c, embedding=convolutional, **settings, **QUIET)
    same = pyrnode.train(x, context=torch.full_like(c, offset), embedding=convolutional, **settings, **QUIET)
    assert "context: all training samples have the same one, so nothing can be learned of it" in same.notes


def test_what_depends_on_how_a_batch_is_divided_is_for_one_process() -> None:
    check_dividable(build().embedding)
    check_dividable(None)
    with pytest.raises(ConfigError, match=r"network\.1 normalises by the batch, .* take nn.GroupNorm or nn.LayerNorm"):
        check_dividable(build(functools.partial(convolutional, normalised=True)).embedding)


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_file_names_what_made_it_and_loading_names_it_too(case: str, tmp_path: Path) -> None:
    made, shape = CASES[case]
    flow, path = build(made, shape), tmp_path / "flow.safetensors"
    flow.save(path)
    x, c = example(flow)
    name = f"tests.networks:{made.__qualname__}"
    for given in (made, name):
        assert error(pyrnode.load(path, embedding=given).log_prob(x, c), flow.log_prob(x, c)) == 0
    again = pyrnode.load(path, embedding=made)
    again.save(tmp_path / "again.safetensors")
    assert read(tmp_path / "again.safetensors", "flow")[1] == read(path, "flow")[1]
    with pytest.raises(ConfigError, match=f"code is not in the file. It was made by '{name}' with {{}}"):
        pyrnode.load(path)
    with pytest.raises(ConfigError, match="expected the function or class"):
        pyrnode.load(path, embedding=made())


def test_settings_are_the_files(tmp_path: Path) -> None:
    flow, path = build(functools.partial(convolutional, channels=2, features=5)), tmp_path / "flow.safetensors"
    flow.save(path)
    x, c = example(flow)
    loaded = pyrnode.load(path, embedding=convolutional)
    assert loaded.context_dim == 5
    assert error(loaded.log_prob(x, c), flow.log_prob(x, c)) == 0
    with pytest.raises(CheckpointError, match="Recurrent failed with TypeError"):
        pyrnode.load(path, embedding=Recurrent)
    plain = Flow.build(Config(), (2,))
    plain.save(tmp_path / "plain.safetensors")
    with pytest.raises(ConfigError, match="has no embedding: leave embedding out"):
        pyrnode.load(tmp_path / "plain.safetensors", embedding=convolutional)


def test_nothing_is_imported_or_called_on_a_files_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that names a function of the system's, or a module that would leave a mark, runs neither."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "a_trap.py").write_text("open('caught', 'w').close()\ndef made(**_): open('caught', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    build().save(tmp_path / "flow.safetensors")
    tensors, description = read(tmp_path / "flow.safetensors", "flow")
    for factory, settings in (("a_trap:made", {}), ("os:system", {"command": "touch caught"}), (3, "x"), (None, None)):
        description["embedding"] = {"factory": factory, "settings": settings, "shape": [1, 6, 6]}
        write(tmp_path / "bad.safetensors", "flow", tensors, description)
        with pytest.raises(ConfigError, match="code is not in the file"):
            pyrnode.load(tmp_path / "bad.safetensors")
        with contextlib.suppress(CheckpointError):
            pyrnode.load(tmp_path / "bad.safetensors", embedding=convolutional)
        assert main(["sample", str(tmp_path / "bad.safetensors"), "--out", str(tmp_path / "x.npy")]) != 0
    assert not (tmp_path / "caught").exists()


@pytest.mark.parametrize("shape", [None, [], [0, 6, 6], "1", [1, 6], [2**40, 6, 6], [1.5]])
def test_shapes_that_are_none_are_a_damaged_file(shape: Any, tmp_path: Path) -> None:
    build().save(tmp_path / "flow.safetensors")
    tensors, description = read(tmp_path / "flow.safetensors", "flow")
    description["embedding"]["shape"] = shape
    write(tmp_path / "bad.safetensors", "flow", tensors, description)
    if shape == [1, 6]:  # of which the tensors know nothing: the contexts then do not fit
        loaded = pyrnode.load(tmp_path / "bad.safetensors", embedding=convolutional)
        with pytest.raises(DataError, match=r"expected \(1, 6\)"):
            loaded.log_prob(torch.zeros(2, 2), torch.zeros(2, 1, 6, 6))
        return
    with pytest.raises(CheckpointError, match="the embedding's shape"):
        pyrnode.load(tmp_path / "bad.safetensors", embedding=convolutional)


@pytest.mark.parametrize(
    "embedding",
    [
        convolutional(),
        lambda: convolutional(),
        functools.partial(convolutional, channels=np.int64(4)),
        functools.partial(nn.Sequential),
    ],
    ids=["module", "lambda", "no plain settings", "partial without settings"],
)
def test_what_no_file_can_name_is_refused_with_the_remedy(embedding: Any, tmp_path: Path) -> None:
    if isinstance(embedding, functools.partial) and embedding.func is nn.Sequential:
        assert Recipe.of(embedding).described() == {"factory": "torch.nn.modules.container:Sequential", "settings": {}}
        return
    with pytest.raises(ConfigError, match=r"give a function or class at the top level of a module, functools\.partial"):
        build(embedding).save(tmp_path / "flow.safetensors")
    x, c = images(60)
    result = pyrnode.train(x, context=c, embedding=embedding, out=tmp_path / "run", **SETTINGS, **QUIET)
    assert "the run has no model file" in result.notes[0]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    with pytest.raises(ConfigError, match="embeddings with a name"):
        pyrnode.train(x, context=c, embedding=embedding, out=tmp_path / "b", snapshots=True, **SETTINGS, **QUIET)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flow, path = build(networks.Tied, (3,)), tmp_path / "flow.safetensors"
    flow.save(path)
    out, named = tmp_path / "x.npy", ["--embedding", "tests.networks:Tied"]
    assert main(["sample", str(path), "-n", "4", "--context", "1", "2", "3", "--out", str(out), *named]) == 0
    assert np.load(out).shape == (4, 2)
    assert main(["sample", str(path), "-n", "4", "--context", "1", "2", "3", "--out", str(out)]) != 0
    assert "code is not in the file" in capsys.readouterr().err
    program = tmp_path / "flow.pt2"
    assert main(["export", str(path), "--to", "torch.export", "--out", str(program), *named]) == 0
    assert main(["verify", str(program), "--trust"]) == 0


# -- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["encode", "decode", "sample"])
@pytest.mark.parametrize("case", ["image", "series"])
def test_programs_hold_the_embedding(case: str, program: str, tmp_path: Path) -> None:
    flow = build(*CASES[case])
    module = to_torch(flow, {"step_size": 0.5})
    export.save(module, tmp_path / "flow.pt2", program=program)
    run = torch.export.load(tmp_path / "flow.pt2").module()
    x, c = example(flow, 7)
    with torch.no_grad():
        if program == "encode":
            assert error(run(x, c)[2], module.log_prob(x, c)) < 1e-9
        elif program == "decode":
            assert error(run(x, c), module.inverse(x, c)) < 1e-9
        else:
            assert run(5, c[0]).shape == (5, 2)


@pytest.mark.parametrize("case", ["image", "series"])
def test_onnx_holds_the_embedding(case: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    flow = build(*CASES[case], dtype="float32")
    module, path = to_torch(flow, {"step_size": 0.5}), tmp_path / "flow.onnx"
    export.save(module, path, to="onnx")
    session = runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    x, c = (value.float() for value in example(flow, 7))
    found = session.run(None, {"x": x.numpy(), "context": c.numpy()})[2]
    assert error(torch.from_numpy(found), module.log_prob(x, c)) < 1e-4


def test_a_description_cannot_hold_code(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"an embedding is code, .*export to torch.export or onnx"):
        export.save(to_torch(build()), tmp_path / "flow.safetensors", to="safetensors")


# -- the other engine ------------------------------------------------------------------------------------------------


def test_julia_has_the_vector_and_gives_its_gradient_back(julia_engine: Any) -> None:
    """The embedding is Python's: a context is the same all along a solve."""
    ours, theirs = (build(engine=engine) for engine in ("torch", "julia"))
    solver = {"name": "DP5", "rtol": 1e-9, "atol": 1e-9, "sensealg": "Backprop"}
    expected, found = gradients(ours, solver), gradients(theirs, solver)
    for name, value in expected.items():
        assert error(found[name], value) < 1e-5 * max(1.0, float(value.abs().max())), name
    x, c = example(ours)
    assert error(theirs.log_prob(x, c), ours.log_prob(x, c)) < 1e-6
    (x, c), losses = images(120), []
    for engine in ("torch", "julia"):
        settings = {**SETTINGS, "dtype": "float64", "solver.sensealg": "Backprop", "engine": engine}
        result = pyrnode.train(x, context=c, embedding=convolutional, **settings, **QUIET)
        losses.append([record["loss"] for record in result.history if "loss" in record])
    assert np.allclose(*losses, rtol=0, atol=1e-9)


def test_what_a_description_says_is_plain() -> None:
    described: Callable[[Any], Any] = lambda given: Recipe.of(given).described()  # noqa: E731
    expected = {"factory": "tests.networks:convolutional", "settings": {"features": 7}}
    assert described(functools.partial(convolutional, features=7)) == expected
    assert json.loads(json.dumps(expected)) == expected
    assert described("tests.networks:Recurrent") == {"factory": "tests.networks:Recurrent", "settings": {}}
    assert described(functools.partial(convolutional, features=(1, 2))) is None
    assert described(functools.partial(convolutional, features=float("nan"))) is None
