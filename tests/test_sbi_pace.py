"""The pace at which a flow learns in sbi's loop: what Adam's steps become, and which weights are used."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from pyrnode.errors import SolverError
from pyrnode.sbi import rnode
from pyrnode.sbi.pace import PEAK, USUAL, Pace
from tests.test_sbi import needs_sbi

X = torch.linspace(-1, 1, 64)[:, None]
NORMAL = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def loss(module: nn.Module) -> Tensor:
    return (module(X.double()) - (3 * X.double()).sin()).square().mean()


def paced(steps: int, rate: float = USUAL) -> tuple[nn.Module, Pace]:
    """A network that a loop of one rate has trained, with a pace."""
    module, pace = network(), Pace()
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    for _ in range(steps):
        pace.follow(module)
        optimizer.zero_grad()
        loss(module).backward()
        optimizer.step()
    pace.follow(module)
    return module, pace


def by_adam(steps: int, rate: float) -> nn.Module:
    """What Adam itself makes of it, with a warm-up of 50 steps to that rate."""
    module = network()
    optimizer = torch.optim.Adam(module.parameters(), lr=1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 50)
        optimizer.zero_grad()
        loss(module).backward()
        optimizer.step()
    return module


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize(("rate", "expected"), [(USUAL, PEAK), (2e-3, 2e-3)], ids=["sbi's", "chosen"])
def test_steps_are_those_of_adam_at_another_rate(rate: float, expected: float) -> None:
    module, pace = paced(120, rate)
    assert pace.steps == 120
    assert torch.allclose(weights(module), weights(by_adam(120, expected)), rtol=1e-6, atol=1e-9)
    assert not torch.allclose(weights(module), weights(by_adam(120, 1.1 * expected)), rtol=1e-2)


def test_the_average_is_used_and_training_goes_on_with_the_weights() -> None:
    module, pace = paced(80)
    trained = weights(module)
    pace.use(module)
    assert not torch.equal(weights(module), trained)
    assert float(loss(module).detach()) == pytest.approx(float(loss(by_adam(80, PEAK)).detach()), rel=0.5)
    pace.use(module)  # a second time, as posteriors do
    pace.resume(module)
    assert torch.equal(weights(module), trained)
    pace.follow(module)
    assert (pace.steps, torch.equal(weights(module), trained)) == (80, True)  # no step was made


def test_the_average_is_of_the_last_ninth_of_the_steps() -> None:
    module, pace = nn.Linear(1, 1, bias=False).double(), Pace()
    nn.init.zeros_(module.weight)
    pace.follow(module)
    for _ in range(900):
        with torch.no_grad():
            module.weight += 1e-3  # a rate of somebody's choice, which keeps its length after the warm-up
        pace.follow(module)
    last = float(module.weight.detach())
    assert last == pytest.approx(0.9 - 0.0245, rel=1e-9)  # 50 steps of a growing length
    pace.use(module)
    assert last - float(module.weight.detach()) == pytest.approx(0.09, rel=0.05)


def test_weights_that_are_loaded_begin_again() -> None:
    module, pace = paced(80)
    pace.use(module)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.1
    loaded = weights(module)
    pace.resume(module)
    assert pace.steps == 0
    pace.follow(module)
    assert torch.equal(weights(module), loaded)
    assert pace.factor == PEAK / USUAL  # whose loop it is was found out before


def test_the_rate_is_halved_where_validation_does_not_improve() -> None:
    module, pace = paced(10)
    shares = []
    for value in (3.0, 2.0, 2.0, 2.1, 2.2, 1.0, *[1.5] * 30):
        pace.use(module)
        pace.validated(torch.full((5,), value + 1))
        pace.validated(torch.full((5,), value - 1))
        pace.resume(module)
        shares.append(pace.share)
    assert shares[:6] == [1, 1, 1, 1, 0.5, 0.5]
    assert shares[8:11] == [0.25, 0.25, 0.25]
    assert min(shares) == shares[-1] == 0.01


def test_a_retreat_is_to_the_average_at_half_the_rate() -> None:
    module, pace = paced(80)
    pace.use(module)
    average = weights(module)
    pace.resume(module)
    pace.retreat(module)
    assert (pace.share, torch.equal(weights(module), average)) == (0.5, True)


def test_a_retreat_goes_on_from_the_average_by_steps_of_half_the_length() -> None:
    """What the weights were counts no more, nor a step that was not followed yet."""
    module, pace = paced(80)
    step(module)
    pace.retreat(module)
    average = weights(module)
    assert pace.steps == 81
    step(module)
    pace.follow(module)
    assert torch.allclose(weights(module) - average, torch.full_like(average, 0.5 * 1e-4 * PEAK / USUAL), rtol=1e-6)


def step(module: nn.Module, length: float = 1e-4) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p += length


def test_the_average_is_of_a_thousand_steps_at_most() -> None:
    module, pace = nn.Linear(1, 1, bias=False).double(), Pace()
    pace.follow(module)
    for _ in range(20_000):
        step(module, 1e-3)
        pace.follow(module)
    last = float(module.weight.detach())
    pace.use(module)
    assert last - float(module.weight.detach()) == pytest.approx(0.999, rel=0.02)


def test_validation_is_of_all_its_batches() -> None:
    module, pace = paced(10)
    for first in (1.0, 2.0, 3.0, 4.0):  # the first is the best, whatever the last batch says
        pace.use(module)
        pace.validated(torch.full((9,), first))
        pace.validated(torch.full((1,), -first))
        pace.resume(module)
    assert pace.share == 0.5


@pytest.mark.parametrize(("first", "second", "length"), [(USUAL, 2e-3, 2e-3), (2e-3, USUAL, PEAK)])
def test_another_rate_in_a_later_round_is_found_out(first: float, second: float, length: float) -> None:
    module, pace = paced(80, first)
    for rate in (second, first, second):
        pace.use(module)
        pace.resume(module)
        before = weights(module)
        optimizer = torch.optim.Adam(module.parameters(), lr=rate)
        optimizer.zero_grad()
        loss(module).backward()
        optimizer.step()
        pace.follow(module)
    assert float((weights(module) - before).abs().max()) == pytest.approx(length, rel=1e-3)


def test_the_rate_of_an_optimiser_that_goes_on_is_not_asked_again() -> None:
    """Of full batches the gradient hardly changes, and many a step is about as long as the first."""
    module, pace = network(), Pace()
    optimizer = torch.optim.Adam(module.parameters(), lr=USUAL)
    for _ in range(60):
        pace.use(module)
        pace.resume(module)
        pace.follow(module)
        optimizer.zero_grad()
        loss(module).backward()
        optimizer.step()
        pace.follow(module)
        assert pace.factor == PEAK / USUAL


def test_weights_of_thousands_do_not_hide_the_rate() -> None:
    """float32 rounds their steps to some other length."""
    module, pace = network().float(), Pace()
    module.register_parameter("scale", nn.Parameter(torch.tensor([2.0**14])))
    optimizer = torch.optim.Adam(module.parameters(), lr=USUAL)
    pace.follow(module)
    ((module(X) - X).square().mean() * module.get_parameter("scale").sum()).backward()
    optimizer.step()
    with torch.no_grad():
        module.get_parameter("scale").add_(2.0**-9)
    pace.follow(module)
    assert pace.factor == PEAK / USUAL


def test_weights_that_are_frozen_between_rounds_begin_again() -> None:
    module, pace = paced(80)
    pace.use(module)
    next(module.parameters()).requires_grad_(False)
    used = weights(module)
    pace.resume(module)
    pace.follow(module)
    assert (pace.steps, torch.equal(weights(module), used)) == (0, True)


# -- with sbi --------------------------------------------------------------------------------------------------------


def inference(builder: Any, n: int = 1200) -> Any:
    from sbi.inference import NPE

    theta = NORMAL.sample((n,))
    x = theta + torch.tensor([0.2, 0.5]) * torch.randn_like(theta)
    return NPE(NORMAL, density_estimator=builder, show_progress_bars=False).append_simulations(theta, x)


def exact(x: Tensor) -> Independent:
    """The posterior."""
    variance = torch.tensor([0.04, 0.25])
    return Independent(Normal(x / (1 + variance), (variance / (1 + variance)).sqrt()), 1)


@needs_sbi
@pytest.mark.filterwarnings("ignore:Maximum number of epochs")
def test_sbis_own_loop_is_enough_without_an_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    loop = inference(rnode(NORMAL))
    estimator = loop.train(max_num_epochs=25)
    theta = NORMAL.sample((2000,))
    x = theta + torch.tensor([0.2, 0.5]) * torch.randn_like(theta)
    with torch.no_grad():
        left = float((exact(x).log_prob(theta) - estimator.log_prob(theta, x)[0]).mean())
    assert -0.02 < left < 0.08  # 1 nat is left by 5e-4 without a pace
    assert not estimator.training
    theta, x, _ = loop.get_simulations()
    held = loop.val_indices
    with torch.no_grad():  # what sbi has stopped by is the density that it gives back
        found = -float(estimator.log_prob(theta[held], x[held])[0].mean())
    assert found == pytest.approx(loop.summary["best_validation_loss"][-1], abs=1e-5)


@needs_sbi
def test_training_gets_over_a_solve_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    theta, x = NORMAL.sample((100,)), torch.randn(100, 3)
    estimator = rnode(NORMAL, hidden=[8])(theta, x).train()
    solve, failures = estimator.net.solve, [1]

    def failing(*args: Any, **kwargs: Any) -> Any:
        if failures and torch.is_grad_enabled():
            failures.pop()
            raise SolverError("no", status="Unstable")
        return solve(*args, **kwargs)

    monkeypatch.setattr(estimator.net, "solve", failing)
    assert bool(torch.isfinite(estimator.loss(theta, x)).all())
    assert estimator._pace.share == 0.5
    failures.extend([1, 1])
    with pytest.raises(SolverError, match="no"):
        estimator.loss(theta, x)


@needs_sbi
@pytest.mark.filterwarnings("ignore:Maximum number of epochs")
def test_torchs_seed_makes_an_estimator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members of an ensemble differ by `torch.manual_seed`, and it gives each of them again."""
    monkeypatch.chdir(tmp_path)
    found = []
    for seed in (1, 2, 1):
        torch.manual_seed(0)
        loop = inference(rnode(NORMAL, hidden=[8]), 300)
        torch.manual_seed(seed)
        found.append(weights(loop.train(max_num_epochs=2)))
    assert torch.equal(found[0], found[2])
    assert not torch.allclose(found[0], found[1])


@needs_sbi
@pytest.mark.filterwarnings("ignore:Maximum number of epochs")
def test_a_second_round_is_paced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss is made of `log_prob`, not of `loss`."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    loop = inference(rnode(NORMAL, hidden=[16, 16]), 400)
    loop.train(max_num_epochs=3)
    proposal = loop.build_posterior().set_default_x(torch.zeros(1, 2))
    theta = proposal.sample((400,), show_progress_bars=False)
    x = theta + torch.tensor([0.2, 0.5]) * torch.randn_like(theta)
    estimator = loop.append_simulations(theta, x, proposal=proposal).train(max_num_epochs=3)
    assert estimator._pace.steps >= 9
    assert math.isclose(estimator._pace.factor, PEAK / USUAL)


@needs_sbi
def test_the_exact_posterior_of_the_decay_is_that_of_a_grid() -> None:
    from benchmarks.inference import TASKS

    torch.manual_seed(0)
    task = TASKS["decay"]()
    x = task.simulate(torch.tensor([[1.0, 0.8]]))
    drawn = task.posterior(x[0], 4000).double()
    low, high = torch.tensor([0.2, 0.05]).double(), torch.tensor([2.0, 3.0]).double()
    sides = [a + (b - a) * (torch.arange(400).double() + 0.5) / 400 for a, b in zip(low, high, strict=True)]
    grid = torch.cartesian_prod(*sides)
    times = torch.linspace(0.2, 4, 10).double()
    curve = grid[:, :1] * (-grid[:, 1:] * times).exp()
    weight = (-0.5 * ((x.double() - curve) / 0.15).square().sum(1)).softmax(0)
    mean = weight @ grid
    sd = (weight @ (grid - mean).square()).sqrt()
    assert torch.allclose(drawn.mean(0), mean, atol=0.06 * float(sd.min()) + 0.005)
    assert torch.allclose(drawn.std(0), sd, rtol=0.06)
