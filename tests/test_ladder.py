"""The training solver that training chooses, and the score that it is chosen by: the one that `log_prob` gives."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pyrnode
from pyrnode.composition import base_log_prob
from pyrnode.config import Config, SolverConfig
from pyrnode.data import load
from pyrnode.errors import SolverError, SolverWarning
from pyrnode.estimator import RNODEDensity
from pyrnode.training.ladder import HIGHEST, Ladder
from pyrnode.training.trainer import Trainer
from pyrnode.training.validation import Outcome, Validation

SMALL: dict[str, Any] = {"flow.network.hidden": [8], "data.samples": 400, "batch_size": 20, "max_steps": 10}
SMALL |= {"warmup_steps": 0, "schedule": "constant", "engine": "torch", "device": "cpu"}


def trainer(**settings: Any) -> Trainer:
    config = Config.preset("toy").override({"data.name": "8gaussians", "solver": "auto", **SMALL, **settings})
    return Trainer(config, load("8gaussians", config=config.data), None, progress=False)


def validations(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in history if "validation" in record]


class Linear(nn.Module):
    """``f = −a z``: RK4 multiplies by ``R(−ah)`` in each step, and integrates the divergence exactly."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return -self.a * z


# -- the ladder ------------------------------------------------------------------------------------------------------


def test_each_solver_costs_twice_the_one_before() -> None:
    ladder = Ladder(SolverConfig(name="Midpoint", step_size="auto"), 2.0, 0.01)
    assert [ladder[k].step_size for k in range(4)] == [2.0, 1.0, 0.5, 0.25]
    assert ladder[3].name == "Midpoint"
    fixed = Ladder(SolverConfig(name="DP5", step_size=0.5, rtol=1e-3), 1.0, 0.01)
    assert not fixed.moves
    assert (fixed[2].step_size, fixed[2].rtol) == (0.125, pytest.approx(1e-5))


def test_it_is_climbed_to_the_first_that_is_right_and_no_further() -> None:
    asked = []

    def differ(one: SolverConfig, other: SolverConfig) -> float:
        asked.append((one.step_size, other.step_size))
        return float(one.step_size) ** 4

    ladder = Ladder(SolverConfig(step_size="auto"), 1.0, 0.01)
    assert ladder.climb(0, differ) == (2, 0.25**4)
    assert asked == [(1.0, 0.25), (0.5, 0.125), (0.25, 0.0625)]
    assert ladder.climb(0, lambda one, other: math.inf) == (HIGHEST, math.inf)


def test_it_is_descended_when_the_cheaper_has_long_been_right_with_a_margin() -> None:
    ladder = Ladder(SolverConfig(step_size="auto"), 1.0, 0.01)
    at, calm, course = 3, 0, []
    for _ in range(12):
        at, calm = ladder.descend(at, calm, 2, lambda one, other: 0.001)
        course.append(at)
    assert course == [3] * 7 + [2] * 5  # not below the second argument's
    assert ladder.descend(3, 7, 0, lambda one, other: 0.005) == (3, 0)  # right, but not by a margin


def test_auto_is_a_word_for_a_solver() -> None:
    preset = Config.preset("finlay2020-mnist")
    assert preset.override({"solver": "auto"}).solver == SolverConfig(name="RK4", step_size="auto")
    assert preset.override({"solver": "auto", "step_size": 0.1}).solver.step_size == 0.1
    assert preset.override({"solver": "Midpoint"}).solver == SolverConfig(name="Midpoint", step_size=0.25)
    assert Config.from_toml('solver = "auto"').solver == Config().solver == SolverConfig(step_size="auto")
    for name in ("finlay2020-mnist", "finlay2020-cifar10"):
        assert Config.preset(name).solver == SolverConfig(name="RK4", step_size=0.25)


# -- in training -----------------------------------------------------------------------------------------------------


def test_training_finds_the_cheapest_solver_that_is_right_for_linear_dynamics() -> None:
    settings = {**SMALL, "learning_rate": 1e-9, "max_steps": 4, "kinetic": 0, "solver": "auto", "dtype": "float64"}
    result = pyrnode.train("8gaussians", dynamics=lambda shape: Linear(6.0), **settings, evaluate=False, progress=False)
    splits = load("8gaussians", config=result.config.data)
    train_set, z = splits.train.tensor().double(), splits.validation.tensor().double()
    z = (z - train_set.mean(0)) / train_set.std(0, correction=0)

    def disagreement(h: float, end: float, z: Tensor) -> float:
        growth = sum((-6.0 * h) ** k / math.factorial(k) for k in range(5)) ** round(1 / h)
        return float((base_log_prob(z * growth) - base_log_prob(z * end)).abs().mean()) / 2

    def quarter(h: float) -> float:
        return sum((-6.0 * h / 4) ** k / math.factorial(k) for k in range(5)) ** round(4 / h)

    expected = next(0.5**k for k in range(8) if disagreement(0.5**k, quarter(0.5**k), z[:16]) <= 0.01)
    assert expected < 0.5  # else the test shows nothing
    (record,) = validations(result.history)
    assert record["step_size"] == expected
    assert record["disagreement"] == pytest.approx(disagreement(expected, math.exp(-6.0), z), rel=1e-3)
    assert [r["nfe"] for r in result.history if "nfe" in r] == [4 / expected] * 4
    assert result.flow.config.solver.step_size == expected
    assert result.config.solver.step_size == "auto"


def test_a_step_that_is_right_stays_as_it_is() -> None:
    subject = trainer(validate_every=5)
    assert subject.run()
    assert [r["step_size"] for r in validations(subject.history)] == [1.0, 1.0]


def test_a_solver_that_the_accurate_one_contradicts_is_refined_and_earlier_scores_still_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcomes = iter([Outcome(1.0, 0.1, 0.5, 1.0), Outcome(2.0, 0.1, 0.02, 1.0), Outcome(3.0, 0.1, 0.0, 1.0)])
    monkeypatch.setattr(Validation, "score", lambda self, solver: next(outcomes))
    subject = trainer(validate_every=4)
    assert subject.run()
    assert [r["step_size"] for r in validations(subject.history)] == [1.0, 0.5, 0.25]
    assert (subject.state.progress.best, subject.state.progress.best_step) == (1.0, 4)
    assert subject.notes == []


def test_refinement_is_bounded_and_what_it_cannot_mend_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Validation, "differ", lambda self, one, other: 1.0)
    monkeypatch.setattr(Validation, "score", lambda self, solver: Outcome(1.0, 0.1, 0.5, 1.0))
    subject, said = trainer(max_steps=2, validate_every=1), list[str]()
    subject.say = said.append
    assert subject.run()
    assert subject.solver.step_size == 0.5**HIGHEST
    assert subject.notes == said
    assert "at step 1 the training solver, RK4 step 0.015625, is 0.5 nats per dimension from" in said[0]


def test_a_fixed_step_that_is_wrong_is_said_at_once_in_the_result_and_in_the_report(
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = {**SMALL, "learning_rate": 1e-9, "solver": {"name": "Euler", "step_size": 0.5}, "validate_every": 5}
    settings |= {"samples": 100}
    result = pyrnode.train("8gaussians", dynamics=lambda shape: Linear(1.0), **settings, progress=False)
    (note,) = result.notes
    assert "at step 5 the training solver, Euler step 0.5" in note
    assert "solver='auto'" in note
    assert capsys.readouterr().err.count(note) == 1
    assert result.report is not None
    assert note in result.report.notes


def test_the_estimator_warns_of_it() -> None:
    X = np.random.default_rng(0).normal(size=(200, 2))
    X[:, 1] += X[:, 0] ** 2
    settings = {"solver": "Euler", "step_size": 1.0, "learning_rate": 0.03, "kinetic": 0.0, "jacobian": 0.0}
    with pytest.warns(SolverWarning, match="Euler step 1"):
        RNODEDensity(hidden=(16,), max_steps=40, random_state=0, **settings).fit(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RNODEDensity(hidden=(16,), max_steps=40, random_state=0).fit(X)


def test_an_accurate_solver_that_fails_is_never_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = trainer(validate_every=5)
    solve, fails = subject.flow.solve, True

    def failing(x: Tensor, draw: Any, solver: SolverConfig, **options: Any) -> Any:
        if solver.name == "DP5" and fails:
            raise SolverError("too stiff", status="MaxIters")
        return solve(x, draw, solver, **options)

    monkeypatch.setattr(subject.flow, "solve", failing)
    outcome = subject.validation.score(subject.solver)
    assert (outcome.value, outcome.disagreement) == (math.inf, math.inf)
    assert outcome.record() == {}  # which JSON could not hold
    subject._validate()
    assert (subject.state.progress.best, subject.state.progress.best_step) == (math.inf, 0)
    assert subject.history[-1]["event"] == "the accurate solver failed"
    fails = False
    assert math.isfinite(subject.validation.score(subject.solver).value)


# -- how often, and how long -----------------------------------------------------------------------------------------


def test_validations_take_a_tenth_of_the_work() -> None:
    subject = trainer(max_steps=600, batch_size=50, learning_rate=0.01)
    assert subject.run()
    progress, found = subject.state.progress, validations(subject.history)
    assert len(found) > 3
    assert progress.checked <= 0.1 * progress.work + 2 * progress.checking  # the first and the last in any case
    assert found[-1]["step"] == 600


def test_a_run_ends_when_its_time_is_up_with_a_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1.0
        return now

    monkeypatch.setattr("pyrnode.training.trainer.time.perf_counter", clock)
    subject = trainer(minutes=0.5, max_steps=None, schedule="cosine", learning_rate=0.01)
    assert subject.run()
    taken = [r for r in subject.history if "loss" in r]
    assert 10 <= len(taken) <= 31  # each step costs at least a second of that clock
    assert validations(subject.history)[-1]["step"] == taken[-1]["step"]
    rates = [r["learning_rate"] for r in taken]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.01 * rates[0]


def test_without_epochs_steps_or_minutes_a_run_has_its_own_end() -> None:
    training = Config().training
    assert training.total_steps(500) == training.total_steps(10**6) == 4000
    assert Config().override({"epochs": 2, "batch_size": 10}).training.total_steps(100) == 20
    assert Config().override({"minutes": 1, "max_steps": 7}).training.total_steps(100) == 7
