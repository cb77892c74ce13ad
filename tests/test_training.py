"""Training: the optimisation against hand-written loops, and what validation chooses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pyrnode
from pyrnode import seeds
from pyrnode.composition import base_log_prob
from pyrnode.config import Divergence, SolverConfig
from pyrnode.data import load
from pyrnode.errors import (
    ConfigError,
)
from pyrnode.runs import RunFolder, read_metrics
from pyrnode.training import state
from pyrnode.training.soap import SOAP
from pyrnode.training.step import learning_rate
from pyrnode.training.trainer import Trainer
from pyrnode.training.validation import Outcome, Validation
from pyrnode.transforms import Chain
from tests.small_runs import (
    SMALL,
    assert_same_weights,
    steps,
    train,
    trainer,
    validations,
)

# -- the optimisation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adam", "learning_rate": 0.01},
        {"optimizer": "adam", "learning_rate": 0.01, "weight_decay": 0.5},
        {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.5},
        {"optimizer": "soap", "learning_rate": 0.01, "weight_decay": 0.5},
        {"optimizer": "sgd", "learning_rate": 0.1, "clip_norm": 0.05},
        {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.3, "warmup_steps": 4, "schedule": "cosine"},
    ],
    ids=["adam", "adam-l2", "adamw", "soap", "sgd-clipped", "sgd-schedule"],
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
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "soap": SOAP}
    kind = kinds[settings["optimizer"]]
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
