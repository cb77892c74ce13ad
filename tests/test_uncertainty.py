"""The stated error of log_prob against the true one, and noise that belongs to the samples."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyrnode.config import Config, Divergence, SolverConfig
from pyrnode.errors import ConfigError, DataError, SolverError
from pyrnode.flow import Flow
from pyrnode.probes import SampleNoise
from pyrnode.uncertainty import PROBES, LogProb, finer_solver, log_prob_with_error


def build(event_shape: tuple[int, ...], *, levels: int | None = None, scale: float = 0.2, **overrides: Any) -> Flow:
    """An untrained flow, moved away from the identity."""
    settings = {"flow.network.hidden": (16, 16), **{k.replace("__", "."): v for k, v in overrides.items()}}
    config = Config().override(settings)
    flow = Flow.build(config, event_shape, levels=levels)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))
    return flow


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def truth(flow: Flow, x: Tensor) -> Tensor:
    """The exact trace, solved in double precision to rounding: eight orders beyond what is tested."""
    double = copy.deepcopy(flow).double()
    solver = replace(flow.solver, name="DP8", rtol=1e-12, atol=1e-13)
    return double.log_prob(x.double(), solver=solver, divergence="exact")


def with_error(flow: Flow, x: Tensor, *, solver: SolverConfig | None = None, divergence: Any = None) -> LogProb:
    """`log_prob_with_error` with the flow's own settings where none are given."""
    return log_prob_with_error(flow, x, solver=solver or flow.solver, divergence=flow.divergence.changed(divergence))


def coverage(flow: Flow, x: Tensor, **settings: Any) -> tuple[float, float]:
    """Shares of the samples whose true error is below once and twice the stated one."""
    with torch.no_grad():
        estimate, error = with_error(flow, x, **settings)
    z = ((estimate.double() - truth(flow, x)) / error.double()).abs()
    return float((z < 1).double().mean()), float((z < 2).double().mean())


# -- coverage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probes", "two"),
    [(2, 0.83), (4, 0.90), (16, 0.945)],  # Student's t: the share within 2 t(0.84) of k - 1 degrees of freedom
)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_error_of_an_estimated_trace_covers_at_the_rate_that_it_claims(dtype: str, probes: int, two: float) -> None:
    flow = build((20,), dtype=dtype)
    covered = [coverage(flow, normal(300, 20, s), divergence=Divergence("hutchinson", probes, s)) for s in range(2)]
    one_sigma, two_sigma = np.mean(covered, 0)
    assert one_sigma == pytest.approx(0.683, abs=4 * math.sqrt(0.683 * 0.317 / 600))
    assert two_sigma == pytest.approx(two, abs=4 * math.sqrt(two * (1 - two) / 600))


def test_over_seeds_the_error_of_one_sample_covers_too() -> None:
    """The other side of the claim: a few samples, many seeds."""
    flow, x = build((8,), dtype="float64", scale=0.15), normal(4, 8).double()
    exact = truth(flow, x).repeat(60)
    with torch.no_grad():
        draws = [with_error(flow, x, divergence=Divergence("hutchinson", 8, seed)) for seed in range(60)]
    estimates, errors = (torch.cat(values) for values in zip(*draws, strict=True))
    share = float(((estimates - exact).abs() < errors).double().mean())
    assert share == pytest.approx(0.683, abs=4 * math.sqrt(0.683 * 0.317 / 240))
    spread_of_estimates = float((estimates - exact).square().mean().sqrt())
    assert float(errors.square().mean().sqrt()) == pytest.approx(spread_of_estimates, rel=0.25)


SOLVERS: dict[str, dict[str, Any]] = {
    "DP5 1e-5": {},
    "DP5 1e-5, single": {"dtype": "float32"},
    "DP5 1e-3": {"evaluation__solver": {"rtol": 1e-3, "atol": 1e-3}},
    "BS3 1e-4": {"evaluation__solver": {"name": "BS3", "rtol": 1e-4, "atol": 1e-4}},
    "Tsit5 1e-9": {"evaluation__solver": {"name": "Tsit5", "rtol": 1e-9, "atol": 1e-9}},
    "RK4 0.25": {"evaluation__solver": "RK4"},
    "RK4 0.05, single": {"evaluation__solver": {"name": "RK4", "step_size": 0.05}, "dtype": "float32"},
    "Euler 0.1": {"evaluation__solver": {"name": "Euler", "step_size": 0.1}},
}


@pytest.mark.parametrize("name", SOLVERS)
def test_the_solvers_share_is_a_bound_and_not_a_loose_one(name: str) -> None:
    flow = build((4,), **{"dtype": "float64", **SOLVERS[name]})
    x = normal(300, 4).to(next(flow.parameters()).dtype)
    with torch.no_grad():
        estimate, error = with_error(flow, x)
        assert torch.equal(estimate, flow.log_prob(x))  # the number does not change because its error is asked for
    ratio = (estimate.double() - truth(flow, x)).abs() / error.double()
    assert float((ratio < 1).double().mean()) > 0.99
    assert float(ratio.median()) == pytest.approx(1 / 1.5, abs=0.02)


def test_the_finer_solver_is_finer() -> None:
    adaptive, fixed = (finer_solver(build((2,), evaluation__solver=name).solver) for name in ("DP5", "RK4"))
    assert (adaptive.name, adaptive.rtol, adaptive.atol) == ("DP8", pytest.approx(1e-8), pytest.approx(1e-8))
    assert (fixed.name, fixed.rtol, fixed.atol) == ("DP8", pytest.approx(1e-10), pytest.approx(1e-10))


def test_a_finer_solve_that_fails_says_what_it_was_for() -> None:
    flow = build((3,), dtype="float64", scale=0.5)
    with pytest.raises(SolverError, match="finer solve, from which the error is taken, failed: block 0") as caught:
        with_error(flow, normal(5, 3), solver=replace(flow.solver, rtol=1e-2, atol=1e-2, maxiters=4))
    assert (caught.value.status, caught.value.block) == ("MaxIters", 0)


def test_both_shares_add_in_quadrature() -> None:
    """A coarse solver, whose error is as large as the probes'."""
    flow = build((4,), dtype="float64", evaluation__solver={"name": "Midpoint", "step_size": 0.5}, scale=0.35)
    x, settings = normal(50, 4).double(), {"divergence": Divergence("hutchinson", 64)}
    with torch.no_grad():
        both = with_error(flow, x, **settings)
        fine = replace(flow.solver, name="DP8", rtol=1e-11, atol=1e-11)
        probes_alone = with_error(flow, x, solver=fine, **settings)
    share = 1.5 * (both.estimate - probes_alone.estimate).abs()
    expected = torch.hypot(probes_alone.error, share)
    assert float((share / probes_alone.error).median()) > 0.2
    torch.testing.assert_close(both.error, expected, rtol=0.15, atol=0)


# -- the noise -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_same_seed_same_numbers_and_another_seed_others() -> None:
    flow, x = build((5,)), normal(7, 5)
    first, second, other = (with_error(flow, x, divergence=Divergence("hutchinson", seed=s)) for s in (3, 3, 4))
    assert torch.equal(first.estimate, second.estimate)
    assert torch.equal(first.error, second.error)
    assert bool((first.estimate != other.estimate).all())


@torch.no_grad()
def test_a_sample_does_not_know_its_batch() -> None:
    """Alone, among others, in another order and across chunks: the same number up to the rounding of other matmuls."""
    flow, x = build((5,), dtype="float64"), normal(90, 5).double()
    whole = with_error(flow, x, divergence="hutchinson")
    assert len(x) * PROBES > 2 * 500  # several chunks
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1))
    for rows in (order, torch.arange(40, 43), torch.tensor([89]), torch.tensor([7, 7])):
        part = with_error(flow, x[rows], divergence="hutchinson")
        torch.testing.assert_close(part.estimate, whole.estimate[rows], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(part.error, whole.error[rows], rtol=1e-8, atol=1e-12)


@torch.no_grad()
def test_errors_of_different_samples_are_independent() -> None:
    """So the error of a mean over n samples falls with the root of n."""
    flow, x = build((8,), dtype="float64"), normal(400, 8).double()
    error = with_error(flow, x, divergence=Divergence("hutchinson", 2)).estimate - truth(flow, x)
    assert abs(float(error.mean())) < 4 * float(error.std()) / math.sqrt(400)
    neighbours = torch.corrcoef(torch.stack((error[:-1], error[1:])))[0, 1]
    assert abs(float(neighbours)) < 4 / math.sqrt(400)


def test_probes_are_standard_normal_and_differ_by_sample_block_probe_and_seed() -> None:
    x = normal(50, 3)
    noise = SampleNoise(x, 0, torch.float64)
    eps = noise.gaussian(20, (3,), 0)
    assert eps.shape == (20, 50, 3)
    assert eps.dtype == torch.float64
    assert float(eps.mean()) == pytest.approx(0, abs=4 / math.sqrt(3000))
    assert float(eps.square().mean()) == pytest.approx(1, abs=4 * math.sqrt(2 / 3000))
    others = [noise.gaussian(20, (3,), 1), SampleNoise(x, 1, torch.float64).gaussian(20, (3,), 0), eps.roll(1, 1)]
    for a, b in itertools.combinations([eps, *others, eps.roll(1, 0)], 2):
        correlation = torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]
        assert abs(float(correlation)) < 4 / math.sqrt(3000)


def test_noise_is_a_function_of_the_value() -> None:
    x = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [0.0, 1.0 + 1e-6]])
    eps = SampleNoise(x, 0, torch.float32).gaussian(1, (2,), 0)[0]
    assert torch.equal(eps[0], eps[1])
    assert not torch.equal(eps[0], eps[2])
    pixels = torch.tensor([[3, 7]])
    small, large = (SampleNoise(pixels.to(t), 0, torch.float32).uniform((2,)) for t in (torch.uint8, torch.int64))
    assert torch.equal(small, large)


def test_probes_of_one_draw_are_those_of_the_copies() -> None:
    z = normal(6, 3)
    noise = SampleNoise(z, 0, torch.float32)
    together, one_each = noise.draw(4), noise.draw(4, one_each=True)
    seen: list[Tensor] = []
    for _ in range(2):  # two blocks
        eps, weight, _ = together(z)
        assert not any(torch.equal(eps, other) for other in seen)
        seen.append(eps)
        copies, one, _ = one_each(z.repeat(4, 1))
        assert (weight, one) == (0.25, 1.0)
        assert torch.equal(copies[0].reshape(4, 6, 3), eps)


def test_integers_are_spread_over_their_bin() -> None:
    x = torch.randint(0, 5, (400, 6), generator=torch.Generator().manual_seed(0))
    values = SampleNoise(x, 0, torch.float64).spread(x)
    assert torch.equal(values.floor().long(), x)
    u = (values - x)[torch.unique(x, dim=0, return_inverse=True)[1].sort().indices]
    assert float(u.mean()) == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / 2400))
    given = x.double() + 0.25
    assert SampleNoise(given, 0, torch.float64).spread(given) is given


@torch.no_grad()
def test_discrete_data_gets_the_density_of_its_own_spread_values() -> None:
    flow = build((1, 4, 4), levels=17, dtype="float64")
    x = torch.randint(0, 17, (5, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    estimate, error = with_error(flow, x, divergence="exact")
    exact = truth(flow, SampleNoise(x, 0, torch.float64).spread(x))
    assert bool(((estimate - exact).abs() < error).all())
    alone = with_error(flow, x[3:4], divergence="exact")
    torch.testing.assert_close(alone.estimate, estimate[3:4], rtol=1e-10, atol=0)


# -- the rest --------------------------------------------------------------------------------------------------------


def test_the_estimate_is_differentiable() -> None:
    flow, x = build((3,), dtype="float64"), normal(4, 3).double().requires_grad_()
    estimate, error = with_error(flow, x)
    assert not error.requires_grad
    (grad,) = torch.autograd.grad(estimate.sum(), x)
    (expected,) = torch.autograd.grad(flow.log_prob(x).sum(), x)
    torch.testing.assert_close(grad, expected)


@torch.no_grad()
def test_the_flow_is_left_as_it_was() -> None:
    flow = build((3,), dtype="float32")
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    estimate, error = with_error(flow, normal(2, 3))
    assert (estimate.dtype, error.dtype) == (torch.float32, torch.float32)
    for name, value in flow.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


@torch.no_grad()
def test_no_samples() -> None:
    estimate, error = with_error(build((3,)), torch.zeros(0, 3))
    assert (estimate.shape, error.shape) == ((0,), (0,))


def test_one_probe_has_no_spread() -> None:
    with pytest.raises(ConfigError, match="probes = 1: an error needs the spread of at least 2; leave it out for 16"):
        with_error(build((3,)), normal(2, 3), divergence=Divergence("hutchinson", 1))
    assert with_error(build((3,)), normal(2, 3), divergence={"probes": 1}).error.shape == (2,)  # exact: not used


def test_wrong_input() -> None:
    with pytest.raises(DataError, match=r"expected \(batch, 3\)"):
        with_error(build((3,)), normal(2, 4))
    with pytest.raises(ConfigError, match="unknown kind 'trace'"):
        with_error(build((3,)), normal(2, 3), divergence="trace")
