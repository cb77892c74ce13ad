"""Flows as files: the same numbers after loading, and errors that say what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyrnode
from pyrnode import engines, files
from pyrnode.config import Config
from pyrnode.dynamics import ModuleDynamics
from pyrnode.errors import CheckpointError, ConfigError, EngineUnavailableError
from pyrnode.flow import Flow
from pyrnode.transforms import Chain, Standardize


@pytest.mark.parametrize(
    ("shape", "levels", "settings"),
    [
        ((3,), None, {"hidden": [5], "activation": "tanh", "network.time": "concatsquash", "dtype": "float64"}),
        ((1, 8, 8), 17, {"hidden": [4], "blocks": 1, "alpha": 0.01}),
    ],
    ids=["vectors", "images"],
)
def test_a_saved_flow_gives_the_same_numbers(
    tmp_path: Path, shape: tuple[int, ...], levels: int | None, settings: dict[str, Any]
) -> None:
    transform = None if levels else Chain([Standardize.fit((torch.randn(50, *shape) * 3 + 1).double())])
    flow = Flow.build(Config().override(settings), shape, levels=levels, transform=transform)
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.2)
    flow.save(tmp_path / "flow.safetensors")
    loaded = pyrnode.load(tmp_path / "flow.safetensors")
    x = torch.randn(4, *shape) if levels is None else torch.randint(0, levels, (4, *shape), dtype=torch.uint8)
    assert loaded.config == flow.config
    assert (loaded.event_shape, loaded.levels) == (shape, levels)
    for name, value in flow.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert torch.equal(loaded.log_prob(x, divergence={"seed": 3}), flow.log_prob(x, divergence={"seed": 3}))
    assert torch.equal(loaded.sample(2, seed=4), flow.sample(2, seed=4))
    assert not loaded.training


def test_dynamics_of_the_users_own_cannot_be_saved(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return self.linear(z)  # type: ignore[no-any-return]

    flow = Flow.build(Config(), (2,), dynamics=lambda shape: ModuleDynamics(Own(), shape))
    with pytest.raises(ConfigError, match="dynamics of your own"):
        flow.save(tmp_path / "flow.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_flow_that_does_not_fit_its_description_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "flow.safetensors"
    flow = Flow.build(Config().override({"hidden": [5]}), (2,))
    good = {"config": flow.config.to_dict(), "event_shape": [2], "levels": None, "context_dim": 0, "data_dtype": None}
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "does not describe a flow"),
        ({**good, "event_shape": [3]}, "size mismatch"),
        ({**good, "event_shape": None}, "does not describe a flow"),
        ({**good, "config": {"sead": 1}}, "unknown key in Config 'sead'"),
    ]
    for description, expected in cases:
        files.write(path, "flow", flow.state_dict(), description)
        with pytest.raises(CheckpointError, match=expected):
            pyrnode.load(path)
    files.write(path, "flow", {}, good)
    with pytest.raises(CheckpointError, match="Missing key"):
        pyrnode.load(path)


def test_loading_with_an_unusable_engine_or_device_is_an_error_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "flow.safetensors"
    Flow.build(Config().override({"hidden": [5]}), (2,)).save(path)
    with pytest.raises(ConfigError, match="unknown engine 'jax'"):
        pyrnode.load(path, engine="jax")

    def missing(name: str, device: str) -> None:
        raise EngineUnavailableError(f"no {name}")

    with monkeypatch.context() as patch:
        patch.setattr(engines, "create", missing)
        with pytest.raises(EngineUnavailableError, match="no julia"):
            pyrnode.load(path, engine="julia")
    with pytest.raises(ConfigError, match="device = 'tpu9'"):
        pyrnode.load(path, device="tpu9")


# -- what a file may claim -------------------------------------------------------------------------------------------


def described(**changes: Any) -> dict[str, Any]:
    """The description of a flow in two dimensions, with settings of the flow or other entries changed."""
    config = Config().override({"hidden": [5]})
    flow = {key: value for key, value in changes.items() if key in ("blocks", "hidden", "scales", "end_time", "time")}
    table = config.to_dict()
    network = table["flow"]["network"]
    for key, value in flow.items():
        (network if key in network else table["flow"])[key] = value
    good = {"config": table, "event_shape": [2], "levels": None, "context_dim": 0, "data_dtype": None}
    return good | {key: value for key, value in changes.items() if key not in flow}


CLAIMS: list[dict[str, Any]] = [
    {"hidden": [26000, 26000]},
    {"hidden": [2**40, 2**40]},
    {"hidden": [8] * 100_000},
    {"blocks": 10**6},
    {"blocks": 10**18},
    {"blocks": 10**100},
    {"event_shape": [2**31 - 1]},
    {"event_shape": [2**62]},
    {"event_shape": [1, 2**20, 2**20]},
    {"context_dim": 2**31 - 1},
]


@pytest.mark.parametrize("claim", CLAIMS, ids=[str(claim)[:40] for claim in CLAIMS])
def test_a_small_file_costs_no_more_than_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, claim: dict[str, Any]
) -> None:
    """What the settings claim is compared with what there is before any of it is made."""
    path, flow = tmp_path / "flow.safetensors", Flow.build(Config().override({"hidden": [5]}), (2,))
    files.write(path, "flow", flow.state_dict(), described(**claim))
    assert path.stat().st_size < 2_000_000
    sizes, register = [0], nn.Module.register_parameter

    def counted(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        sizes[0] += 0 if parameter is None or parameter.is_meta else parameter.numel()
        assert len(sizes) < 1000
        sizes.append(0)
        register(self, name, parameter)

    monkeypatch.setattr(nn.Module, "register_parameter", counted)
    with pytest.raises(CheckpointError, match="does not describe a flow"):
        pyrnode.load(path)
    assert sizes[0] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"config": 5},
        {"config": "abc"},
        {"config": []},
        {"event_shape": [True]},
        {"event_shape": "2"},
        {"event_shape": [2.0]},
        {"event_shape": []},
        {"event_shape": [0]},
        {"event_shape": {"a": 1}},
        {"levels": 1.5},
        {"levels": "many"},
        {"levels": 10**30},
        {"context_dim": None},
        {"context_dim": -1},
        {"end_time": "x"},
        {"end_time": 10**400},
        {"end_time": float("nan")},
        {"blocks": 1.5},
        {"hidden": [[5]]},
        {"hidden": "5"},
        {"time": ["concat"]},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_descriptions_of_the_right_digest_and_wrong_contents_are_errors(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    path, flow = tmp_path / "flow.safetensors", Flow.build(Config().override({"hidden": [5]}), (2,))
    files.write(path, "flow", flow.state_dict(), described(**changes))
    with pytest.raises(CheckpointError, match="does not describe a flow"):
        pyrnode.load(path)


def test_tensors_of_another_kind_are_errors(tmp_path: Path) -> None:
    path, flow = tmp_path / "flow.safetensors", Flow.build(Config().override({"hidden": [5]}), (2,))
    name = "parts.0.dynamics.layers.0.weight"
    for value in (flow.state_dict()[name].long(), flow.state_dict()[name].to(torch.complex64)):
        files.write(path, "flow", {**flow.state_dict(), name: value}, described())
        with pytest.raises(CheckpointError, match=r"layers\.0\.weight' is torch\.(int64|complex64) instead of"):
            pyrnode.load(path)


@pytest.mark.parametrize("name", ["nul\0", "x" * 300, "x/" * 3000])
def test_names_that_no_file_can_have_are_errors(name: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        pyrnode.load(name)
