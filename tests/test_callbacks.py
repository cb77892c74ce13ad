"""Callbacks: what they are told, in which order, and that their errors cost nothing of the run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import pyrnode
from pyrnode import files
from pyrnode.errors import ConfigError
from tests.small_runs import SMALL, assert_same_run, assert_same_weights, steps, validations
from tests.small_runs import train as small_run

SETTINGS: dict[str, Any] = {**SMALL, "max_steps": 12, "checkpoint_every": 3, "preset": "toy"}


def train(out: Path | None, callbacks: Any, **settings: Any) -> pyrnode.TrainingResult:
    settings = {"evaluate": False, "progress": False, **SETTINGS, **settings}
    return pyrnode.train("8gaussians", out=out, callbacks=callbacks, **settings)


class Told(pyrnode.Callback):
    """Keeps what it is told, and spoils what it can; fails where it should."""

    def __init__(self, fail: str = "", at: int = 0, error: type[Exception] = ValueError) -> None:
        self.fail, self.at, self.error = fail, at, error
        self.calls: list[tuple[str, int]] = []
        self.records: list[dict[str, Any]] = []
        self.run: Any = None

    def _take(self, hook: str, step: int) -> None:
        self.calls.append((hook, step))
        torch.manual_seed(step)
        if hook == self.fail and step == self.at:
            raise self.error("spoilt")

    def on_start(self, run: pyrnode.TrainingRun) -> None:
        self.run = run
        self._take("on_start", run.step)

    def on_step(self, record: dict[str, Any]) -> None:
        self.records.append(dict(record))
        record["loss"] = float("nan")
        self._take("on_step", record["step"])

    def on_validation(self, record: dict[str, Any]) -> None:
        self.records.append(dict(record))
        self._take("on_validation", record["step"])

    def on_restart(self, record: dict[str, Any]) -> None:
        self.records.append(dict(record))
        self._take("on_restart", record["step"])

    def on_end(self) -> None:
        self._take("on_end", 0)


def test_a_callback_is_told_what_the_history_has_in_its_order_and_changes_nothing(tmp_path: Path) -> None:
    told, other = Told(), Told()
    result = train(tmp_path / "told", [told, other])
    train(tmp_path / "alone", ())
    expected = [("on_start", 0)]
    for step in range(1, 13):
        expected += [("on_step", step)] + [("on_validation", step)] * (step % 4 == 0)
    assert told.calls == other.calls == [*expected, ("on_end", 0)]
    assert told.records == other.records == result.history == steps_and_validations(result)
    assert told.run.out == tmp_path / "told"
    assert (told.run.step, told.run.steps, told.run.config) == (0, 12, result.config)
    assert_same_weights(told.run.flow(), result.flow)
    assert_same_run(tmp_path / "told", tmp_path / "alone")


def steps_and_validations(result: pyrnode.TrainingResult) -> list[dict[str, Any]]:
    return sorted(steps(result.history) + validations(result.history), key=lambda r: (r["step"], "loss" not in r))


@pytest.mark.parametrize(("hook", "step"), [("on_step", 5), ("on_step", 12), ("on_validation", 4), ("on_start", 0)])
@pytest.mark.parametrize("error", [ValueError, pyrnode.TrainingDivergedError])
def test_an_error_is_named_and_the_run_goes_on_bit_for_bit(
    tmp_path: Path, hook: str, step: int, error: type[Exception]
) -> None:
    told, other = Told(hook, step, error), Told()
    with pytest.raises(error, match="spoilt") as caught:
        train(tmp_path / "run", [told, other])
    where, how = caught.value.__notes__
    assert where == f"raised by the callback Told.{hook}, at step {step}"
    assert "resume=True" in how
    assert str(tmp_path / "run") in how
    assert told.calls[-2:] == [(hook, step), ("on_end", 0)]  # no other after it, but the end
    assert other.calls[-1:] == [("on_end", 0)] * (hook != "on_start")
    if hook != "on_start":
        assert files.read(tmp_path / "run" / "checkpoint.safetensors", "checkpoint")[1]["progress"]["step"] == step
    again = Told()
    train(tmp_path / "run", again, resume=True)
    assert again.calls[0] == ("on_start", step)
    train(tmp_path / "whole", ())
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_without_a_folder_an_error_says_that_nothing_is_saved() -> None:
    with pytest.raises(ValueError, match="spoilt") as caught:
        train(None, Told("on_step", 2))
    assert caught.value.__notes__[1] == "nothing is saved, since out= was not given"


def test_a_solver_error_of_a_callback_is_no_failed_step(tmp_path: Path) -> None:
    class Fails(pyrnode.Callback):
        def on_validation(self, record: dict[str, Any]) -> None:
            raise pyrnode.SolverError("mine", status="Unstable")

    with pytest.raises(pyrnode.SolverError, match="mine"):
        train(tmp_path, Fails())
    assert [r for r in files_history(tmp_path) if "event" in r] == []


def files_history(folder: Path) -> list[dict[str, Any]]:
    from pyrnode.runs import read_metrics

    return read_metrics(folder)


def test_what_fails_at_the_end_costs_no_result(capsys: pytest.CaptureFixture[str]) -> None:
    result = train(None, Told("on_end", 0))
    assert len(steps(result.history)) == 12
    assert result.notes == ["Told.on_end failed: ValueError: spoilt"]
    assert "Told.on_end failed: ValueError: spoilt" in capsys.readouterr().err


def test_stop_ends_training_as_if_it_were_done_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    class Enough(pyrnode.Callback):
        def on_start(self, run: pyrnode.TrainingRun) -> None:
            self.run = run

        def on_validation(self, record: dict[str, Any]) -> None:
            self.run.stop()

    result = train(tmp_path / "run", Enough(), evaluate=True)
    assert not result.interrupted
    assert result.report is not None
    assert [r["step"] for r in steps(result.history)] == [1, 2, 3, 4]
    train(tmp_path / "run", (), resume=True)
    train(tmp_path / "whole", ())
    assert len(steps(files_history(tmp_path / "run"))) == 12
    assert steps(files_history(tmp_path / "run"))[-1]["loss"] == steps(files_history(tmp_path / "whole"))[-1]["loss"]


def test_a_restart_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.test_training_failures import inject

    told = Told()
    inject(monkeypatch, largest=0.2, after=8)
    result = train(None, told)
    assert [call for call in told.calls if call[0] == "on_restart"] == [("on_restart", 6)]
    at = told.calls.index(("on_restart", 6))
    assert told.calls[at - 1] == ("on_validation", 8)
    assert told.calls[at + 1] == ("on_step", 7)
    assert len(steps(result.history)) == 12


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (3, r"callbacks = 3: expected a pyrnode.Callback"),
        ([print], "is no pyrnode.Callback; derive"),
        ([Told], r"is no pyrnode.Callback: pass an object, Told\(\)"),
        ([type("Mine", (pyrnode.Callback,), {"on_validation_end": print})()], "did you mean on_validation"),
        (
            [type("Mine", (pyrnode.Callback,), {"on_xyz": print})()],
            "Mine.on_xyz is never called.*there are on_start",
        ),
    ],
)
def test_what_is_no_callback_is_refused_before_training(tmp_path: Path, callbacks: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(tmp_path / "run", callbacks)
    assert not (tmp_path / "run").exists()


def test_tensorboard_can_be_pickled_before_and_after_use(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    board = pickle.loads(pickle.dumps(pyrnode.TensorBoard(tmp_path)))
    small_run(callbacks=[board])
    first = len(list(tmp_path.iterdir()))
    assert first == 1
    assert pickle.loads(pickle.dumps(board)).folder == tmp_path
