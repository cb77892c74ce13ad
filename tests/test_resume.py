"""Resuming: bit for bit, with nothing but what the run began with, from any working folder."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pyrnode
import pyrnode.cli
from pyrnode import files
from pyrnode.config import Config
from pyrnode.data import load
from pyrnode.errors import (
    CheckpointError,
    ConfigError,
)
from pyrnode.runs import read_metrics
from pyrnode.training import TrainingResult
from pyrnode.training import trainer as loop
from pyrnode.training.validation import Validation
from tests.small_runs import (
    FULL,
    SMALL,
    assert_same_run,
    assert_same_weights,
    steps,
    train,
)

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
    """In the midst of a step, of which nothing is done yet: the state before it is saved, though none was due."""
    original, begun = loop.loss, []

    def stopping(flow: Any, batch: Any, config: Any, solver: Any, at: int) -> Any:
        begun.append(at)
        if begun == list(range(8)):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(flow, batch, config, solver, at)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "loss", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, **FULL)
        train(tmp_path, resume=True, **FULL)
    assert begun[7:10] == [7, 7, 8]
    assert_same_run(uninterrupted, tmp_path)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, uninterrupted: Path) -> None:
    train(tmp_path, **FULL)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    result = train(tmp_path, resume=True, **FULL)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert_same_weights(result.flow, pyrnode.load(uninterrupted))


@pytest.mark.parametrize("solver", [{"step_size": "auto"}, {"step_size": 1.0}], ids=["moved", "noted"])
def test_a_run_whose_solver_was_changed_or_remarked_on_is_resumed(
    solver: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its records hold texts: the solver that was taken, the remark that the training solver is wrong."""
    monkeypatch.setattr(Validation, "differ", lambda self, one, other: 1.0)
    settings = SMALL | solver | {"solver": "Euler", "tolerance": 1e-12, "learning_rate": 0.01, "max_steps": 8}
    said = "event" if solver["step_size"] == "auto" else "note"
    result = train(tmp_path, **settings)
    assert [record[said] for record in result.history if said in record]
    assert read_metrics(tmp_path) == result.history
    longer = train(tmp_path, resume=True, **settings | {"max_steps": 10})
    assert longer.history[: len(result.history)] == result.history
    assert steps(longer.history)[-1]["step"] == 10


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


IMPOSSIBLE: dict[str, tuple[str, float]] = {
    "NaN in a basis": ("left_basis", math.nan),
    "a basis of zeros": ("right_basis", 0.0),
    "a basis of one direction": ("left_basis", 0.5),
    "no step": ("step", 0.0),
    "a step and a half": ("step", 1.5),
    "steps that the run has not done": ("step", 11.0),
    "steps that are none": ("step", math.nan),
    "negative squares": ("exp_avg_sq", -1.0),
    "an infinite mean": ("exp_avg", math.inf),
}


@pytest.fixture(scope="module")
def by_soap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "soap"
    train(folder, optimizer="soap")
    return folder


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_a_memory_that_no_optimiser_has_is_an_error(tmp_path: Path, by_soap: Path, what: str) -> None:
    """Not a run that goes another way, or fails later for what would pass for the solver's reasons."""
    shutil.copytree(by_soap, tmp_path / "run")
    file, (name, value) = tmp_path / "run" / "checkpoint.safetensors", IMPOSSIBLE[what]
    tensors, description = files.read(file, "checkpoint")
    tensors[f"optimizer.0.{name}"].fill_(value)
    files.write(file, "checkpoint", tensors, description)
    content = file.read_bytes()
    with pytest.raises(CheckpointError, match=rf"is not a checkpoint of this run: .*optimizer\.0\.{name} is n"):
        train(tmp_path / "run", resume=True, optimizer="soap", max_steps=12)
    assert file.read_bytes() == content


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
