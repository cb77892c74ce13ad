"""The synthetic densities against quadrature, their own samples, and other ways to write them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from pyrnode.data import synthetic
from pyrnode.data.curves import _box, _log_box
from pyrnode.errors import DataError

DENSITIES = list(synthetic.DENSITIES.values())
everywhere = pytest.mark.parametrize("density", DENSITIES, ids=lambda d: d.name)


def grid(density: synthetic.Density, cells: int, margin: float = 0.5) -> tuple[list[Tensor], float]:
    """Mid-points of the cells of a grid over the bounds, one axis at a time, and the volume of a cell."""
    axes, volume = [], 1.0
    for low, high in zip(density.bounds[::2], density.bounds[1::2], strict=True):
        low, high = low - margin, high + margin
        step = (high - low) / cells
        axes.append(low + step * (torch.arange(cells, dtype=torch.float64) + 0.5))
        volume *= step
    return axes, volume


@everywhere
def test_integrates_to_one(density: synthetic.Density) -> None:
    axes, volume = grid(density, 160)
    points = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    mass = float(density.log_prob(points).exp().sum()) * volume
    # the board has edges, on which the mid-point rule errs by up to a row of cells
    assert mass == pytest.approx(1, abs=0.03 if density.name == "checkerboard" else 1e-3)


def test_checkerboard_integrates_to_one_on_its_own_grid() -> None:
    axes, volume = grid(synthetic.density("checkerboard"), 160, margin=0.0)  # the squares are 40 cells wide
    points = torch.cartesian_prod(*axes)
    assert float(synthetic.density("checkerboard").log_prob(points).exp().sum()) * volume == pytest.approx(1, abs=1e-12)


@everywhere
def test_samples_agree_with_entropy(density: synthetic.Density) -> None:
    nll = -density.log_prob(density.sample(20_000, seed=3, dtype=torch.float64))
    error = float(nll.std()) / math.sqrt(len(nll))
    assert float(nll.mean()) == pytest.approx(density.entropy(), abs=4 * error + 1e-9)


@everywhere
def test_entropy_by_another_quadrature(density: synthetic.Density) -> None:
    """The mid-point rule on a grid that is not the one of `entropy`; the board's entropy is known."""
    if density.name == "checkerboard":
        expected = math.log(32)
    else:
        axes, volume = grid(density, 211)
        log_p = density.log_prob(torch.cartesian_prod(*axes).reshape(-1, len(axes)))
        expected = -float((log_p.exp() * log_p).sum()) * volume
    assert density.entropy() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("density", [d for d in DENSITIES if d.name != "checkerboard"], ids=lambda d: d.name)
def test_samples_fill_the_cells_as_the_density_says(density: synthetic.Density) -> None:
    """Chi-square of counts in the cells of a grid, against the density's integral over each (4 × 4 points a cell)."""
    n, cells, fine = 20_000, 24 if density.event_shape == (2,) else 60, 4
    axes, volume = grid(density, cells * fine)
    mass = density.log_prob(torch.cartesian_prod(*axes).reshape(-1, len(axes))).exp() * volume
    samples = density.sample(n, seed=5, dtype=torch.float64)
    index = torch.zeros(n, dtype=torch.int64)
    inside = torch.ones(n, dtype=torch.bool)
    for i, axis in enumerate(axes):
        step = axis[1] - axis[0]
        position = ((samples[:, i] - axis[0]) / step + 0.5).floor().long()
        inside &= (position >= 0) & (position < len(axis))
        index = index * cells + position.clamp(0, len(axis) - 1) // fine
    if len(axes) == 2:
        mass = mass.reshape(cells, fine, cells, fine).sum(dim=(1, 3)).flatten()
    else:
        mass = mass.reshape(cells, fine).sum(dim=1)
    counts = torch.bincount(index[inside], minlength=len(mass)).double()
    expected = n * mass
    full = expected >= 10
    counts = torch.cat([counts[full], (n - counts[full].sum())[None]])
    expected = torch.cat([expected[full], (n - expected[full].sum()).clamp(min=1e-3)[None]])
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert stats.chi2.sf(chi_square, len(counts) - 1) > 1e-3


def test_checkerboard_fills_its_squares_evenly() -> None:
    x = synthetic.density("checkerboard").sample(16_000, seed=0)
    cell = ((x + 4) / 2).floor().long()
    counts = torch.bincount(cell[:, 0] * 4 + cell[:, 1], minlength=16)
    dark = (torch.arange(16) // 4 + torch.arange(16) % 4) % 2 == 0
    assert int(counts[~dark].sum()) == 0
    assert stats.chisquare(counts[dark].numpy()).pvalue > 1e-3
    within = (x / 2).remainder(1).flatten()
    assert stats.kstest(within.numpy(), "uniform").pvalue > 1e-3


@everywhere
def test_is_seeded_and_keeps_types(density: synthetic.Density) -> None:
    a, b = density.sample(50, seed=1), density.sample(50, seed=torch.Generator().manual_seed(1))
    assert torch.equal(a, b)
    assert not torch.equal(a, density.sample(50, seed=2))
    assert a.dtype == torch.float32
    assert torch.equal(density.sample(50, seed=1, dtype=torch.float64).float(), a)
    assert density.log_prob(a).dtype == torch.float32
    assert torch.allclose(density.log_prob(a), density.log_prob(a.double()).float())
    low, high = torch.tensor(density.bounds[::2]), torch.tensor(density.bounds[1::2])
    x = density.sample(2000, seed=1)
    assert float(((x > low) & (x < high)).all(dim=1).double().mean()) > 0.99


def test_mixture_equals_the_sum_of_its_gaussians() -> None:
    x = torch.randn(40, 2, dtype=torch.float64) * 4
    angles = [k * math.pi / 4 for k in range(8)]
    p = sum(
        stats.multivariate_normal([4 * math.cos(a) / 1.414, 4 * math.sin(a) / 1.414], (0.5 / 1.414) ** 2).pdf(x.numpy())
        for a in angles
    )
    expected = torch.as_tensor(p / 8).log()
    assert torch.allclose(synthetic.density("8gaussians").log_prob(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["rings", "circles"])
def test_circles_equal_the_integral_over_the_angle(name: str) -> None:
    density = synthetic.density(name)
    assert isinstance(density, synthetic.Circles)
    x = torch.tensor([[0.1, 0.2], [1.4, -0.3], [3.0, 0.0], [-2.0, 2.5]], dtype=torch.float64)
    angle = 2 * math.pi * torch.arange(4000, dtype=torch.float64) / 4000  # periodic: the plain mean converges fast
    terms = []
    for radius in density.radii:
        centre = radius * torch.stack([angle.cos(), angle.sin()], dim=1)
        squares = (x[:, None] - centre).square().sum(-1) / density.std**2
        terms.append((-squares / 2).exp().mean(1) / (2 * math.pi * density.std**2))
    expected = torch.stack(terms).mean(0)
    assert torch.allclose(density.log_prob(x).exp(), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["moons", "swissroll", "2spirals"])
def test_curves_equal_adaptive_quadrature(name: str) -> None:
    density = synthetic.density(name)
    points = [density.sample(3, seed=8, dtype=torch.float64), torch.tensor([[0.0, 0.0], [2.5, -2.0]]).double()]
    sigma = {"moons": 0.2, "swissroll": 0.2, "2spirals": 0.1}[name]

    def gauss(u: float) -> float:
        return math.exp(-(u**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))

    def box(u: float) -> float:  # [0, 1/6] convolved with the noise
        return float(6 * (stats.norm.cdf(u / sigma) - stats.norm.cdf((u - 1 / 6) / sigma)))

    def integrand(t: float, x: float, y: float) -> float:
        c, s = math.cos(t), math.sin(t)
        if name == "moons":
            outer = gauss(x - (2 * c - 1)) * gauss(y - (2 * s - 0.2))
            return (outer + gauss(x - (2 * (1 - c) - 1)) * gauss(y - (2 * (0.5 - s) - 0.2))) / (2 * math.pi)
        if name == "swissroll":
            return gauss(x - t * c / 5) * gauss(y - t * s / 5) / (3 * math.pi)
        arms = [box(sign * x + t * c / 3) * box(sign * y - t * s / 3) for sign in (1, -1)]
        return sum(arms) / 2 * 2 * t / (3 * math.pi) ** 2

    low, high = {"moons": (0, 1), "swissroll": (1.5, 4.5), "2spirals": (0, 3)}[name]
    for x in torch.cat(points):
        edges = torch.linspace(low * math.pi, high * math.pi, 25).tolist()
        expected = sum(
            integrate.quad(integrand, a, b, args=tuple(x.tolist()), epsabs=1e-13)[0]
            for a, b in itertools.pairwise(edges)
        )
        assert float(density.log_prob(x[None]).exp()) == pytest.approx(expected, rel=1e-6, abs=1e-11)


def test_log_box_is_accurate_in_the_tail() -> None:
    u = torch.tensor([0.0, 0.5, 0.9, 2.0, 6.0, 30.0, 300.0], dtype=torch.float64)
    half = 5 / 6
    # differences of scipy's log survival functions, which do not underflow
    near, far = stats.norm.logsf((u - half).numpy()), stats.norm.logsf((u + half).numpy())
    expected = torch.as_tensor(near) + torch.log1p(-(torch.as_tensor(far - near)).exp())
    assert torch.allclose(_log_box(u, half), expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(_box(u, half), expected.exp(), atol=1e-15)


def test_spirals_have_a_finite_log_density_far_away() -> None:
    log_p = synthetic.density("2spirals").log_prob(torch.tensor([[30.0, -40.0], [1e3, 0.0]], dtype=torch.float64))
    # one end of an arm is nearest; σ = 0.1, and the arms reach to 3.2 from the origin
    for value, distance in zip(log_p.tolist(), (50.0, 1000.0), strict=True):
        assert -(((distance + 3.5) / 0.1) ** 2) / 2 - 50 < value < -(((distance - 3.5) / 0.1) ** 2) / 2 + 50


def test_pinwheel_is_a_twisted_mixture() -> None:
    """Untwisting the samples by their radius gives the five Gaussians back."""
    density = synthetic.density("pinwheel")
    x = density.sample(20_000, seed=4, dtype=torch.float64) / 2
    angle = torch.atan2(x[:, 1], x[:, 0]) + 0.25 * torch.linalg.vector_norm(x, dim=1).exp()
    blade = (angle / (2 * math.pi / 5)).round()
    angle = angle - blade * 2 * math.pi / 5
    radius = torch.linalg.vector_norm(x, dim=1)
    s1, s2 = radius * angle.cos(), radius * angle.sin()
    outer = s1 > 0.6  # away from the centre, where the blades touch
    assert float(s2[outer].std()) == pytest.approx(0.1, rel=0.03)
    truncated = stats.truncnorm((0.6 - 1) / 0.3, math.inf, loc=1, scale=0.3)
    assert float(s1[outer].mean()) == pytest.approx(truncated.mean(), abs=0.01)
    assert float(s1[outer].std()) == pytest.approx(truncated.std(), rel=0.03)


def test_names_and_bad_input() -> None:
    with pytest.raises(DataError, match="did you mean 'moons'"):
        synthetic.density("moon")
    density = synthetic.density("moons")
    with pytest.raises(DataError, match=r"expected floats \(n, 2\)"):
        density.log_prob(torch.zeros(3, 1))
    with pytest.raises(DataError, match="int64"):
        density.log_prob(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(DataError, match="n = -1"):
        density.sample(-1, seed=0)
    assert density.log_prob(torch.zeros(0, 2)).shape == (0,)
