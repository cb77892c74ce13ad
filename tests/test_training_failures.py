"""Training when it goes wrong: non-finite steps, failing solvers, full disks; and what TensorBoard is shown."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pyrnode
from pyrnode import files, runs
from pyrnode.config import Config
from pyrnode.data import Batch, load
from pyrnode.engines import Solution, TorchEngine
from pyrnode.errors import (
    ConfigError,
    SolverError,
    TrainingDivergedError,
)
from pyrnode.runs import read_metrics
from pyrnode.training.trainer import Trainer
from tests.small_runs import (
    SMALL,
    assert_same_run,
    steps,
    train,
    trainer,
    validations,
)

# -- when it goes wrong ----------------------------------------------------------------------------------------------


def inject(patch: pytest.MonkeyPatch, *, largest: float, after: int, how: str = "loss") -> None:
    """From optimiser step `after` on, solves with steps longer than `largest` go wrong in training."""
    original, stepping = TorchEngine.integrate, Trainer._step
    current = {"step": 0}

    def step(self: Trainer, batch: Batch) -> Any:
        current["step"] = self.state.progress.step
        return stepping(self, batch)

    def integrate(self: TorchEngine, dynamics: Any, z0: Tensor, probes: Any, span: Any, solver: Any, **k: Any) -> Any:
        solution: Solution = original(self, dynamics, z0, probes, span, solver, **k)
        if torch.is_grad_enabled() and current["step"] >= after and solver.step_size > largest:
            if how == "error":
                raise SolverError("the state is not finite after step 3 of 4", status="Unstable")
            if how == "loss":
                solution.z = solution.z * math.inf
            elif how == "gradient":
                solution.z.register_hook(lambda grad: grad * math.nan)
        return solution

    patch.setattr(Trainer, "_step", step)
    patch.setattr(TorchEngine, "integrate", integrate)


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("error", r"after step 7: block 0 \(\(2,\)\): the state is not finite after step 3 of 4"),
        ("loss", r"after step 7: the loss is not finite \(nll inf, E .*, n .*\)"),
        ("gradient", r"after step 7: block 0: the gradient of dynamics\.layers\.0\.\w+ is not finite"),
    ],
)
def test_a_fault_that_a_smaller_step_cures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str, cause: str
) -> None:
    settings = {"checkpoint_every": 3, "learning_rate": 0.01, "max_steps": 12}
    with monkeypatch.context() as patch:
        inject(patch, largest=0.1, after=7, how=how)
        result = train(tmp_path / "run", **settings)
    restarts = [r for r in result.history if r.get("event") == "restart"]
    assert [(r["step"], r["refinement"]) for r in restarts] == [(6, 1), (6, 2)]  # 0.25 → 0.125 → 0.0625
    assert all(re.search(cause, r["cause"]) for r in restarts)
    assert [r["step"] for r in steps(result.history)] == list(range(1, 13))
    assert [r["nfe"] for r in steps(result.history)] == [16] * 6 + [64] * 6
    assert result.history == read_metrics(tmp_path / "run")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("went back to step 6, with half the solver's step") == 2

    # The same by hand: six steps as they were, then the smaller step.
    by_hand = trainer(**settings)
    batches = by_hand._batches()
    for step in range(12):
        by_hand.state.progress.refinement = 0 if step < 6 else 2
        by_hand._step(next(batches))
    final, _ = files.read(tmp_path / "run" / "checkpoint.safetensors", "checkpoint")
    for name, value in by_hand.flow.state_dict().items():
        assert torch.equal(final[f"flow.{name}"], value)


def test_a_restart_survives_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"checkpoint_every": 3, "learning_rate": 0.01, "max_steps": 12}
    inject(monkeypatch, largest=0.1, after=7)
    whole = train(tmp_path / "whole", **settings)
    assert len([r for r in whole.history if r.get("event") == "restart"]) == 2

    class Killed(Exception):
        pass

    def killed(self: Trainer, *args: Any) -> Any:
        if self.state.progress.step == 8:
            raise Killed
        return original(self, *args)

    original = Trainer._step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", killed)
        with pytest.raises(Killed):
            train(tmp_path / "killed", **settings)
    train(tmp_path / "killed", resume=True, **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(("restarts", "attempts"), [(0, 1), (2, 3)])
def test_a_fault_that_nothing_cures_ends_after_a_bounded_number_of_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: int, attempts: int
) -> None:
    tried: list[int] = []
    original = Trainer._step

    def spy(self: Trainer, batch: Batch) -> Any:
        tried.append(self.state.progress.step)
        return original(self, batch)

    monkeypatch.setattr(Trainer, "_step", spy)
    inject(monkeypatch, largest=0.0, after=7, how="error")
    expected = rf"after step 7: block 0.*{restarts} restarts.*last good state, of step 6, is in .*lower the learning_ra"
    with pytest.raises(TrainingDivergedError, match=expected) as caught:
        train(tmp_path, checkpoint_every=3, max_restarts=restarts)
    assert isinstance(caught.value.__cause__, SolverError)
    assert tried.count(7) == attempts
    progress = files.read(tmp_path / "checkpoint.safetensors", "checkpoint")[1]["progress"]
    assert (progress["step"], progress["restarts"]) == (6, restarts)
    assert steps(read_metrics(tmp_path))[-1]["step"] == 6


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 1e5},
        {"learning_rate": 1e30, "optimizer": "sgd"},
        {"learning_rate": 1e5, "penalties.divergence": "hutchinson", "ema": 0.5},
    ],
    ids=["adam", "sgd", "hutchinson"],
)
def test_a_diverging_run_fails_clearly_and_leaves_a_state_that_works(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {"hidden": [8, 8, 8], "activation": "softplus", **settings}
    with pytest.raises(TrainingDivergedError, match="3 restarts with a smaller solver step did not help"):
        train(tmp_path, **settings, max_steps=30, checkpoint_every=1)
    for name, kind in (("checkpoint", "checkpoint"), ("model", "flow")):
        for key, value in files.read(tmp_path / f"{name}.safetensors", kind)[0].items():
            assert bool(torch.isfinite(value).all()), key
    flow = pyrnode.load(tmp_path)
    x = load("8gaussians", config=flow.config.data).train.tensor()
    assert bool(torch.isfinite(flow.log_prob(x, solver=flow.config.solver)).all())
    for record in read_metrics(tmp_path):
        assert all(math.isfinite(v) for v in record.values() if isinstance(v, (int, float)))


# -- TensorBoard -----------------------------------------------------------------------------------------------------


def test_tensorboard_has_the_metrics_once_after_a_resume_and_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {**SMALL, "max_steps": 12, "checkpoint_every": 3, "tensorboard": True}
    monkeypatch.setattr("pyrnode.training.journal._FLUSH_SECONDS", 0.0)  # so that there is something to hide
    stepping = Trainer._step

    class Killed(Exception):
        pass

    def killed(self: Trainer, *args: Any) -> Any:
        if self.state.progress.step == 5:
            raise Killed
        return stepping(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", killed)
        with pytest.raises(Killed):
            train(tmp_path, **settings)
    with monkeypatch.context() as patch:
        inject(patch, largest=0.2, after=8)
        result = train(tmp_path, resume=True, **settings)
    assert len([r for r in result.history if r.get("event") == "restart"]) == 1
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for tag, records in (("train/loss", steps(result.history)), ("validation/validation", validations(result.history))):
        key = tag.partition("/")[2]
        scalars = events.Scalars(tag)
        assert [s.step for s in scalars] == [r["step"] for r in records]
        assert [s.value for s in scalars] == pytest.approx([r[key] for r in records], rel=1e-6)
    assert {"train/E", "train/nfe", "validation/disagreement"} <= set(events.Tags()["scalars"])


def test_tensorboard_that_is_not_installed_is_an_error_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        train(tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_a_second_process_is_not_needed_for_versions() -> None:
    about = runs.versions(Config())
    assert about["packages"]["numpy"] == np.__version__
    assert about["command"] == sys.argv


def test_a_solver_with_its_settings_and_options() -> None:
    solver = {"name": "DP5", "rtol": 1e-3, "lazy": False}
    with pytest.raises(ConfigError, match=r"solver options \{'lazy': False\}"):  # PyTorch's solvers have none
        pyrnode.train("moons", preset="toy", solver=solver, engine="torch", **SMALL, progress=False)
    with pytest.raises(ConfigError, match="expected a mapping with the solver's 'name'"):
        pyrnode.train("moons", solver={"rtol": 1e-3}, progress=False)
    del solver["lazy"]
    settings = SMALL | {"max_steps": 1}
    result = pyrnode.train("moons", solver=solver, **settings, evaluate=False, progress=False)
    assert (result.config.solver.name, result.config.solver.rtol) == ("DP5", 1e-3)


class Bump(nn.Module):
    """A rate that is large at one stage of a step of DP5 alone: that which counts negatively."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.full((dim,), 3.0))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return (self.size * torch.exp(-(((t - 8 / 9) / 0.02) ** 2))[:, None]).expand_as(z)


def test_an_energy_below_zero_is_a_step_that_is_too_long() -> None:
    """DP5's fifth stage has the weight −2187/6784: its squares would be maximised without a bound."""
    result = pyrnode.train(
        torch.randn(200, 2, generator=torch.Generator().manual_seed(0)),
        dynamics=lambda shape: Bump(*shape),
        solver={"name": "DP5", "adaptive": False, "step_size": 1.0},
        kinetic=0.1,
        max_steps=3,
        engine="torch",
        evaluate=False,
        progress=False,
    )
    restarts = [record for record in result.history if record.get("event") == "restart"]
    assert len(restarts) == 1
    assert re.search(r"E = -\d.* is negative: the training solver's steps are too long", restarts[0]["cause"])
    energies = [record["E"] for record in result.history if "E" in record]
    assert len(energies) == 3
    assert min(energies) > 0
