"""The radial map against autograd, its own inverse and distributions whose radii are known; and when it is taken."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pyrnode
from pyrnode import Config, DataError
from pyrnode.data import MappedSamples
from pyrnode.data.samples import Splits, TensorSamples
from pyrnode.radial import Radial
from pyrnode.training.blueprint import Blueprint
from pyrnode.transforms import Standardize, Whiten

SETTINGS = {"hidden": [8, 8], "dtype": "float64", "engine": "torch"}


def radial(scale: float, curvature: float) -> Radial:
    return Radial(*torch.tensor([scale, curvature], dtype=torch.float64))


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def student(n: int, d: int, freedom: int) -> Tensor:
    """A multivariate Student distribution: heavy tails in every direction at once."""
    return normal(n, d) / (normal(n, freedom, 1).square().sum(1, keepdim=True) / freedom).sqrt()


def clusters(n: int, d: int) -> Tensor:
    """Narrow ones at the corners of a cube, most of whose samples are near and some far: modes, not tails."""
    corner = torch.sign(normal(n, d, 2)) * (1 + 2.0 * (torch.arange(n) % 8 == 0)[:, None])
    return corner + 0.05 * normal(n, d)


def splits(x: Tensor) -> Splits:
    return Splits("x", TensorSamples(x), TensorSamples(x[:20]), TensorSamples(x[:20]), (x.shape[1],))


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("curvature", [0.0, 1e-4, 1.0, 3e3])
@pytest.mark.parametrize("size", [0.0, 1e-3, 0.1, 1.0, 50.0])
def test_log_determinant_and_inverse_are_autograds(d: int, curvature: float, size: float) -> None:
    """On both sides of the step from series to logarithms, too."""
    transform, x = radial(1.7, curvature), size * normal(3, d)
    y, log_det = transform(x)
    for row, found in zip(x, log_det, strict=True):
        full = torch.autograd.functional.jacobian(lambda v: transform(v[None])[0][0], row)
        assert bool(torch.isfinite(full).all())
        assert float(found) == pytest.approx(float(torch.linalg.slogdet(full)[1]), abs=1e-10)
    assert torch.allclose(transform.inverse(y), x, rtol=1e-11, atol=0)
    backward = torch.autograd.functional.jacobian(lambda v: transform.inverse(v[None])[0], y[0])
    assert float(torch.linalg.slogdet(backward)[1]) == pytest.approx(-float(log_det[0]), abs=1e-9)


def test_radii_are_those_of_the_inverse_hyperbolic_sine() -> None:
    x = normal(50, 3) * torch.logspace(-8, 8, 50, dtype=torch.float64)[:, None]
    y = radial(2.0, 9.0)(x)[0]
    assert torch.allclose(y.norm(dim=1), 2 / 3 * torch.asinh(3 * x.norm(dim=1)), rtol=1e-13)
    assert torch.allclose(y / y.norm(dim=1, keepdim=True), x / x.norm(dim=1, keepdim=True), atol=1e-14)


def test_the_identity_is_exact() -> None:
    x = normal(100, 4) * 1e3
    y, log_det = Radial.identity()(x)
    assert torch.equal(y, x)
    assert torch.equal(Radial.identity().inverse(x), x)
    assert not log_det.any()


@pytest.mark.parametrize("weighted", [False, True])
def test_the_map_that_made_samples_is_found(weighted: bool) -> None:
    truth = radial(3.0, 4.0)
    x = truth.inverse(normal(20_000, 4))
    weight = None
    if weighted:  # of what is far more, with weights that bring it back
        rows = torch.cat([torch.arange(len(x)), torch.arange(len(x))[x.norm(dim=1) > x.norm(dim=1).median()]])
        x, weight = x[rows], torch.ones(len(rows), dtype=torch.float64)
        weight[x.norm(dim=1) > x[:20_000].norm(dim=1).median()] = 0.5
    found = Radial.fit(x, weight)
    assert float(found.scale) == pytest.approx(3.0, rel=0.05)
    assert float(found.curvature) == pytest.approx(4.0, rel=0.1)


def test_normal_samples_are_left_as_they_are() -> None:
    x = normal(5000, 6)
    found = Radial.fit(x)
    assert float((found(x)[0] - x).norm(dim=1).median()) < 0.1
    assert abs(Radial.gain(x)) < 1e-3


def test_what_it_gains_is_the_difference_of_densities() -> None:
    """Of samples of the map's own family: what the normal density of all moments lacks of the entropy."""
    truth, z = radial(1.0, 3.0), normal(50_000, 3)
    x = truth.inverse(z)
    x = x / x.std()
    density = truth.inverse(z).std().log() * 3 + truth(truth.inverse(z))[1] - z.square().sum(1) / 2
    gained = float((density + x.square().sum(1) / 2).mean()) / 3
    assert gained > 0.2
    assert Radial.gain(x) == pytest.approx(gained, abs=2e-3)


def test_few_samples_and_none() -> None:
    assert torch.equal(Radial.fit(torch.zeros(4, 2))(normal(3, 2))[0], normal(3, 2))
    assert Radial.gain(normal(1, 2)) == 0.0
    assert Radial.gain(normal(4, 2), torch.tensor([1.0, 0.0, 0.0, 0.0])) == 0.0
    found = Radial.fit(normal(3, 2) * 1e100)
    assert bool(torch.isfinite(found(normal(3, 2) * 1e100)[0]).all())


@pytest.mark.parametrize(("scale", "curvature"), [(0.0, 1.0), (1.0, -1.0), (math.nan, 1.0), (1.0, math.inf)])
def test_what_is_no_bijection_is_refused(scale: float, curvature: float) -> None:
    with pytest.raises(DataError, match="not a bijection"):
        radial(scale, curvature)


@pytest.mark.parametrize(
    ("x", "drawn_in"),
    [(student(2000, 8, 2), True), (normal(2000, 8), False), (clusters(2000, 4), False)],
    ids=["heavy tails", "normal", "clusters"],
)
def test_tails_are_drawn_in_where_they_are_heavy(x: Tensor, drawn_in: bool) -> None:
    auto = Blueprint(splits(x), None).fitted(Config().override({**SETTINGS, "standardize": "auto"}))
    asked = Blueprint(splits(x), None).fitted(Config().override({**SETTINGS, "standardize": "radial"}))
    edges, scale, whiten, found = auto.transform.transforms
    assert torch.equal(edges(x)[0], x)
    assert [type(part) for part in asked.transform.transforms] == [Standardize, Whiten, Radial]
    assert isinstance(found, Radial)
    assert bool(found.curvature > 0) == drawn_in
    assert torch.equal(found.scale, Radial.fit(whiten(scale(x)[0])[0]).scale if drawn_in else torch.ones(()).double())
    plain = Blueprint(splits(x), None).fitted(Config().override({**SETTINGS, "standardize": "whiten"}))
    with torch.no_grad():
        gained = float((asked.log_prob(x) - plain.log_prob(x)).mean()) / x.shape[1]
    assert (gained > 0.1) == drawn_in


def test_a_file_that_is_mapped_gives_the_same_map() -> None:
    x = student(400, 3, 2) + 1e6
    config = Config().override({**SETTINGS, "standardize": "radial"})
    maps = []
    for train in (TensorSamples(x), MappedSamples(x)):
        *_, found = Blueprint(replace(splits(x), train=train), None).fitted(config).transform.transforms
        maps.append((float(found.scale), float(found.curvature)))
    assert maps[0] == pytest.approx(maps[1], rel=1e-6)


def test_a_flow_with_it_is_saved_and_read(tmp_path: Path) -> None:
    x = student(300, 3, 2)
    settings = {**SETTINGS, "standardize": "auto", "max_steps": 3, "batch_size": 50}
    flow = pyrnode.train(x, **settings, evaluate=False, progress=False).flow
    assert flow.transform.transforms[-1].curvature > 0
    flow.save(tmp_path / "flow.safetensors")
    again = pyrnode.load(tmp_path / "flow.safetensors")
    assert torch.equal(again.log_prob(x), flow.log_prob(x))
    assert again.sample(1000, seed=0).dtype == torch.float64
    assert torch.allclose(flow.decode(flow.encode(x)), x, rtol=1e-5)


def test_what_it_gains_is_weighed() -> None:
    """Samples of weight zero, whose tails are heavy, bring nothing."""
    x = torch.cat([normal(2000, 4), student(2000, 4, 1)])[torch.arange(4000).view(2, -1).T.flatten()]  # in turn
    weight = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(2000)
    assert Radial.gain(x) > 0.2
    assert abs(Radial.gain(x, weight)) < 1e-3
