"""Edges of columns against autograd, their own inverse and distributions that are known; and when they are opened."""

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
from pyrnode.edges import Edges
from pyrnode.training.blueprint import Blueprint
from pyrnode.transforms import Standardize, Whiten

SETTINGS = {"hidden": [8, 8], "dtype": "float64", "engine": "torch"}

KINDS = {
    "both": (-1.0, 4.0, 5.0, 1e-3, 1e-2),
    "lower": (2.0, 0.0, 3.0, 1e-3, 0.0),
    "upper": (0.0, 2.0, 3.0, 0.0, 1e-3),
    "none": (0.0, 0.0, 1.0, 0.0, 0.0),
}
ALL = Edges(*torch.tensor([*zip(*KINDS.values(), strict=True)], dtype=torch.float64))


def uniform(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(n: int, d: int, seed: int = 1) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def splits(x: Tensor) -> Splits:
    return Splits("x", TensorSamples(x), TensorSamples(x[:20]), TensorSamples(x[:20]), (x.shape[1],))


def opened(edges: Edges) -> list[tuple[bool, bool]]:
    """By column whether it has a lower and an upper edge."""
    return [*zip((edges.soft_low > 0).tolist(), (edges.soft_high > 0).tolist(), strict=True)]


@pytest.mark.parametrize("size", [1e-9, 1e-3, 1.0, 30.0, 1e4, 1e20])
def test_log_determinant_and_inverse_are_autograds(size: float) -> None:
    """On either side of every edge, far from it, and on both sides of the steps to series."""
    x = torch.cat([KINDS_AT + size * sign for sign in (-1.0, 1.0)])
    y, log_det = ALL(x)
    for row, found in zip(x, log_det, strict=True):
        full = torch.autograd.functional.jacobian(lambda v: ALL(v[None])[0][0], row)
        assert torch.equal(full, full.diagonal().diag())
        assert float(found) == pytest.approx(float(full.diagonal().log().sum()), abs=1e-9)
    assert torch.allclose(ALL.inverse(y), x, rtol=1e-9, atol=1e-13)
    assert torch.equal(y[:, 3], x[:, 3])


KINDS_AT = torch.tensor([[-1.0, 2.0, 2.0, 0.0], [4.0, 2.0, 2.0, 0.0]], dtype=torch.float64)


def test_it_reaches_all_of_the_line_in_order() -> None:
    steps = torch.cat([-torch.logspace(8, -8, 400), torch.logspace(-8, 8, 400)]).double()
    for kind in range(3):
        y, log_det = ALL(KINDS_AT[:1] + steps[:, None] * torch.eye(4, dtype=torch.float64)[kind])
        assert bool((y[:, kind].diff() > 0).all())
        assert bool(torch.isfinite(log_det).all())
    back = ALL.inverse(torch.linspace(-60, 60, 101, dtype=torch.float64)[:, None].expand(-1, 4))
    assert bool(torch.isfinite(back).all())
    assert bool((back.diff(dim=0) >= 0).all())


@pytest.mark.parametrize(
    ("x", "bound"),
    [(uniform(20_000, 1), 0.01), (-uniform(20_000, 1).log(), 0.02), (uniform(20_000, 1).log(), 0.02)],
    ids=["uniform", "exponential", "exponential below"],
)
def test_what_it_opens_is_nearly_normal(x: Tensor, bound: float) -> None:
    """The Kolmogorov distance, and the log-density beside the truth."""
    edges = Edges.fit(x)
    y = edges(x)[0]
    y = ((y - y.mean()) / y.std()).flatten().sort().values
    levels = (torch.arange(len(y)) + 0.5) / len(y)
    assert float((torch.special.ndtr(y) - levels).abs().max()) < bound
    assert opened(edges) != [(False, False)]


def test_beyond_an_edge_there_is_density_but_little() -> None:
    """Of uniform samples: inside 0 nats, and outside what a share of a few in n samples leaves."""
    x = uniform(20_000, 1)
    flow = Blueprint(splits(x), None).fitted(Config().override({**SETTINGS, "standardize": "auto"}))
    with torch.no_grad():
        inside = flow.log_prob(torch.linspace(0.01, 0.99, 99, dtype=torch.float64)[:, None])
        assert float(inside.abs().mean()) < 0.05
        grid = torch.linspace(-0.2, 1.2, 140_001, dtype=torch.float64)[:, None]
        density = flow.log_prob(grid).exp()
        beyond = (grid[:, 0] < 0) | (grid[:, 0] > 1)
        assert 1e-6 < float(density[beyond].sum() * 1e-5) < 2e-3
        assert float(density.sum() * 1e-5) == pytest.approx(1.0, abs=1e-3)
        far = flow.log_prob(torch.tensor([[-1e6], [1e6]], dtype=torch.float64))
        assert bool(((far > -200) & (far < -20)).all())


@pytest.mark.parametrize("weighted", [False, True])
def test_columns_with_edges_are_found(weighted: bool) -> None:
    x = torch.cat([normal(4000, 2), uniform(4000, 1), -uniform(4000, 1, 3).log(), uniform(4000, 1, 4).log()], 1)
    expected = [(False, False), (False, False), (True, True), (True, False), (False, True)]
    weight = None
    if weighted:  # samples of weight zero, all of one value, change nothing
        x = torch.cat([x, torch.full((1000, 5), 7.0, dtype=torch.float64)])
        weight = torch.cat([torch.ones(4000), torch.zeros(1000)]).double()
    edges = Edges.fit(x, weight)
    assert opened(edges) == expected
    assert float(edges.low[2]) == pytest.approx(0.0, abs=2e-3)
    assert float(edges.high[2]) == pytest.approx(1.0, abs=2e-3)
    assert float(edges.width[3]) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(("unit", "offset"), [(1.0, 1e9), (1e-9, 0.0), (1e12, -1e13)])
def test_offsets_and_units_do_not_matter(unit: float, offset: float) -> None:
    x = uniform(2000, 1)
    moved = unit * x + offset
    assert torch.allclose(Edges.fit(x)(x)[0], Edges.fit(moved)(moved)[0], atol=2e-3)


@pytest.mark.parametrize(
    "x",
    [
        normal(4000, 3),
        torch.cat([uniform(4000, 1), uniform(4000, 1) + 1e-4 * normal(4000, 1)], 1),
        torch.cat([normal(2000, 1).abs(), torch.zeros(2000, 1)]).double(),
        uniform(60, 2),
        normal(120, 100),
        torch.cat([normal(500, 2), 1e200 * normal(500, 1)], 1),
        torch.ones(500, 2).double(),
        torch.zeros(0, 2).double(),
    ],
    ids=[
        "normal",
        "one column nearly the other",
        "half of it one value",
        "few",
        "few for so many columns",
        "beyond all",
        "constant",
        "none",
    ],
)
def test_what_has_none_is_left_as_it_is(x: Tensor) -> None:
    edges = Edges.fit(x)
    assert opened(edges) == [(False, False)] * x.shape[1]
    assert torch.equal(edges(x)[0], x)
    assert torch.equal(edges.inverse(x), x)
    assert not edges(x)[1].any()


def test_rounded_values_keep_their_density() -> None:
    """A column in steps of 0.01: its first value is no spike that samples lie on."""
    x = (100 * uniform(5000, 1)).floor() / 100
    _, log_det = Edges.fit(x)(x)
    assert float(log_det.max() - log_det.median()) < 3


@pytest.mark.parametrize("change", [{"width": 0.0}, {"soft_low": -1.0}, {"low": math.nan}, {"low": 5.0}])
def test_what_is_no_bijection_is_refused(change: dict[str, float]) -> None:
    numbers = dict(zip(("low", "high", "width", "soft_low", "soft_high"), KINDS["both"], strict=True)) | change
    with pytest.raises(DataError, match=r"edges of column 0 .*: not a bijection"):
        Edges(*torch.tensor([*numbers.values()], dtype=torch.float64)[:, None])


def test_only_auto_looks_for_them() -> None:
    x = torch.cat([uniform(2000, 2), normal(2000, 1)], 1)
    auto = Blueprint(splits(x), None).fitted(Config().override({**SETTINGS, "standardize": "auto"}))
    edges = auto.transform.transforms[0]
    assert isinstance(edges, Edges)
    assert opened(edges) == [(True, True), (True, True), (False, False)]
    plain = Blueprint(splits(x), None).fitted(Config().override({**SETTINGS, "standardize": "whiten"}))
    assert [type(part) for part in plain.transform.transforms] == [Standardize, Whiten]
    with torch.no_grad():
        assert float((auto.log_prob(x) - plain.log_prob(x)).mean()) > 0.3  # 0.176 a column


def test_a_file_that_is_mapped_gives_the_same_edges() -> None:
    x = uniform(2000, 3) + 1e6
    config = Config().override({**SETTINGS, "standardize": "auto"})
    found = []
    for train in (TensorSamples(x), MappedSamples(x)):
        transform = Blueprint(replace(splits(x), train=train), None).fitted(config).transform
        found.append((opened(transform.transforms[0]), transform(x[:50])[0]))
    assert found[0][0] == found[1][0] == [(True, True)] * 3
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)


def test_a_flow_with_them_is_trained_saved_and_read(tmp_path: Path) -> None:
    x = torch.cat([uniform(800, 2), normal(800, 1)], 1)
    settings = {**SETTINGS, "standardize": "auto", "max_steps": 3, "batch_size": 50}
    flow = pyrnode.train(x, **settings, evaluate=False, progress=False).flow
    assert (True, True) in opened(flow.transform.transforms[0])
    flow.save(tmp_path / "flow.safetensors")
    again = pyrnode.load(tmp_path / "flow.safetensors")
    assert torch.equal(again.log_prob(x), flow.log_prob(x))
    assert torch.allclose(flow.decode(flow.encode(x)), x, atol=1e-5)
    samples = again.sample(2000, seed=0)
    assert float(((samples[:, :2] < -0.05) | (samples[:, :2] > 1.05)).double().mean()) < 0.05


def test_its_tensors_stay_double() -> None:
    edges = Edges.fit(uniform(2000, 1) + 1e9).to(torch.float32)
    assert edges.low.dtype == torch.float64
