"""Periodic columns: unwrapped, a density over one period that is smooth wherever it is cut, and what is learned."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pyrnode
from pyrnode import Config, Flow
from pyrnode.bounded import Periodic
from pyrnode.errors import ConfigError
from pyrnode.estimator import RNODEDensity
from pyrnode.turns import log_sum
from tests.test_bounded import ACCURATE, SMALL, flow_of, panels

NAN, PI = math.nan, math.pi


def circle(low: float, high: float, count: int) -> tuple[Tensor, float]:
    """Points of the trapezoidal rule, which converges exponentially for smooth periodic functions, and their weight."""
    return low + (high - low) * torch.arange(count, dtype=torch.double) / count, (high - low) / count


# -- the transform ---------------------------------------------------------------------------------------------------


def test_a_value_stands_for_two_on_the_window() -> None:
    transform = Periodic([0.0, NAN], [24.0, NAN], torch.tensor([3.0, 0.0]))
    x = torch.tensor([[0.0, 7.0], [23.5, 8.0], [3.0, 9.0], [14.9, 1.0], [15.1, 1.0], [100.0, 1.0]], dtype=torch.double)
    near, far = transform.unwrapped(x).unflatten(0, (2, -1))
    assert near[:, 0].tolist() == pytest.approx([0, -0.5, 3, 14.9, -8.9, 4])
    assert far[:, 0].tolist() == pytest.approx([24, 23.5, -21, -9.1, 15.1, -20])
    assert torch.equal(near[:, 1], x[:, 1])
    assert torch.equal(far[:, 1], x[:, 1])


def test_two_columns_have_four_turns() -> None:
    transform = Periodic([0.0, NAN, -180.0], [1.0, NAN, 180.0])
    u = transform.unwrapped(torch.tensor([[0.25, 5.0, 90.0]], dtype=torch.double))
    assert transform.turns == 4
    assert {tuple(row) for row in u.tolist()} == {(a, 5.0, b) for a in (0.25, 1.25) for b in (90.0, -270.0)}


def test_the_log_determinant_is_autograds() -> None:
    transform = Periodic([0.0, NAN], [24.0, NAN], torch.tensor([3.0, 0.0]))
    u = transform.unwrapped(torch.rand(5, 2, dtype=torch.double) * 24)
    _, log_det = transform(u)
    for i in range(len(u)):
        full = torch.autograd.functional.jacobian(lambda v: transform(v[None])[0][0], u[i])
        assert float(log_det[i]) == pytest.approx(float(torch.linalg.slogdet(full)[1]), abs=1e-10)


def test_all_turns_come_back_as_the_value() -> None:
    transform = Periodic([-180.0], [180.0], torch.tensor([170.0]))
    x = torch.tensor([[-180.0], [-10.0], [0.5], [169.0], [179.9]], dtype=torch.double)
    back = transform.inverse(transform(transform.unwrapped(x))[0])
    assert torch.allclose(back, x.repeat(2, 1), rtol=0, atol=1e-9)


def test_the_centre_is_the_circular_mean_of_weighted_samples() -> None:
    x = torch.tensor([[350.0], [20.0], [5.0], [100.0]], dtype=torch.double)
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.double)
    angle = torch.deg2rad(x[:3, 0])
    expected = math.degrees(math.atan2(angle.sin().sum(), angle.cos().sum()))
    assert float(Periodic.fit_centre([0.0], [360.0], x, weight).centre) == pytest.approx(expected, abs=1e-9)


def test_sums_of_densities_and_their_gradients() -> None:
    each = torch.tensor([[-1.0, -math.inf, -math.inf], [-2.0, -3.0, -math.inf]], dtype=torch.double, requires_grad=True)
    total = log_sum(each)
    assert total.tolist() == [pytest.approx(math.log(math.exp(-1) + math.exp(-2))), -3.0, -math.inf]
    (gradient,) = torch.autograd.grad(total[:2].sum(), each, retain_graph=True)
    assert gradient[:, 1].tolist() == [0.0, 1.0]
    assert bool(torch.isfinite(torch.autograd.grad(total.sum(), each)[0]).all())


# -- the density -----------------------------------------------------------------------------------------------------


def test_the_untrained_density_is_the_closed_form() -> None:
    """Of the identity: a logit-normal density on two periods, wrapped."""
    flow = Flow.build(Config().override({**SMALL, "period": {0: (-PI, PI)}}), (1,))
    flow.transform.transforms[1].std.fill_(0.7)
    flow.transform.transforms[0].centre.fill_(3.0)
    x, _ = circle(-PI, PI, 64)
    expected = torch.zeros_like(x)
    for k in (-2, -1, 0, 1, 2):
        u = x + 2 * PI * k - 3.0
        inside = u.abs() < 2 * PI
        s = torch.where(inside, (u + 2 * PI) / (4 * PI), 0.5)
        q = (torch.exp(-0.5 * (torch.logit(s) / 0.7) ** 2) / 0.7 / math.sqrt(2 * PI)) / (s * (1 - s) * 4 * PI)
        expected += torch.where(inside, q, 0.0)
    assert torch.allclose(flow.log_prob(x[:, None]).exp(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("low", [0.0, -180.0, 17.5])
def test_the_density_integrates_to_one_over_a_period_wherever_it_begins(low: float) -> None:
    flow = flow_of(1, period={0: (low, low + 360)})
    flow.transform.transforms[0].centre.fill_(low + 300)
    for start in (low, low + 123.4):
        x, w = circle(start, start + 360, 256)
        with torch.no_grad():
            assert float(flow.log_prob(x[:, None]).exp().sum()) * w == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("network", ["mlp", "potential"])
def test_beside_a_bounded_column_it_integrates_to_one(network: str) -> None:
    flow = flow_of(2, bounds={1: (0, 1)}, period={0: 2}, **{"flow.network.kind": network, "hidden": [8, 8]})
    (x, v), (t, w) = circle(0, 2, 64), panels(-12, 12, 6)
    s = torch.sigmoid(t)
    with torch.no_grad():
        p = flow.log_prob(torch.cartesian_prod(x, s), solver={"rtol": 1e-7}).exp().reshape(len(x), len(s))
    assert float(p.sum(0) @ (w * s * (1 - s))) * v == pytest.approx(1, abs=1e-5)


def test_on_a_torus_it_integrates_to_one() -> None:
    flow = flow_of(2, period={0: 1, 1: (-PI, PI)})
    flow.transform.transforms[1].std.fill_(0.6)  # as after a fit: the quadrature converges the sooner
    (x, v), (y, w) = circle(0, 1, 48), circle(-PI, PI, 48)
    with torch.no_grad():
        total = flow.log_prob(torch.cartesian_prod(x, y), solver={"rtol": 1e-7}).exp().sum() * v * w
    assert float(total) == pytest.approx(1, abs=1e-5)


def test_given_a_context_it_integrates_to_one() -> None:
    flow = Flow.build(Config().override({**SMALL, **ACCURATE, "period": {0: 360}}), (1,), context_dim=2)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x, w = circle(0, 360, 256)
    contexts = torch.tensor([[0.0, 1.0], [-2.0, 0.5]], dtype=torch.double)
    with torch.no_grad():
        grid = flow.log_prob(x.repeat(2)[:, None], contexts.repeat_interleave(256, 0)).exp().reshape(2, 256)
    assert (grid.sum(1) * w).tolist() == pytest.approx([1, 1], abs=1e-7)
    assert not torch.allclose(grid[0], grid[1], rtol=0.01)


def test_it_is_smooth_over_the_seam_and_wherever_turns_change() -> None:
    """Values and two derivatives from either side: at the seam, opposite to the centre, and at the centre."""
    flow = flow_of(2, period={0: (0, 1)})
    flow.transform.transforms[0].centre[0] = 0.3

    def taylor(x: float) -> list[float]:
        at = torch.tensor([[x, 0.4]], dtype=torch.double, requires_grad=True)
        value = flow.to_torch({"name": "RK4", "step_size": 0.25}).log_prob(at)
        (slope,) = torch.autograd.grad(value.sum(), at, create_graph=True)
        (curvature,) = torch.autograd.grad(slope[0, 0], at)
        return [float(value.detach()), *slope.detach()[0].tolist(), *curvature[0].tolist()]

    for left, right in ((1 - 1e-9, 1e-9), (0.8 - 1e-9, 0.8 + 1e-9), (0.3 - 1e-9, 0.3 + 1e-9), (1.0, 0.0), (5.25, 0.25)):
        assert taylor(left) == pytest.approx(taylor(right), rel=1e-5, abs=1e-5)


def test_a_value_alone_or_in_a_batch_has_the_same_estimate() -> None:
    """Both turns of a sample have the probes of the sample."""
    flow, estimate = flow_of(2, period={0: 1}), {"kind": "hutchinson", "probes": 2}
    x = flow.sample(5, seed=0)
    alone = torch.cat([flow.log_prob(row[None], divergence=estimate) for row in x])
    assert torch.allclose(flow.log_prob(x, divergence=estimate), alone, rtol=0, atol=1e-9)
    value, error = flow.log_prob(x, divergence=estimate, return_error=True)
    assert torch.allclose(value, alone, rtol=0, atol=1e-9)  # probes are averaged before turns are summed
    assert bool(((value - flow.log_prob(x)).abs() < 6 * error + 1e-6).all())


def test_integrals_are_means_over_turns() -> None:
    flow = flow_of(2, period={0: 1})
    x, _ = flow.admit(flow.sample(6, seed=0))
    passage = flow.solve(x, flow.draw(flow.divergence.changed("exact"), torch.Generator()))
    assert passage.turns is not None
    turns = [flow_turn(flow, x, k) for k in range(2)]
    share = torch.softmax(passage.turns, 0)
    for name in ("E", "n"):
        by_hand = sum(p * turn.total(name) for p, turn in zip(share, turns, strict=True))
        assert torch.allclose(passage.total(name), by_hand, rtol=1e-6, atol=1e-9)
    assert torch.allclose(passage.z, turns[0].z, rtol=0, atol=1e-9)
    assert passage.nfe == pytest.approx(2 * passage.blocks[0].stats.nfe)


def flow_turn(flow: Flow, x: Tensor, turn: int) -> Any:
    """The passage of one turn, by a flow that knows no period."""
    y, _ = flow.transform(flow.transform.unwrapped(x).unflatten(0, (2, -1))[turn])
    from pyrnode.transforms import Chain

    plain = Flow(Chain([]), list(flow.parts), flow.event_shape, flow.config)
    return plain.solve(y, plain.draw(plain.divergence.changed("exact"), torch.Generator()))


# -- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [-PI, 0.0, 0.1])
def test_samples_lie_within_the_period_in_single_precision(low: float) -> None:
    high = low + 2 * PI
    settings = {**SMALL, "dtype": "float32", "evaluation.solver": {"name": "RK4", "step_size": 1.0}}
    flow = Flow.build(Config().override({**settings, "period": {0: (low, high)}}), (1,))
    flow.chunk = 100_000
    x = flow.sample(100_000, seed=0).double()
    assert bool(((x >= low) & (x < high)).all())
    edge = flow.transform.contained(torch.tensor([[high], [low]], dtype=torch.float32)).double()
    assert bool(((edge >= low) & (edge < high)).all())


def test_samples_have_the_density() -> None:
    flow = flow_of(1, period={0: (-PI, PI)})
    x, w = circle(-PI, PI, 128)
    with torch.no_grad():
        p = flow.log_prob(x[:, None]).exp() * w
    drawn = flow.sample(20_000, seed=0)[:, 0]
    for k in (1, 2):
        for wave in (torch.sin, torch.cos):
            error = 4 * float(wave(k * drawn).std()) / math.sqrt(len(drawn))
            assert float(wave(k * drawn).mean()) == pytest.approx(float((p * wave(k * x)).sum()), abs=error)


def test_decoding_undoes_encoding() -> None:
    flow = flow_of(2, period={0: (0, 1)})
    x = flow.sample(20, seed=1)
    assert torch.allclose(flow.decode(flow.encode(x)), x, rtol=0, atol=1e-7)
    x[:, 0] += 3
    assert torch.allclose(flow.decode(flow.encode(x))[:, 0], x[:, 0] - 3, rtol=0, atol=1e-7)


def test_among_torchs_distributions() -> None:
    flow = flow_of(2, period={0: 1})
    density, x = flow.distribution(), flow.sample(4, seed=0)
    assert torch.allclose(density.log_prob(x), flow.log_prob(x), rtol=0, atol=1e-12)
    assert bool(density.support.check(x + 5).all())  # as VonMises has it
    with pytest.raises(ConfigError, match=r"no bijection.*take flow.distribution\(\)"):
        pyrnode.FlowTransform(flow)


# -- settings, and what is learned -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("period", "message"),
    [
        ({0: 0}, "low < high"),
        ({0: -1}, "low < high"),
        ({0: math.nan}, "neither NaN"),
        ({0: (None, 1)}, "two numbers"),
        ({0: math.inf}, "finite"),
        ({i: 1 for i in range(7)}, "at most 6"),
    ],
)
def test_periods_that_are_none(period: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config().override({"period": period})


def test_a_column_is_bounded_or_periodic() -> None:
    with pytest.raises(ConfigError, match="column 'a' is in bounds and in period"):
        Config().override({"period": {"a": 1}, "bounds": {"a": (0, 1)}})


@pytest.mark.parametrize("concentration", [1.0, 30.0])
def test_a_von_mises_density_at_the_seam_is_learned_to_its_entropy(concentration: float) -> None:
    """Its mean is at the seam, where a flow on the interval would tear it in two."""
    mean, k = torch.tensor(PI - 0.05).double(), torch.tensor(concentration).double()
    law = torch.distributions.VonMises(mean, k)
    x, test = law.sample((3000, 1)), law.sample((4000, 1))
    model = RNODEDensity(period={0: (-PI, PI)}, hidden=(16,), max_steps=120, random_state=0).fit(x.numpy())
    gap = law.log_prob(test[:, 0]).numpy() - model.score_samples(test.numpy())
    assert -4 * gap.std() / math.sqrt(len(gap)) < gap.mean() < 0.02
    drawn = model.sample(20_000, random_state=0)[:, 0]
    resultant = float(torch.special.i1(k) / torch.special.i0(k))
    assert np.cos(drawn - float(mean)).mean() == pytest.approx(resultant, abs=0.02)


def test_a_table_of_angles_is_trained_and_scored(tmp_path: Any) -> None:
    rng = np.random.default_rng(0)
    table = np.stack([np.mod(rng.vonmises(3.0, 2.0, 300) * 180 / PI, 360), rng.normal(size=300)], 1)
    quick = {"max_steps": 6, "hidden": [8], "progress": False, "period": {0: 360}, "standardize": "auto"}
    result = pyrnode.train(table, out=tmp_path / "run", **quick)
    assert result.report is not None
    assert result.report.baselines.keys() == {"gaussian", "mixture", "kde"}
    flow, x = pyrnode.load(tmp_path / "run"), torch.from_numpy(table[:10])
    assert torch.equal(flow.log_prob(x), result.flow.log_prob(x))
    angle = math.radians(float(flow.transform.transforms[0].centre[0]))
    assert math.cos(angle - 3.0) > 0.95  # the circular mean of what was trained on
    none = pyrnode.train(table, evaluate=False, **{**quick, "standardize": "none"}).flow
    assert float(none.transform.transforms[0].centre[0]) == float(flow.transform.transforms[0].centre[0])
