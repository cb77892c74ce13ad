"""What `train` may be handed: data, settings, and dynamics of the user's own."""

from __future__ import annotations

import json
import math
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import pyrnode
from pyrnode.architecture import FlowConfig
from pyrnode.config import Config
from pyrnode.data import load
from pyrnode.errors import (
    ConfigError,
    DataError,
    EngineUnavailableError,
)
from pyrnode.training import TrainingResult
from tests.small_runs import (
    FULL,
    SMALL,
    assert_same_weights,
    train,
    validations,
)


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
    wide = [train(data=torch.randn(50, d), max_steps=1).config.training.learning_rate for d in (47, 48)]
    assert wide == [Config.preset(name).training.learning_rate for name in ("table", "wide-table")] == [0.01, 0.005]
    images = torch.zeros(50, 1, 4, 4, dtype=torch.uint8)
    images[::2] = 200
    assert train(data=images, max_steps=1).config.flow == Config.preset("images").override({"hidden": [8]}).flow
    flat = train(data=images, max_steps=1, flatten=True).config.flow
    assert flat == Config.preset("table").override({"hidden": [8], "flatten": True}).flow


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
        ({"lr": 1.0}, ConfigError, "unknown setting 'lr' .here it is 'learning_rate'.; .*presets table"),
        ({"divergence": "exact"}, ConfigError, "ambiguous: .*; give one in full: .*--set penalties.divergence=… on"),
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
        ({"device": "gpu"}, ConfigError, "device = 'gpu' cannot be used: expected 'auto', 'cpu', 'cuda'"),
        ({"data": "8gausians"}, DataError, "did you mean '8gaussians'"),
        ({"data": None}, DataError, "no data"),
        ({"data": "no/such/file.npy"}, DataError, "does not exist"),
        ({"data": torch.randn(5, 2)}, DataError, "5 samples"),
        ({"data": torch.full((50, 2), math.nan)}, DataError, "NaN"),
        ({"data": torch.ones(50, 2)}, DataError, "constant"),
        ({"data": torch.ones(1, 2)}, DataError, "has 1 sample; expected at least 10"),
        ({"data": [[1.0, 2.0]] * 20}, DataError, "cannot load a list: .*numpy.array"),
        ({"data": pd.Series([1.0, 2.0])}, DataError, "cannot load a Series: .*to_frame"),
        ({"data": pd.DataFrame({"a": ["0.1"] * 20})}, DataError, "holds numbers as text .'0.1'.: .*pandas.to_numeric"),
        ({"data": pd.DataFrame({"a": pd.date_range("2020", periods=20)})}, DataError, "column 'a' holds times"),
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
