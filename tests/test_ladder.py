"""The training solver that training chooses, and the score that it is chosen by: the one that `log_prob` gives."""

from __future__ import annotations

import math
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pyrnode
from pyrnode import solvers
from pyrnode.composition import base_log_prob
from pyrnode.config import Config, SolverConfig
from pyrnode.data import load
from pyrnode.errors import ConfigError, SolverError, SolverWarning
from pyrnode.estimator import RNODEDensity
from pyrnode.runs import RunFolder, read_metrics
from pyrnode.training.ladder import Ladder
from pyrnode.training.trainer import Trainer
from pyrnode.training.validation import Outcome, Validation

SMALL: dict[str, Any] = {"flow.network.hidden": [8], "data.samples": 400, "batch_size": 20, "max_steps": 10}
SMALL |= {"warmup_steps": 0, "schedule": "constant", "engine": "torch", "device": "cpu"}


def trainer(folder: RunFolder | None = None, **settings: Any) -> Trainer:
    config = Config.preset("toy").override({"data.name": "8gaussians", "solver": "auto", **SMALL, **settings})
    return Trainer(config, load("8gaussians", config=config.data), folder, progress=False)


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


def test_the_automatic_solver_begins_with_one_step_of_RK4_and_goes_on_with_order_five() -> None:
    ladder = Ladder(SolverConfig(name="auto", step_size="auto"), 2.0, 0.01)
    assert [(ladder[k].name, ladder[k].step_size) for k in range(4)] == [
        ("RK4", 2.0),
        ("DP5", 2.0),
        ("DP5", 1.0),
        ("DP5", 0.5),
    ]
    assert not any(solvers.adaptive(ladder[k]) for k in range(4))
    assert ladder[ladder.highest].step_size == 2 * 0.5**6


def test_it_is_climbed_to_the_first_that_is_right_and_no_further() -> None:
    asked = []

    def differ(one: SolverConfig, other: SolverConfig) -> float:
        asked.append((one.step_size, other.step_size))
        return float(one.step_size) ** 4

    ladder = Ladder(SolverConfig(step_size="auto"), 1.0, 0.01)
    assert ladder.climb(0, differ) == (2, 0.25**4)
    assert asked == [(1.0, 0.25), (0.5, 0.125), (0.25, 0.0625)]
    assert ladder.climb(0, lambda one, other: math.inf) == (6, math.inf)


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
    kept = partial(SolverConfig, precision="auto")  # the preset has it
    assert preset.override({"solver": "auto"}).solver == kept(name="auto", step_size="auto")
    assert preset.override({"solver": "auto", "step_size": 0.1}).solver == kept(
        name="RK4", step_size=0.1, precision="auto"
    )
    assert Config().override({"solver": "DP5"}).solver.adaptive
    assert preset.override({"solver": "Midpoint"}).solver == kept(name="Midpoint", step_size=0.25, precision="auto")
    assert Config.from_toml('solver = "auto"').solver == Config().solver
    for name in ("finlay2020-mnist", "finlay2020-cifar10"):
        assert Config.preset(name).solver == kept(name="RK4", step_size=0.25)


# -- what training reports and what it hands back ---------------------------------------------------------------------


def _tables() -> dict[str, Tensor]:
    """A sheet that is nearly singular, heavy tails, and a comb."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=g, dtype=torch.double)
    sheet = torch.stack((x[:, 0], x[:, 1], x[:, 0] * x[:, 1] + 1e-3 * x[:, 2]), 1)
    return {
        "sheet": sheet,
        "tails": x * torch.randn(400, 1, generator=g, dtype=torch.double).abs().reciprocal(),
        "comb": (4 * x[:, :2]).round() + 0.05 * torch.randn(400, 2, generator=g, dtype=torch.double),
    }


def _settings(seed: int) -> dict[str, Any]:
    """Some settings, good or bad."""
    random = np.random.default_rng(seed)
    solver: list[Any] = [
        "auto",
        "Euler",
        "Midpoint",
        {"name": "RK4", "step_size": 1.0},
        {"name": "RK4", "step_size": "auto"},
    ]
    return {
        "solver": solver[random.integers(len(solver))],
        "learning_rate": float(10 ** random.uniform(-3, -1)),
        "kinetic": float(random.choice([0.0, 0.01, 1.0])),
        "jacobian": float(random.choice([0.0, 0.01, 1.0])),
        "activation": str(random.choice(["tanh", "softplus", "silu"])),
        "noise": str(random.choice(["gaussian", "rademacher"])),
        "standardize": str(random.choice(["auto", "whiten", "scale"])),
        "batch_size": int(random.choice([8, 64])),
        "seed": seed,
    }


@pytest.mark.parametrize("engine", ["torch", pytest.param("julia", marks=pytest.mark.needs_julia)])
@pytest.mark.parametrize("name", _tables())
@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_settings_the_reported_score_is_the_density_that_is_handed_back(
    engine: str, name: str, seed: int
) -> None:
    """And where the training solver was wrong, and nothing was its own to choose, that is said."""
    x = _tables()[name]
    settings = {**_settings(seed), "engine": engine, "hidden": [12], "max_steps": 60, "warmup_steps": 0}
    result = pyrnode.train(x, **settings, evaluate=False, progress=False)
    reported = validations(result.history)
    held_out = load(x, config=result.config.data).validation.tensor()
    with torch.no_grad():
        found = -float(result.flow.log_prob(held_out).double().mean()) / x.shape[1]
    best = min(record["validation"] for record in reported)
    assert found == pytest.approx(best, abs=2e-4)
    wrong = [record for record in reported if not record.get("disagreement", math.inf) <= 0.01]
    notes = [note for note in result.notes if "training solver" in note]  # and not of the data
    if result.config.solver.step_size == "auto":
        assert not notes or "step 0.015625, is" in notes[0]  # there is no finer one
    else:
        assert bool(wrong) == bool(notes)


# -- in training -----------------------------------------------------------------------------------------------------


def test_training_finds_the_cheapest_solver_that_is_right_for_linear_dynamics() -> None:
    settings = {**SMALL, "learning_rate": 1e-9, "max_steps": 4, "kinetic": 0, "solver": "auto", "dtype": "float64"}
    settings |= {"evaluation.solver.rtol": 1e-10, "evaluation.solver.atol": 1e-10}
    result = pyrnode.train("8gaussians", dynamics=lambda shape: Linear(6.0), **settings, evaluate=False, progress=False)
    splits = load("8gaussians", config=result.config.data)
    train_set, z = splits.train.tensor().double(), splits.validation.tensor().double()
    z = (z - train_set.mean(0)) / train_set.std(0, correction=0)

    def growth(number: int) -> float:
        """What the ladder's solver of that number multiplies by, from the methods' stability polynomials."""
        h = 0.5 ** max(0, number - 1)
        factor = sum((-6.0 * h) ** k / math.factorial(k) for k in range(5 if number == 0 else 6))
        return (factor + (0.0 if number == 0 else (-6.0 * h) ** 6 / 600)) ** round(1 / h)

    def disagreement(one: float, other: float, z: Tensor) -> float:
        return float((base_log_prob(z * one) - base_log_prob(z * other)).abs().mean()) / 2

    expected = next(k for k in range(8) if disagreement(growth(k), growth(k + 2), z[:16]) <= 0.01)
    assert expected > 2  # else the test shows nothing
    (record,) = validations(result.history)
    assert record["step_size"] == 0.5 ** (expected - 1)
    assert record["disagreement"] == pytest.approx(disagreement(growth(expected), math.exp(-6.0), z), rel=1e-3)
    assert [r["nfe"] for r in result.history if "nfe" in r] == [6 * 2 ** (expected - 1)] * 4
    chosen = result.flow.config.solver
    assert (chosen.name, chosen.adaptive, chosen.step_size) == ("DP5", False, 0.5 ** (expected - 1))
    assert result.config.solver.step_size == "auto"


@pytest.mark.parametrize("solver", ["auto", {"name": "RK4", "step_size": "auto"}])
def test_a_solver_to_score_with_is_never_left_to_training(solver: Any) -> None:
    """And that is said before the first step, not at the first validation."""
    with pytest.raises(ConfigError, match="is resolved by training alone"):
        trainer(**{"evaluation.solver": solver})


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
    assert [r["step_size"] for r in validations(subject.history)] == [1.0, 1.0, 0.5]  # RK4, and then DP5 twice
    assert (subject.state.progress.best, subject.state.progress.best_step) == (1.0, 4)
    assert subject.notes == []


def test_a_change_of_the_solver_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Validation, "differ", lambda self, one, other: 1.0)
    monkeypatch.setattr(Validation, "score", lambda self, solver: Outcome(1.0, 0.1, 0.5, 1.0))
    subject = trainer(folder=RunFolder(tmp_path), max_steps=2, validate_every=1)
    assert subject.run()
    assert "DP5 step 0.015625" in [r["solver"] for r in subject.history if r.get("event") == "solver"]
    assert read_metrics(tmp_path) == subject.history


def test_refinement_is_bounded_and_what_it_cannot_mend_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Validation, "differ", lambda self, one, other: 1.0)
    monkeypatch.setattr(Validation, "score", lambda self, solver: Outcome(1.0, 0.1, 0.5, 1.0))
    subject, said = trainer(max_steps=2, validate_every=1), list[str]()
    subject.say = said.append
    assert subject.run()
    assert subject.solver.step_size == 0.5**6
    assert subject.notes == said
    assert "at step 1 the training solver, DP5 step 0.015625, is 0.5 nats per dimension from" in said[0]


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
