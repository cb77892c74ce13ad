"""Data far from zero, in tiny or huge units, and of every type: nothing is rounded before it is centred."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pyrnode
from pyrnode import Config, Flow
from pyrnode.transforms import Chain, Standardize

SMALL = {"engine": "torch", "device": "cpu", "max_steps": 20, "hidden": [8], "batch_size": 50, "validate_every": 10}


def gaussian(x: Tensor) -> tuple[Flow, torch.distributions.Normal]:
    """An untrained flow, which is the Gaussian of the data's moments, and that."""
    config = Config().override({"engine": "torch", "flow.network.hidden": [4]})
    transform = Chain([Standardize.fit(x)])
    flow = Flow.build(config, (x.shape[1],), transform=transform, data_dtype=x.dtype)
    flow.requires_grad_(False)
    return flow, torch.distributions.Normal(x.double().mean(0), x.double().std(0, correction=0))


@pytest.mark.parametrize(
    ("offset", "scale"), [(0, 1), (1e4, 1), (1e6, 1), (1.7e9, 1), (5, 1e-12), (0, 1e44), (0, 1e-46)]
)
def test_an_untrained_flow_is_the_gaussian_of_its_data(offset: float, scale: float) -> None:
    """It was off by 1.9e-3 nats at offset 1e4, 0.14 at 1e6, 4.9 at 1e9, while its stated error was 1e-6."""
    x = offset + scale * torch.randn(1000, 2, dtype=torch.float64)
    flow, truth = gaussian(x)
    expected = truth.log_prob(x).sum(1)
    tolerance = 2e-5 * max(1.0, float(expected.abs().max()) / 10)
    assert float((flow.log_prob(x).double() - expected).abs().max()) < tolerance
    with torch.no_grad():
        estimate, error = flow.log_prob(x[:20], return_error=True)
    assert float((estimate.double() - expected[:20]).abs().max()) < tolerance
    assert float((flow.distribution().log_prob(x[:20]).double() - expected[:20]).abs().max()) < tolerance
    module = flow.to_torch()
    assert float((module.log_prob(x[:20]).double() - expected[:20]).abs().max()) < tolerance
    assert torch.isfinite(error).all()


def test_neighbours_far_from_zero_have_densities_of_their_own() -> None:
    """The same log-density stood at 1.7e9, 1.7e9 + 1 and 1.7e9 − 3."""
    x = torch.randn(1000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1.7e9
    result = pyrnode.train(x, progress=False, **SMALL)
    here, near, away = result.flow.log_prob(1.7e9 + torch.tensor([[0.0], [1.0], [-3.0]], dtype=torch.float64)).tolist()
    assert here == pytest.approx(-0.5 * math.log(2 * math.pi), abs=0.2)
    assert near == pytest.approx(here - 0.5, abs=0.3)
    assert away == pytest.approx(here - 4.5, abs=1.5)
    assert result.report is not None
    shifted = pyrnode.train(x - 1.7e9, progress=False, **SMALL)
    assert shifted.report is not None
    assert result.report.score.nats == pytest.approx(shifted.report.score.nats, abs=1e-4)
    for name, score in result.report.baselines.items():
        assert score.nats == pytest.approx(shifted.report.baselines[name].nats, abs=1e-3), name


@torch.no_grad()
def test_samples_come_in_the_type_of_the_data() -> None:
    x = torch.randn(500, 1, dtype=torch.float64) + 1.7e9
    flow, _ = gaussian(x)
    samples = flow.sample(2000, seed=0)
    assert samples.dtype == torch.float64
    assert float(samples.mean() - 1.7e9) == pytest.approx(0, abs=0.2)
    assert float(samples.std()) == pytest.approx(1, abs=0.1)  # in float32 they were multiples of 128
    assert float((flow.decode(flow.encode(x)) - x).abs().max()) < 1e-5
    density = flow.distribution()
    assert density.sample((5,)).dtype == torch.float64
    module = flow.to_torch()
    assert float((module.inverse(module(x)[0]) - x).abs().max()) < 1e-5
    single, _ = gaussian((x - 1.7e9).float())
    assert single.sample(3, seed=0).dtype == torch.float32


@torch.no_grad()
def test_precision_survives_files_types_and_exports(tmp_path: Path) -> None:
    x = torch.randn(400, 2, dtype=torch.float64) + torch.tensor([1.7e9, 6e6], dtype=torch.float64)
    flow, truth = gaussian(x)
    expected = truth.log_prob(x).sum(1)
    flow.save(tmp_path / "flow.safetensors")
    loaded = pyrnode.load(tmp_path / "flow.safetensors")
    assert torch.equal(loaded.log_prob(x), flow.log_prob(x))
    assert loaded.sample(3, seed=0).dtype == torch.float64
    for changed in (flow.double(), flow.float(), flow.to(torch.float64).to(torch.float32)):
        assert float((changed.log_prob(x).double() - expected).abs().max()) < 1e-4
    module = flow.to_torch()
    pyrnode.export.save(module, tmp_path / "module.safetensors", to="safetensors")
    again = pyrnode.export.load(tmp_path / "module.safetensors")
    assert float((again.log_prob(x).double() - expected).abs().max()) < 1e-4
    assert again.sample(3, seed=0).dtype == torch.float64
    pyrnode.export.save(module, tmp_path / "module.pt2", to="torch.export")


def test_contexts_far_from_zero() -> None:
    """Seconds since 1970: the conditional means at 5 s and at 55 s were equal."""
    generator = torch.Generator().manual_seed(0)
    seconds = 60 * torch.rand(2000, 1, dtype=torch.float64, generator=generator)
    x = (seconds / 10 + 0.1 * torch.randn(2000, 1, dtype=torch.float64, generator=generator)).float()
    settings = SMALL | {
        "max_steps": 300,
        "batch_size": 200,
        "hidden": [16],
        "learning_rate": 0.02,
        "validate_every": 100,
    }
    flow = pyrnode.train(x, context=seconds + 1.7e9, evaluate=False, progress=False, **settings).flow
    means = [float(flow.sample(300, torch.tensor([1.7e9 + s], dtype=torch.float64), seed=0).mean()) for s in (5, 55)]
    assert means[0] == pytest.approx(0.5, abs=0.4)
    assert means[1] == pytest.approx(5.5, abs=0.4)
    density = flow.distribution(torch.tensor([[1.7e9 + 5], [1.7e9 + 55]], dtype=torch.float64))
    near, far = density.log_prob(torch.tensor([[0.5], [0.5]])).tolist()
    assert near > far + 5


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.float32, np.float64])
def test_integers_and_every_type_of_float(kind: Any) -> None:
    """Whole numbers beyond 2**24, given to a flow of float32, keep their last digits."""
    base = 2**30 if kind is not np.float32 else 2**10
    x = torch.from_numpy((base + np.arange(1000)[:, None] % 50).astype(kind))
    flow, truth = gaussian(x.double())
    expected = truth.log_prob(x.double()).sum(1)
    assert float((flow.log_prob(x).double() - expected).abs().max()) < 1e-4


def test_autocast_does_not_move_a_flow() -> None:
    """Lower precision around a flow moved its log-density by 0.03 to 0.12 nats."""
    x = torch.randn(200, 2)
    result = pyrnode.train(x, evaluate=False, progress=False, **SMALL)
    flow, module = result.flow, result.flow.to_torch()
    parameters = list(flow.parameters())
    for log_prob in (flow.log_prob, module.log_prob, flow.distribution().log_prob):
        expected = log_prob(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(log_prob(x), expected)
    plain = torch.autograd.grad(flow.log_prob(x).sum(), parameters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = torch.autograd.grad(flow.log_prob(x).sum(), parameters)
        assert torch.equal(flow.sample(5, seed=0), flow.sample(5, seed=0))
        again = pyrnode.train(x, evaluate=False, progress=False, **SMALL).flow
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(flow.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


FLOAT32, FLOAT64 = torch.float32, torch.float64


@pytest.mark.parametrize(
    ("data", "context", "expected"),
    [
        (FLOAT32, None, FLOAT32),
        (FLOAT64, None, FLOAT64),
        (FLOAT32, FLOAT32, FLOAT32),
        (FLOAT32, FLOAT64, FLOAT64),
        (FLOAT32, torch.int64, FLOAT64),
    ],
    ids=str,
)
def test_training_keeps_the_finest_type_of_data_and_contexts(
    data: torch.dtype, context: torch.dtype | None, expected: torch.dtype, tmp_path: Path
) -> None:
    x, c = torch.randn(100, 2).to(data), None if context is None else (10 * torch.randn(100, 1)).to(context)
    settings = {**SMALL, "max_steps": 1, "evaluate": False, "progress": False}
    flow = pyrnode.train(x, context=c, out=tmp_path / "run", **settings).flow
    for found in (flow, pyrnode.load(tmp_path / "run")):
        assert found.data_dtype == expected
        assert found.sample(2, None if c is None else c[0], seed=0).dtype == expected


@torch.no_grad()
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_halves_are_computed_with_as_the_numbers_that_they_are(kind: torch.dtype) -> None:
    """Spread pixels, which every type holds exactly: transforms in half precision moved their density."""
    settings = {"engine": "torch", "flow.network.hidden": [4], "scales": 1, "alpha": 0.01}
    flow = Flow.build(Config().override(settings), (1, 4, 4), levels=16)
    x = (torch.randint(0, 16, (5, 1, 4, 4)) + 0.5).to(kind)
    assert torch.equal(flow.log_prob(x), flow.log_prob(x.float()))
    assert torch.equal(flow.encode(x), flow.encode(x.float()))
