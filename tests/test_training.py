"""Training: the optimisation against hand-written loops, resuming bit for bit, and what happens when it goes wrong."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pyrnode
import pyrnode.cli
from pyrnode import files, runs, seeds
from pyrnode.composition import base_log_prob
from pyrnode.config import Config, Divergence, FlowConfig, SolverConfig
from pyrnode.data import Batch, load
from pyrnode.engines import Solution, TorchEngine
from pyrnode.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EngineUnavailableError,
    SolverError,
    TrainingDivergedError,
)
from pyrnode.runs import RunFolder, read_metrics
from pyrnode.training import TrainingResult, state
from pyrnode.training import trainer as loop
from pyrnode.training.step import learning_rate
from pyrnode.training.trainer import Trainer
from pyrnode.training.validation import Outcome, Validation
from pyrnode.transforms import Chain

SMALL: dict[str, Any] = {"flow.network.hidden": [8], "data.samples": 200, "batch_size": 20, "validate_every": 4}
SMALL |= {"warmup_steps": 0, "schedule": "constant", "step_size": 0.25}
# 160 training samples: 8 steps an epoch. Noise in the loss, the averaged weights and the schedule are all in use.
FULL = SMALL | {"max_steps": 24, "penalties.divergence": "hutchinson", "ema": 0.9, "schedule": "cosine"}
FULL |= {"warmup_steps": 3, "checkpoint_every": 3, "clip_norm": 1.0, "learning_rate": 0.01}


def train(
    out: Path | None = None, *, data: Any = "8gaussians", resume: bool = False, **settings: Any
) -> TrainingResult:
    overrides = {**SMALL, "max_steps": 10, **settings}
    return pyrnode.train(data, out=out, resume=resume, **overrides, evaluate=False, progress=False)


def trainer(data: Any = "8gaussians", folder: RunFolder | None = None, **settings: Any) -> Trainer:
    config = Config.preset("toy").override({"data.name": "8gaussians", **SMALL, "max_steps": 10, **settings})
    return Trainer(config, load(data, config=config.data), folder, progress=False)


def steps(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in history if "loss" in record]


def validations(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in history if "validation" in record]


def without_seconds(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history]


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(x, y), name


def assert_same_run(a: Path, b: Path) -> None:
    """Parameters, optimiser, averages, best model, counters and metrics, bit for bit; all but the seconds."""
    x, about_x = files.read(a / "checkpoint.safetensors", "checkpoint")
    y, about_y = files.read(b / "checkpoint.safetensors", "checkpoint")
    assert x.keys() == y.keys()
    assert any(name.startswith("optimizer.") for name in x)
    for name in x:
        assert torch.equal(x[name], y[name]), name
    for about in (about_x, about_y):
        for name in ("seconds", "elapsed"):
            about["progress"].pop(name)
    assert about_x == about_y
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert without_seconds(read_metrics(a)) == without_seconds(read_metrics(b))
    assert [path.name for path in b.iterdir() if path.name.startswith(".")] == []


# -- the optimisation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adam", "learning_rate": 0.01},
        {"optimizer": "adam", "learning_rate": 0.01, "weight_decay": 0.5},
        {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.5},
        {"optimizer": "sgd", "learning_rate": 0.1, "clip_norm": 0.05},
        {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.3, "warmup_steps": 4, "schedule": "cosine"},
    ],
    ids=["adam", "adam-l2", "adamw", "sgd-clipped", "sgd-schedule"],
)
def test_training_is_what_a_hand_written_loop_does(settings: dict[str, Any]) -> None:
    kinetic, jacobian = 0.2, 0.3
    penalties = {"kinetic": kinetic, "jacobian": jacobian, "dtype": "float64"}
    subject = trainer(**settings, **penalties)
    by_hand = trainer(**settings, **penalties).flow
    by_hand.transform = Chain([])
    assert subject.run()
    x = subject.splits.train.tensor()
    mean, std = x.double().mean(0), x.double().std(0, correction=0)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[settings["optimizer"]]
    optimizer: Any = kind(by_hand.parameters(), lr=1.0, weight_decay=settings.get("weight_decay", 0.0))
    for step in range(10):
        order = torch.randperm(160, generator=seeds.generator(0, "order", step // 8))
        batch = (x[order[step % 8 * 20 :][:20]].double() - mean) / std
        draw = by_hand.draw(Divergence("exact"), torch.Generator())
        solution = by_hand.solve(batch, draw, SolverConfig(name="RK4", step_size=0.25))
        nll = -(base_log_prob(solution.z) + solution.l - std.log().sum())
        loss = (nll + kinetic * solution.blocks[0].E + jacobian * solution.blocks[0].n).mean() / 2
        optimizer.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in by_hand.parameters() if p.grad is not None]).norm()
        if "clip_norm" in settings and norm > settings["clip_norm"]:
            for p in by_hand.parameters():
                p.grad = None if p.grad is None else p.grad * (settings["clip_norm"] / (norm + 1e-6))
        rate = settings["learning_rate"]
        if "warmup_steps" in settings:
            rate *= (step + 1) / 4 if step < 4 else 0.5 * (1 + math.cos(math.pi * (step - 4) / 6))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        record = steps(subject.history)[step]
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-8)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-7)
        assert record["learning_rate"] == pytest.approx(rate, rel=1e-12)
    for (name, expected), found in zip(by_hand.named_parameters(), subject.flow.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8, msg=name)


def test_the_learning_rate_warms_up_and_decays() -> None:
    subject = trainer(max_steps=20, warmup_steps=5, schedule="cosine", learning_rate=0.1)
    training = subject.config.training
    rates = [learning_rate(training, step, (step - 5) / 15) for step in range(20)]
    assert rates[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert rates[5] == pytest.approx(0.1)
    assert rates[5:] == pytest.approx([0.05 * (1 + math.cos(math.pi * k / 15)) for k in range(15)])
    assert learning_rate(training, 20, 1.0) == pytest.approx(0)
    constant = trainer(max_steps=20, warmup_steps=2, learning_rate=0.1)
    assert [learning_rate(constant.config.training, step, step / 20) for step in (0, 1, 2, 19)] == pytest.approx(
        [0.05, 0.1, 0.1, 0.1]
    )


def test_each_epoch_has_an_order_of_its_own_that_drops_the_remainder() -> None:
    values = np.arange(200, dtype=np.float32)[:, None]
    subject = trainer(values, epochs=2, max_steps=None, batch_size=30)
    kept = subject.splits.train.tensor().flatten().tolist()
    assert (subject.order.steps_per_epoch, subject.span.steps) == (5, 10)
    batches = subject._batches()
    epochs = [[next(batches).x.flatten().tolist() for _ in range(5)] for _ in range(2)]
    seen = [[value for batch in epoch for value in batch] for epoch in epochs]
    for epoch in seen:
        assert len(epoch) == len(set(epoch)) == 150
        assert set(epoch) <= set(kept)
    assert seen[0] != seen[1]
    assert seen[0] != sorted(seen[0])
    subject.state.progress.step = 7  # as after a resume
    assert next(subject._batches()).x.flatten().tolist() == epochs[1][2]


def test_flips_mirror_about_half_of_the_images() -> None:
    values = torch.zeros(100, 1, 4, 4, dtype=torch.uint8)
    values[..., 0] = 200 + (torch.arange(100) % 50)[:, None, None]
    seen: list[Tensor] = []
    subject = trainer(values, **{"data.flip": True, "network.kind": "conv", "scales": 1, "batch_size": 80})
    original = subject.flow.transform.forward

    def spy(x: Tensor, generator: torch.Generator | None = None) -> Any:
        seen.append(x)
        return original(x, generator)

    subject.flow.transform.forward = spy  # type: ignore[method-assign]
    subject._step(next(subject._batches()))
    left, right = (seen[0][:, 0, :, 0] > 0).all(1), (seen[0][:, 0, :, -1] > 0).all(1)
    assert bool((left ^ right).all())
    assert 25 <= int(right.sum()) <= 55


def test_averaged_weights_are_the_average() -> None:
    subject = trainer(ema=0.6)
    average = {name: p.detach().double().clone() for name, p in subject.flow.named_parameters()}
    batches = subject._batches()
    for step in range(12):
        subject._step(next(batches))
        decay = min(0.6, (1 + step) / (10 + step))
        for name, p in subject.flow.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * p.detach().double()
    assert subject.state.average is not None
    for name, expected in average.items():
        torch.testing.assert_close(subject.state.average[name].double(), expected, rtol=1e-5, atol=1e-7)
        assert not torch.equal(subject.state.average[name], subject.flow.state_dict()[name])


def test_averaged_weights_are_validated_and_returned_and_training_goes_on_with_its_own() -> None:
    settings = {"learning_rate": 0.01, "validate_every": 2, "max_steps": 12}
    subject, plain = trainer(ema=0.9, **settings), trainer(**settings)
    assert subject.run()
    assert plain.run()
    assert_same_weights(subject.flow, plain.flow)  # validation in between has not disturbed them
    subject.state.progress.best = math.inf
    subject._validate()
    best = subject.best_flow()
    assert subject.state.average is not None
    for name, value in best.state_dict().items():
        assert torch.equal(value, subject.state.average[name])
    x = subject.splits.validation.tensor()
    log_prob = best.requires_grad_(False).log_prob(x, divergence="exact")
    value = -float(log_prob.double().mean()) / 2
    assert validations(subject.history)[-1]["validation"] == pytest.approx(value, rel=1e-6)


# -- validation ------------------------------------------------------------------------------------------------------


def test_the_best_step_on_validation_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values = iter([3.0, 1.0, 2.0, 1.0, 5.0])
    monkeypatch.setattr(Validation, "score", lambda self, solver: Outcome(next(values), 0.1, 0.0, 1.0))
    weights: list[dict[str, Tensor]] = []
    original = Trainer._validate

    def spy(self: Trainer) -> None:
        original(self)
        weights.append(state.weights(self.flow))

    monkeypatch.setattr(Trainer, "_validate", spy)
    result = train(tmp_path, validate_every=2, learning_rate=0.01)
    assert [r["step"] for r in validations(result.history)] == [2, 4, 6, 8, 10]
    for flow in (result.flow, pyrnode.load(tmp_path)):
        for name, value in flow.state_dict().items():
            assert torch.equal(value, weights[1][name])


@pytest.mark.parametrize(("minutes", "at"), [(1e-12, [1, 2, 3, 4]), (1e6, [4])])
def test_a_checkpoint_is_written_when_the_last_one_is_too_old(
    monkeypatch: pytest.MonkeyPatch, minutes: float, at: list[int]
) -> None:
    saved: list[int] = []
    save = Trainer._save

    def spy(self: Trainer) -> None:
        saved.append(self.state.progress.step)
        save(self)

    monkeypatch.setattr(Trainer, "_save", spy)
    assert trainer(max_steps=4, checkpoint_minutes=minutes, checkpoint_every=0, validate_every=4).run()
    assert saved == at


def test_patience_ends_training(monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([3.0, 1.0, 2.0, 1.0, math.pi, 0.0])
    monkeypatch.setattr(Validation, "score", lambda self, solver: Outcome(next(values), 0.1, 0.0, 1.0))
    result = train(validate_every=2, patience=3, max_steps=50)
    assert steps(result.history)[-1]["step"] == 10  # the second validation was the best; three did not beat it
    assert not result.interrupted


def test_validation_scores_the_samples_held_out_and_no_others_as_log_prob_does() -> None:
    result = train(learning_rate=0.01, validate_every=10)
    splits = load("8gaussians", config=result.config.data)
    result.flow.requires_grad_(False)
    x = splits.validation.tensor()
    log_prob = result.flow.log_prob(x, divergence="exact").double()
    (record,) = validations(result.history)
    assert record["validation"] == pytest.approx(-float(log_prob.mean()) / 2, rel=1e-6)
    assert record["validation_error"] == pytest.approx(float(log_prob.std(correction=0)) / len(x) ** 0.5 / 2, rel=1e-5)
    assert record["validation_bits"] == pytest.approx(record["validation"] / math.log(2))
    coarse = result.flow.log_prob(x, solver=result.config.solver, divergence="exact")
    assert record["disagreement"] == pytest.approx(float((log_prob - coarse).abs().mean()) / 2, abs=1e-7)


def test_validation_limit_bounds_the_samples() -> None:
    subject = trainer(validation_limit=5)
    with torch.no_grad():
        value = subject.validation.score(subject.solver).value
        log_prob = subject.flow.log_prob(subject.splits.validation.tensor()[:5], divergence="exact")
    assert value == pytest.approx(-float(log_prob.mean()) / 2, rel=1e-5)


def test_history_has_a_record_for_every_step_and_validation(tmp_path: Path) -> None:
    result = train(tmp_path, checkpoint_every=3)
    assert [r["step"] for r in steps(result.history)] == list(range(1, 11))
    assert [r["step"] for r in validations(result.history)] == [4, 8, 10]
    assert [r["epoch"] for r in steps(result.history)] == [0] * 8 + [1] * 2
    first = steps(result.history)[0]
    keys = "step epoch loss nll bits E n nfe nfe_backward grad_norm learning_rate seconds"
    assert set(first) == set(keys.split())
    assert first["nfe"] == 16  # RK4, four steps of four stages
    assert first["nfe_backward"] >= 0
    assert first["bits"] == pytest.approx(first["nll"] / math.log(2))
    assert first["E"] == 0  # it starts at the identity
    assert first["n"] == 0
    seconds = [r["seconds"] for r in steps(result.history)]
    assert seconds == sorted(seconds)
    assert read_metrics(tmp_path) == result.history


def test_validation_costs_no_training_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validate, clock = Trainer._validate, [0.0]

    def slow(trainer: Trainer) -> None:
        validate(trainer)
        clock[0] += 1000

    def tick() -> float:
        clock[0] += 1
        return clock[0]

    monkeypatch.setattr(Trainer, "_validate", slow)
    monkeypatch.setattr("pyrnode.training.trainer.time.perf_counter", tick)
    history = train(tmp_path).history
    assert [r["seconds"] for r in steps(history)] == [float(n) for n in range(1, 11)]
    seconds = {r["step"]: r["seconds"] for r in steps(history)}
    assert all(r["seconds"] == seconds[r["step"]] for r in validations(history))


@pytest.mark.parametrize("ema", [None, 0.9])
def test_snapshots_are_the_models_that_were_validated(tmp_path: Path, ema: float | None) -> None:
    result = train(tmp_path, snapshots=True, ema=ema)
    files = RunFolder(tmp_path).snapshots()
    assert list(files) == [r["step"] for r in validations(result.history)] == [4, 8, 10]
    best = min(validations(result.history), key=lambda r: r["validation"])["step"]
    assert_same_weights(pyrnode.load(files[best]), result.flow)
    others = [pyrnode.load(file).state_dict() for step, file in files.items() if step != best]
    assert not any(all(torch.equal(o[k], v) for k, v in result.flow.state_dict().items()) for o in others)
    RunFolder(tmp_path).rewind(8)
    assert list(RunFolder(tmp_path).snapshots()) == [4, 8]


def test_snapshots_need_a_folder_and_a_network_that_can_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="snapshots = true needs out="):
        train(None, snapshots=True)
    with pytest.raises(ConfigError, match="snapshots = true needs pyrnode's own dynamics"):
        pyrnode.train("8gaussians", dynamics=lambda shape: nn.Linear(2, 2), out=tmp_path, **SMALL | {"snapshots": True})
    assert list(tmp_path.iterdir()) == []


# -- what may be handed over -----------------------------------------------------------------------------------------


def test_arrays_tensors_and_splits_are_data() -> None:
    values = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    results = [train(data=values), train(data=torch.from_numpy(values)), train(data=load(values))]
    assert results[0].flow.event_shape == (3,)
    for other in results[1:]:
        assert_same_weights(results[0].flow, other.flow)
    assert results[0].config.data.name == ""


def test_arguments_and_overrides_are_the_same_settings() -> None:
    arguments: dict[str, Any] = {
        "flow": {"blocks": 2, "network": {"hidden": [4]}},
        "solver": "Midpoint",
        "step_size": 0.5,
        "sensealg": "BacksolveAdjoint",
        "kinetic": 0.1,
        "jacobian": 0.2,
        "epochs": 1,
        "batch_size": 50,
        "learning_rate": 0.02,
        "engine": "torch",
        "device": "cpu",
        "seed": 3,
    }
    result = pyrnode.train("moons", preset="toy", samples=200, evaluate=False, progress=False, **arguments)
    expected = Config.preset("toy").override(
        {
            "data.name": "moons",
            "samples": 200,
            "blocks": 2,
            "hidden": [4],
            "solver.name": "Midpoint",
            "step_size": 0.5,
            "sensealg": "BacksolveAdjoint",
            "kinetic": 0.1,
            "jacobian": 0.2,
            "epochs": 1,
            "batch_size": 50,
            "learning_rate": 0.02,
            "engine": "torch",
            "device": "cpu",
            "seed": 3,
        }
    )
    assert result.config == expected
    whole = FlowConfig(blocks=2)
    result = pyrnode.train("moons", flow=whole, **SMALL | {"max_steps": 1}, evaluate=False, progress=False)
    assert result.config.flow.blocks == 2
    assert result.config.flow.network.activation == "softplus"  # a FlowConfig replaces the preset's section


def test_the_preset_that_is_made_for_the_data_is_taken() -> None:
    assert train(max_steps=1).config.flow.network.activation == "tanh"  # toy
    values = torch.randn(50, 2)
    assert train(data=values, max_steps=1).config.flow == Config.preset("table").override({"hidden": [8]}).flow
    images = torch.zeros(50, 1, 4, 4, dtype=torch.uint8)
    images[::2] = 200
    assert train(data=images, max_steps=1).config.flow == Config().override({"hidden": [8]}).flow


def test_a_table_is_whitened_and_held_back_by_its_size() -> None:
    x = torch.randn(120, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 1.0])
    x[:, 2] = x[:, 0] + 0.01 * x[:, 2]
    result = pyrnode.train(x, max_steps=2, evaluate=False, progress=False)
    y, _ = result.flow.transform(x)
    variance = torch.linalg.eigvalsh(torch.cov(y.T))  # of all samples, those that are held out among them
    assert 0.7 < float(variance[0]) < float(variance[-1]) < 1.5
    assert result.flow.config.penalties.weights == (pytest.approx(15 / 96), pytest.approx(15 / 96), 0.0)
    assert result.config.penalties.kinetic == "auto"


def test_dynamics_of_the_users_own_are_trained(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self, d: int) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(d + 1, 8), nn.Tanh(), nn.Linear(8, d))

        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return self.net(torch.cat((z, t[:, None]), 1))  # type: ignore[no-any-return]

    def run(out: Path, count: int) -> TrainingResult:
        return pyrnode.train(
            "8gaussians",
            dynamics=lambda shape: Own(*shape),
            **SMALL | {"max_steps": count, "learning_rate": 0.01, "schedule": "constant"},
            out=out,
            resume=True,
            progress=False,
            evaluate=False,
        )

    result = run(tmp_path / "a", 10)
    assert isinstance(result.flow.blocks[0].dynamics.module, Own)
    assert validations(result.history)[-1]["validation"] < validations(result.history)[0]["validation"]
    assert not (tmp_path / "a" / "model.safetensors").exists()  # a file cannot describe it
    run(tmp_path / "b", 4)
    assert_same_weights(run(tmp_path / "b", 10).flow, result.flow)


def test_training_without_a_folder_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = pyrnode.train("8gaussians", **SMALL | {"max_steps": 2}, progress=False)
    assert list(tmp_path.iterdir()) == []
    assert result.out is None
    assert result.report is not None
    assert result.report.samples == 20


def test_a_run_folder_holds_what_is_needed_to_repeat_it(tmp_path: Path) -> None:
    out = tmp_path / "new" / "run"
    result = pyrnode.train("8gaussians", **SMALL | {"max_steps": 2}, progress=False, out=out)
    names = {path.name for path in out.iterdir()}
    assert {"config.toml", "versions.json", "metrics.jsonl", "checkpoint.safetensors", "model.safetensors"} <= names
    assert {"report.json", "report.txt", "curves.png", "density.png", "trajectories.png"} <= names
    stored = Config.preset(str(out / "config.toml"))
    assert stored == result.config
    about = json.loads((out / "versions.json").read_text())
    assert about["packages"]["torch"] == metadata.version("torch")
    assert result.report is not None
    assert json.loads((out / "report.json").read_text()) == result.report.to_dict()
    assert (out / "report.txt").read_text() == f"{result.report}\n"
    again = pyrnode.train(preset=str(out / "config.toml"), evaluate=False, progress=False)
    assert_same_weights(again.flow, result.flow)


@pytest.mark.parametrize(
    ("arguments", "error", "expected"),
    [
        ({"epoch": 1}, ConfigError, "did you mean 'epochs'"),
        ({"divergence": "exact"}, ConfigError, "ambiguous"),
        ({"data.dir": 1}, ConfigError, "dir = 1"),
        ({"epochs": 0}, ConfigError, "epochs = 0"),
        ({"kinetic": -1.0}, ConfigError, "kinetic"),
        ({"flow": {"block": 1}}, ConfigError, "unknown setting 'flow.block'"),
        ({"flow": "big"}, ConfigError, "flow is a section"),
        ({"preset": "tiny"}, ConfigError, "unknown preset 'tiny'"),
        ({"solver": "RK5"}, EngineUnavailableError, "did you mean 'RK4'"),
        ({"sensealg": "Adjoint"}, EngineUnavailableError, "did you mean 'BacksolveAdjoint'"),
        ({"solver.options": {"a": 1}}, ConfigError, "options"),
        ({"device": "cuda:99"}, ConfigError, "device = 'cuda:99' cannot be used"),
        ({"device": "gpu"}, ConfigError, "device = 'gpu' cannot be used"),
        ({"data": "8gausians"}, DataError, "did you mean '8gaussians'"),
        ({"data": None}, DataError, "no data"),
        ({"data": "no/such/file.npy"}, DataError, "does not exist"),
        ({"data": torch.randn(5, 2)}, DataError, "5 samples"),
        ({"data": torch.full((50, 2), math.nan)}, DataError, "NaN"),
        ({"data": torch.ones(50, 2)}, DataError, "constant"),
        ({"network.kind": "conv"}, ConfigError, "'conv' needs images"),
        ({"resume": True, "out": None}, ConfigError, "resume=True needs out="),
        ({"tensorboard": True, "out": None}, ConfigError, "needs out="),
        ({"dynamics": lambda shape: nn.Identity()}, ConfigError, None),
    ],
)
def test_bad_arguments_are_errors_and_make_no_folder(
    arguments: dict[str, Any], error: type[Exception], expected: str | None, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    call: dict[str, Any] = {"data": "8gaussians", "out": out, "progress": False, **arguments}
    if isinstance(call["data"], str):
        call["samples"] = 100
    if "dynamics" in arguments:
        call["dynamics"] = lambda shape: Parameterless()
        expected = "nothing to train"
    with pytest.raises(error, match=expected):
        pyrnode.train(call.pop("data"), **call)
    assert not out.exists()


class Parameterless(nn.Module):
    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return -z


def test_training_works_in_a_thread() -> None:
    results: list[TrainingResult] = []
    thread = threading.Thread(target=lambda: results.append(train()))
    thread.start()
    thread.join(60)
    assert_same_weights(results[0].flow, train().flow)


def test_the_seed_decides_everything() -> None:
    torch.manual_seed(1)
    a = train(**FULL).flow
    torch.manual_seed(2)
    b = train(**FULL).flow
    assert_same_weights(a, b)
    other = train(**FULL, seed=1).flow
    assert not any(torch.equal(x, y) for x, y in zip(a.parameters(), other.parameters(), strict=True))


# -- resuming --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(out, **FULL)
    return out


@pytest.mark.parametrize("stops", [[3], [4], [8], [1, 2, 23], [5, 11, 12, 17]])
def test_stopping_and_resuming_changes_nothing(tmp_path: Path, uninterrupted: Path, stops: list[int]) -> None:
    for stop in stops:
        result = train_and_stop(tmp_path, stop)
        assert result.interrupted
        assert result.report is None
        assert steps(read_metrics(tmp_path))[-1]["step"] == stop
    result = train(tmp_path, resume=True, **FULL)
    assert not result.interrupted
    assert_same_run(uninterrupted, tmp_path)
    assert result.history == read_metrics(tmp_path)


def train_and_stop(out: Path, step: int) -> TrainingResult:
    """Ctrl-C while the step after `step` is computed."""
    original = loop.loss

    def stopping(flow: Any, batch: Any, config: Any, solver: Any, at: int) -> Any:
        if at == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(flow, batch, config, solver, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "loss", stopping)
        before = signal.getsignal(signal.SIGINT)
        result = train(out, resume=True, **FULL)
        assert signal.getsignal(signal.SIGINT) is before
    return result


def test_ctrl_c_before_the_first_step_can_be_resumed(tmp_path: Path, uninterrupted: Path) -> None:
    assert train_and_stop(tmp_path, 0).interrupted
    train(tmp_path, resume=True, **FULL)
    assert_same_run(uninterrupted, tmp_path)


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Path) -> None:
    original = loop.loss

    def stopping(flow: Any, batch: Any, config: Any, solver: Any, at: int) -> Any:
        if at == 7:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(flow, batch, config, solver, at)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "loss", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, **FULL)
    train(tmp_path, resume=True, **FULL)  # from the checkpoint of step 6
    assert_same_run(uninterrupted, tmp_path)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, uninterrupted: Path) -> None:
    train(tmp_path, **FULL)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    result = train(tmp_path, resume=True, **FULL)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert_same_weights(result.flow, pyrnode.load(uninterrupted))


def test_a_run_may_be_prolonged(tmp_path: Path) -> None:
    constant = FULL | {"schedule": "constant", "validate_every": 5}
    train(tmp_path / "a", **constant | {"max_steps": 10})
    train(tmp_path / "a", resume=True, **constant | {"max_steps": 15})
    assert Config.preset(str(tmp_path / "a" / "config.toml")).training.max_steps == 15
    train(tmp_path / "b", **constant | {"max_steps": 15})
    assert_same_run(tmp_path / "b", tmp_path / "a")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"learning_rate": 0.5}, r"training\.learning_rate: 0\.01 → 0\.5"),
        ({"seed": 1}, r"seed: 0 → 1"),
        ({"ema": None}, r"training\.ema: 0\.9 → None"),
        ({"hidden": [9]}, r"flow\.network\.hidden: \[8\] → \[9\]"),
    ],
)
def test_resuming_with_other_settings_is_an_error(uninterrupted: Path, settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot resume with other settings.*{expected}"):
        train(uninterrupted, resume=True, **FULL | settings)


def test_settings_need_not_be_repeated_to_resume(uninterrupted: Path, tmp_path: Path) -> None:
    train_and_stop(tmp_path, 5)
    pyrnode.train(out=tmp_path, resume=True, evaluate=False, progress=False)
    assert_same_run(uninterrupted, tmp_path)


def test_a_folder_that_holds_a_run_is_not_overwritten(uninterrupted: Path) -> None:
    before = {path.name: path.read_bytes() for path in uninterrupted.iterdir()}
    with pytest.raises(CheckpointError, match=r"already holds a run; pass resume=True"):
        train(uninterrupted, **FULL)
    assert {path.name: path.read_bytes() for path in uninterrupted.iterdir()} == before


def test_resuming_on_other_data_is_an_error(tmp_path: Path) -> None:
    values = torch.randn(200, 2)
    train(tmp_path, data=values)
    with pytest.raises(CheckpointError, match="trained on 160 samples, not 80"):
        train(tmp_path, data=values[:100], resume=True)


@pytest.mark.parametrize(
    ("setting", "other"),
    [("seed = 0", "seed = 5"), ("end_time = 1.0", "end_time = 2.0"), ('activation = "tanh"', 'activation = "silu"')],
)
def test_a_configuration_that_was_edited_is_refused(
    uninterrupted: Path, tmp_path: Path, setting: str, other: str
) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    config = tmp_path / "run" / "config.toml"
    assert setting in config.read_text()
    config.write_text(config.read_text().replace(setting, other, 1))
    key = setting.partition(" ")[0]
    with pytest.raises(CheckpointError, match=rf"it was begun with other settings \([a-z.]*{key}: .* → .*\)"):
        pyrnode.train(out=tmp_path / "run", resume=True, evaluate=False, progress=False)


@pytest.mark.parametrize("change", ["scaled", "shifted", "another order", "one value", "contexts"])
def test_other_data_of_the_same_length_is_refused(tmp_path: Path, change: str) -> None:
    values = torch.randn(200, 2)
    context = torch.randn(200, 1) if change == "contexts" else None
    settings = {"progress": False, "evaluate": False, **SMALL}
    pyrnode.train(values, out=tmp_path, context=context, **settings, max_steps=3)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    other, c = values.clone(), context
    if change == "one value":
        other[load(values).train.tensor()[5, 1] == values] += 1e-6
    elif context is not None:
        c = context + 1
    else:
        other = {"scaled": values * 50, "shifted": values + 1000, "another order": values.flip(0)}[change]
    with pytest.raises(CheckpointError, match="it was trained on other data: as many samples, 160, but other values"):
        pyrnode.train(other, out=tmp_path, context=c, resume=True, **settings, max_steps=6)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    pyrnode.train(values, out=tmp_path, context=context, resume=True, **settings, max_steps=6)


def test_a_data_set_with_random_transforms_can_be_resumed_and_another_cannot(tmp_path: Path) -> None:
    class Items(torch.utils.data.Dataset[Tensor]):
        def __init__(self, scale: float, noise: float) -> None:
            self.x, self.noise = torch.randn(200, 2, generator=torch.Generator().manual_seed(1)) * scale, noise

        def __len__(self) -> int:
            return 200

        def __getitem__(self, index: int) -> Tensor:
            return self.x[index] + self.noise * torch.rand(())

    train(tmp_path / "a", data=Items(1, 0.1), max_steps=2)
    train(tmp_path / "a", data=Items(1, 0.1), max_steps=4, resume=True)
    train(tmp_path / "b", data=Items(1, 0), max_steps=2)
    train(tmp_path / "b", data=Items(1, 0), max_steps=4, resume=True)
    with pytest.raises(CheckpointError, match="other data"):
        train(tmp_path / "b", data=Items(2, 0), max_steps=6, resume=True)


def test_a_resume_on_another_footing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, max_steps=2)
    train(tmp_path, max_steps=4, resume=True)
    assert "bit for bit" not in capsys.readouterr().err
    about = json.loads((tmp_path / "versions.json").read_text())
    about["threads"], about["kernels"]["mlp"] = 7, "PYRNODE_NATIVE=0 turns them off"
    (tmp_path / "versions.json").write_text(json.dumps(about))
    history = train(tmp_path, max_steps=6, resume=True).history
    said = capsys.readouterr().err
    assert "resumed, but from here on not bit for bit as begun: kernel mlp: 'PYRNODE_NATIVE=0" in said
    assert f"threads: '7' → '{torch.get_num_threads()}'" in said
    (event,) = [record for record in history if record.get("event") == "resumed elsewhere"]
    assert event["step"] == 4
    assert len(event["changes"]) == 2
    assert read_metrics(tmp_path) == history
    assert json.loads((tmp_path / "versions.json").read_text())["threads"] == torch.get_num_threads()
    (tmp_path / "versions.json").write_text("[" * 100_000)
    train(tmp_path, max_steps=8, resume=True)
    assert "versions.json: damaged or missing" in capsys.readouterr().err


def test_damaged_run_folders_are_errors(tmp_path: Path) -> None:
    train(tmp_path)
    config, file = tmp_path / "config.toml", tmp_path / "checkpoint.safetensors"
    content = file.read_bytes()
    for damaged in (content[:-1], b"", content[:100], b"x" * 200):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors is truncated"):
            train(tmp_path, resume=True)
        assert file.read_bytes() == damaged
    file.write_bytes((tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="holds a flow, not a checkpoint"):
        train(tmp_path, resume=True)
    file.write_bytes(content)
    text = config.read_text()
    config.write_text(text.replace("[training]", "[training"))
    with pytest.raises(CheckpointError, match=r"config\.toml is damaged"):
        train(tmp_path, resume=True)
    config.unlink()
    with pytest.raises(CheckpointError, match=r"without its config\.toml"):
        train(tmp_path, resume=True)
    config.write_text(text)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], "{", *lines[1:]]))
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2 is damaged"):
        train(tmp_path, resume=True)


def test_a_checkpoint_of_another_network_is_an_error(tmp_path: Path) -> None:
    train(tmp_path / "a")
    train(tmp_path / "b", hidden=[9])
    (tmp_path / "a" / "checkpoint.safetensors").write_bytes((tmp_path / "b" / "checkpoint.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="is not a checkpoint of this run"):
        train(tmp_path / "a", resume=True)


@pytest.mark.parametrize("out", ["a file", "a file/below"])
def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path, out: str) -> None:
    (tmp_path / "a file").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot make the folder"):
        train(tmp_path / out)
    assert (tmp_path / "a file").read_text() == "mine"


@pytest.mark.parametrize("calls", [3, 6, 9, 14])
def test_a_full_disk_loses_nothing(
    tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    count, original = 0, os.fsync

    def full(file: int) -> None:
        nonlocal count
        count += 1
        if count >= calls:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            train(tmp_path, **FULL)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    train(tmp_path, resume=True, **FULL)
    assert_same_run(uninterrupted, tmp_path)


# -- kill -9 ---------------------------------------------------------------------------------------------------------

# Trains in child processes. Each is killed at its n-th event: before an optimiser step; with a file half written; with
# a file written but not yet in place; right after it is in place. The next child goes on with what it finds.
KILLED = """
import json, os, signal, sys
import torch, pyrnode
torch.set_num_threads(1)
out, settings, moments = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])

def train(moment):
    seen = 0
    def event(before=lambda *a: None):
        nonlocal seen
        seen += 1
        if seen == moment:
            before()
            os.kill(os.getpid(), signal.SIGKILL)
    fsync, replace, step = os.fsync, os.replace, torch.optim.Adam.step
    def killed_fsync(fd):
        path, size = os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_size
        cut = size // 2 if path.endswith(".part") else size - 10  # metrics are appended to
        event(lambda: os.path.isdir(path) or os.ftruncate(fd, cut))
        fsync(fd)
        event()
    def killed_replace(a, b):
        replace(a, b)
        event()
    def killed_step(*args, **kwargs):
        event()
        return step(*args, **kwargs)
    os.fsync, os.replace, torch.optim.Adam.step = killed_fsync, killed_replace, killed_step
    pyrnode.train("8gaussians", out=out, resume=True, **settings, evaluate=False, progress=False)

# Slow imports, once for all children; but no backward pass: autograd does not survive a fork.
parameter = torch.nn.Parameter(torch.zeros(1))
parameter.grad = torch.zeros(1)
torch.optim.Adam([parameter]).step()
with torch.no_grad():
    pyrnode.Flow.build(pyrnode.Config(), (2,)).log_prob(pyrnode.data.load("8gaussians").test.tensor()[:2])

ends = []
for moment in moments:
    child = os.fork()
    if not child:
        train(moment)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    ends.append(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
print(json.dumps(ends))
"""


def environment() -> dict[str, str]:
    paths = [str(Path(pyrnode.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def kill(out: Path, moments: list[int]) -> list[int]:
    command = [sys.executable, "-c", KILLED, str(out), json.dumps(FULL), json.dumps(moments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unkilled") / "run"
    assert kill(out, [0]) == [0]
    return out


@pytest.mark.parametrize(
    "moments",
    [
        [*range(1, 24), 0],  # each child comes a little further than the one before
        [40, 31, 22, 13, 9, 17, 26, 0],
        [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 0],
    ],
    ids=["rising", "falling", "around-a-checkpoint"],
)
def test_killed_runs_continue_bit_for_bit(tmp_path: Path, unkilled: Path, moments: list[int]) -> None:
    ends = kill(tmp_path, moments)
    assert ends[-1] == 0
    assert ends.count(-signal.SIGKILL) >= len(moments) // 2
    assert set(ends) == {-signal.SIGKILL, 0}
    assert_same_run(unkilled, tmp_path)


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    settings = {"samples": 200, "hidden": [8], "batch_size": 20, "max_steps": 300, "checkpoint_every": 20, "ema": 0.9}
    settings |= {"penalties.divergence": '"hutchinson"', "validate_every": 30}
    command = [sys.executable, "-m", "pyrnode", "train", "8gaussians", "--out", str(out), "--no-evaluation", *more]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 60
    while not condition() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.005)


@pytest.fixture(scope="module")
def command_line_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("command line") / "run"
    code, _, err = finish(start(out, "--quiet"))
    assert code == 0, err
    return out


def test_a_command_killed_from_outside_is_resumed_bit_for_bit(tmp_path: Path, command_line_run: Path) -> None:
    out = tmp_path / "run"
    for resume in ([], ["--resume"]):
        process = start(out, *resume, "--quiet")
        before = (out / "checkpoint.safetensors").stat().st_mtime_ns if resume else 0
        wait_for(lambda b=before: _mtime(out / "checkpoint.safetensors") > b, process)  # type: ignore[misc]
        time.sleep(0.05)
        process.kill()
        code, *_ = finish(process)
        assert code == -signal.SIGKILL
    code, _, err = finish(start(out, "--resume", "--quiet"))
    assert code == 0, err
    assert_same_run(command_line_run, out)


def _mtime(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_saves_says_how_to_go_on_and_loses_nothing(
    tmp_path: Path, command_line_run: Path, number: int, expected: int
) -> None:
    out = tmp_path / "a run"
    process = start(out, "--quiet")
    wait_for((out / "checkpoint.safetensors").exists, process)
    process.send_signal(number)
    code, stdout, err = finish(process)
    assert code == expected
    assert stdout == ""
    assert err.splitlines() == [f"interrupted; go on with: pyrnode train 8gaussians --out '{out}' --resume"]
    progress = files.read(out / "checkpoint.safetensors", "checkpoint")[1]["progress"]
    assert 20 <= progress["step"] < 300
    assert steps(read_metrics(out))[-1]["step"] == progress["step"]
    command = [sys.executable, "-m", "pyrnode", "train", "8gaussians", "--out", str(out), "--resume", "--no-evaluation"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    assert_same_run(command_line_run, out)


def test_a_run_names_what_it_does_and_says_its_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    settings = SMALL | {"max_steps": 12}
    pyrnode.train("8gaussians", **settings, evaluate=False)
    said = re.split(r"[\r\n]+", capsys.readouterr().err)
    left = [line for line in said if re.search(r"train: .* [1-3]/12 \[\d\d:\d\d<\d\d:\d\d, ", line)]
    assert left
    assert any(line.startswith("validate") for line in said)
    assert any(line.startswith("save") for line in said)


# -- SIGTERM ---------------------------------------------------------------------------------------------------------

SCRIPT = """
import json, os, signal, sys
import pyrnode
from pyrnode.training import trainer
out, settings, mode, number = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], int(sys.argv[4])
original = trainer.loss
def loss(flow, batch, config, solver, at):
    if at == 5:
        os.kill(os.getpid(), number)
    return original(flow, batch, config, solver, at)
trainer.loss = loss
if mode == "handler":
    signal.signal(number, lambda *a: print("handled", flush=True))
if mode == "exit":
    signal.signal(number, lambda *a: sys.exit(7))
if mode == "ignore":
    signal.signal(number, signal.SIG_IGN)
result = pyrnode.train("8gaussians", out=out, **settings, evaluate=False, progress=False)
print("next seed", result.interrupted, flush=True)
"""


@pytest.mark.parametrize(
    ("mode", "number", "code", "said"),
    [
        ("default", signal.SIGTERM, -signal.SIGTERM, ""),
        ("handler", signal.SIGTERM, 0, "handled\nnext seed True\n"),
        ("exit", signal.SIGTERM, 7, ""),
        ("ignore", signal.SIGTERM, 0, "next seed False\n"),
        ("handler", signal.SIGINT, 0, "handled\nnext seed True\n"),
        ("default", signal.SIGINT, 0, "next seed True\n"),
    ],
)
def test_a_signal_saves_and_goes_to_whoever_would_have_had_it(
    tmp_path: Path, mode: str, number: int, code: int, said: str
) -> None:
    """A script that is told to end does not go on with its next seed; the run that it was in is resumed."""
    settings = SMALL | {"max_steps": 8}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), json.dumps(settings), mode, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert (done.returncode, done.stdout) == (code, said), done.stderr
    progress = files.read(tmp_path / "checkpoint.safetensors", "checkpoint")[1]["progress"]
    assert progress["step"] == (8 if mode == "ignore" else 5)
    assert steps(read_metrics(tmp_path))[-1]["step"] == progress["step"]


# -- the working folder ----------------------------------------------------------------------------------------------


def test_a_run_on_a_relative_path_is_resumed_and_evaluated_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    np.save(tmp_path / "data" / "x.npy", np.random.default_rng(0).normal(size=(200, 2)))
    monkeypatch.chdir(tmp_path / "data")
    train(Path("../run"), data="x.npy", max_steps=2)
    train(Path("../run"), data="x.npy", max_steps=3, resume=True)
    train(Path("../run"), data=Path("../data/x.npy"), max_steps=4, resume=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = pyrnode.train(out="../run", max_steps=6, resume=True, evaluate=False, progress=False)
    assert result.config.data.name == str(tmp_path / "data" / "x.npy")
    assert pyrnode.cli.main(["evaluate", str(tmp_path / "run"), "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 20


def test_a_relative_folder_of_data_sets_is_stored_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sets").mkdir()
    (tmp_path / "8gaussians").mkdir()  # a data set's name means the data set
    config = train(tmp_path / "run", max_steps=1, **{"data.dir": "sets"}).config
    assert (config.data.name, config.data.dir) == ("8gaussians", str(tmp_path / "sets"))


# -- two at once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_in_one_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool) -> None:
    """While a step is computed, another asks for the folder, which looks free; the run ends as if it had been alone."""
    original, refused, metrics = loop.loss, list[str](), tmp_path / "a" / "metrics.jsonl"

    def meanwhile(flow: Any, batch: Any, config: Any, solver: Any, at: int) -> Any:
        if at == 1:
            patch.undo()
            metrics.rename(tmp_path / "kept")  # so that nothing but the lock refuses
            with pytest.raises(CheckpointError, match="in use by process") as caught:
                train(tmp_path / "a", resume=resume)
            refused.append(str(caught.value))
            (tmp_path / "kept").rename(metrics)
        return original(flow, batch, config, solver, at)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "loss", meanwhile)
        train(tmp_path / "a")
    assert refused == [
        f"{tmp_path / 'a'} is in use by process {os.getpid()}: wait for it, end it, or take another folder"
    ]
    train(tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "b")


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
