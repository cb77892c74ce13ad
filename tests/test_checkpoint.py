"""Files: whole or not at all, checked when read, and errors that say what is wrong."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import pyrnode
from pyrnode import checkpoint, engines
from pyrnode.config import Config
from pyrnode.dynamics import ModuleDynamics
from pyrnode.errors import CheckpointError, ConfigError, EngineUnavailableError
from pyrnode.flow import Flow


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {
        "weight": torch.arange(600, dtype=torch.float64).reshape(20, 30) / 7,
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 2),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "not contiguous": torch.arange(6.0).reshape(2, 3).T,
    }


DESCRIPTION: dict[str, Any] = {"shape": (1, 2), "best": math.inf, "third": 1 / 3, "text": "é", "none": None}


@pytest.fixture
def written(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    path = tmp_path / "good.safetensors"
    checkpoint.write(path, "flow", tensors, DESCRIPTION)
    return path


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_what_is_written_is_read_back(written: Path, tensors: dict[str, Tensor]) -> None:
    found, description = checkpoint.read(written, "flow")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    assert description == {**DESCRIPTION, "shape": [1, 2]}
    assert leftovers(written.parent) == []


def test_any_safetensors_reader_reads_it(written: Path, tensors: dict[str, Tensor]) -> None:
    assert torch.equal(safetensors.torch.load_file(written)["weight"], tensors["weight"])


@pytest.mark.parametrize("tenth", range(10))
def test_a_truncated_file_is_an_error(written: Path, tenth: int) -> None:
    content = written.read_bytes()
    written.write_bytes(content[: len(content) * tenth // 10])
    with pytest.raises(CheckpointError, match=r"good\.safetensors is truncated"):
        checkpoint.read(written, "flow")


def test_a_file_that_lacks_its_last_byte_is_an_error(written: Path) -> None:
    written.write_bytes(written.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        checkpoint.read(written, "flow")


def test_a_flipped_bit_anywhere_is_an_error(written: Path) -> None:
    content = written.read_bytes()
    for position in range(0, len(content), 97):
        damaged = bytearray(content)
        damaged[position] ^= 4
        written.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"good\.safetensors"):
            checkpoint.read(written, "flow")


def test_a_flipped_bit_in_tensor_data_is_named_as_damage(written: Path) -> None:
    damaged = bytearray(written.read_bytes())
    damaged[-100] ^= 1
    written.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="is damaged: its content does not match its digest"):
        checkpoint.read(written, "flow")


def test_foreign_files_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="not one that pyrnode wrote"):
        checkpoint.read(path, "flow")
    safetensors.torch.save_file({"a": torch.ones(2)}, path, metadata={"pyrnode": "[]"})
    with pytest.raises(CheckpointError, match="not one that pyrnode wrote"):
        checkpoint.read(path, "flow")
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="truncated, or not a safetensors file"):
        checkpoint.read(path, "flow")
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="truncated, or not a safetensors file"):
        checkpoint.read(path, "flow")
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.read(tmp_path / "none.safetensors", "flow")
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.read(tmp_path, "flow")


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    path = tmp_path / "trap.safetensors"
    torch.save(Trap(), path)
    with pytest.raises(CheckpointError):
        checkpoint.read(path, "flow")
    assert not (tmp_path / "sprung").exists()


def test_wrong_kind_and_newer_format_are_errors(
    written: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="holds a flow, not a checkpoint"):
        checkpoint.read(written, "checkpoint")
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    checkpoint.write(written, "flow", tensors, DESCRIPTION)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"has format 2; this version of pyrnode reads format 1"):
        checkpoint.read(written, "flow")


# -- what goes wrong when writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(
    written: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    before = written.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, full)
    with pytest.raises(CheckpointError, match="No space left on device; what was there before is untouched"):
        checkpoint.write(written, "flow", {"weight": tensors["weight"] + 1}, {})
    assert written.read_bytes() == before
    assert leftovers(written.parent) == []


def test_an_interrupt_while_writing_leaves_the_old_file(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written.read_bytes()

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_atomically(written, b"new")
    assert written.read_bytes() == before
    assert leftovers(written.parent) == []


def test_what_a_kill_left_behind_is_replaced_by_the_next_write(written: Path) -> None:
    (written.parent / f".{written.name}.part").write_bytes(b"half a checkpoint, longer than the new one")
    checkpoint.write_atomically(written, b"new")
    assert written.read_bytes() == b"new"
    assert leftovers(written.parent) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to every folder")
def test_a_folder_without_write_permission_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        checkpoint.write_atomically(folder / "file", b"x")


def test_places_that_cannot_be_written_to_are_errors(written: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Not a directory"):
        checkpoint.write_atomically(written / "below a file", b"x")
    with pytest.raises(CheckpointError, match="No such file or directory"):
        checkpoint.write_atomically(tmp_path / "no folder" / "file", b"x")
    (tmp_path / "a folder").mkdir()
    with pytest.raises(CheckpointError, match="Is a directory"):
        checkpoint.write_atomically(tmp_path / "a folder", b"x")
    assert leftovers(tmp_path) == []


# -- flows -----------------------------------------------------------------------------------------------------------


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
    sample = None if levels else torch.randn(50, *shape) * 3 + 1
    flow = Flow.build(Config().override(settings), shape, levels=levels, sample=sample)
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.2)
    flow.save(tmp_path / "flow.safetensors")
    loaded = pyrnode.load(tmp_path / "flow.safetensors")
    x = torch.randn(4, *shape) if levels is None else torch.randint(0, levels, (4, *shape), dtype=torch.uint8)
    assert loaded.config == flow.config
    assert (loaded.event_shape, loaded.levels) == (shape, levels)
    for name, value in flow.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert torch.equal(loaded.log_prob(x, seed=3), flow.log_prob(x, seed=3))
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
    good = {"config": flow.config.to_dict(), "event_shape": [2], "levels": None, "context_dim": 0}
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "does not describe a flow"),
        ({**good, "event_shape": [3]}, "size mismatch"),
        ({**good, "event_shape": None}, "does not describe a flow"),
        ({**good, "config": {"sead": 1}}, "unknown key in Config 'sead'"),
    ]
    for description, expected in cases:
        checkpoint.write(path, "flow", flow.state_dict(), description)
        with pytest.raises(CheckpointError, match=expected):
            pyrnode.load(path)
    checkpoint.write(path, "flow", {}, good)
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


def test_the_header_is_readable_json(written: Path) -> None:
    with safetensors.safe_open(written, framework="pt") as file:
        header = json.loads(file.metadata()["pyrnode"])
    assert (header["format"], header["kind"]) == (1, "flow")
    assert len(header["sha256"]) == 64
