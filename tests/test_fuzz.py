"""Whatever a file says, the answer is a value or an error of ours: a short form of what was tried at length.

The examples are the same in every run. Files are signed again after they have been changed: the digest keeps out
damage, not intent.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyrnode
from pyrnode import files
from pyrnode.anomalies import Calibration, fingerprint
from pyrnode.cli.train import settings as command_line_settings
from pyrnode.config import Config
from pyrnode.errors import PyrnodeError
from pyrnode.flow import Flow
from pyrnode.runs import RunFolder, read_metrics

SHORT = settings(
    max_examples=25,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

NUMBERS = st.one_of(
    st.integers(-3, 3), st.sampled_from([2**31, 2**63, -(2**70), 10**400]), st.floats(), st.booleans(), st.none()
)
JSON = st.recursive(
    st.one_of(NUMBERS, st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)

RUN = {"samples": 100, "hidden": [4], "max_steps": 2, "batch_size": 20, "snapshots": True}


def ours(call: Callable[[], Any]) -> None:
    """Calls, and lets errors of ours pass, no others."""
    said = ""
    try:
        call()
    except PyrnodeError as error:
        said = str(error)
    assert len(said) < 5000


def changed(value: Any, path: list[int], new: Any) -> Any:
    """A copy of a JSON value with something else at a place in it."""
    if not path or not isinstance(value, (dict, list)) or not value:
        return new
    value = copy.copy(value)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[path[0] % len(keys)]
    value[key] = changed(value[key], path[1:], new)
    return value


PLACES = st.lists(st.integers(0, 20), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fuzz") / "run"
    pyrnode.train("8gaussians", out=out, **RUN, evaluate=False, progress=False)
    return out


def resume(out: Path) -> None:
    pyrnode.train(out=out, resume=True, evaluate=False, progress=False)


@SHORT
@given(place=PLACES, new=JSON)
def test_descriptions_of_flows(run: Path, tmp_path: Path, place: list[int], new: Any) -> None:
    tensors, description = files.read(run / "model.safetensors", "flow")
    files.write(tmp_path / "m", "flow", tensors, changed(description, place, new))
    ours(lambda: pyrnode.load(tmp_path / "m"))


@SHORT
@given(place=PLACES, new=JSON)
def test_descriptions_of_checkpoints(run: Path, place: list[int], new: Any) -> None:
    path = run / "checkpoint.safetensors"
    kept, (tensors, description) = path.read_bytes(), files.read(path, "checkpoint")
    try:
        files.write(path, "checkpoint", tensors, changed(description, place, new))
        ours(lambda: resume(run))
    finally:
        path.write_bytes(kept)


@SHORT
@given(
    index=st.integers(0, 100),
    change=st.sampled_from(["gone", "renamed", "long", "flat", "int64", "float16", "complex64", "nan"]),
)
def test_tensors_of_checkpoints(run: Path, index: int, change: str) -> None:
    path = run / "checkpoint.safetensors"
    kept, (tensors, description) = path.read_bytes(), files.read(path, "checkpoint")
    name = sorted(tensors)[index % len(tensors)]
    value = tensors.pop(name)
    if change != "gone":
        new = {"long": torch.cat([value.reshape(-1)] * 2), "flat": value.reshape(-1, 1), "nan": value * torch.nan}
        cast = getattr(torch, change, None)
        tensors["x" + name if change == "renamed" else name] = value.to(cast) if cast else new.get(change, value)
    try:
        files.write(path, "checkpoint", tensors, description)
        ours(lambda: resume(run))
    finally:
        path.write_bytes(kept)


@SHORT
@given(scores=st.lists(st.floats(), max_size=4), kind=st.sampled_from(["float64", "float32", "complex64", "uint8"]))
def test_calibrations(tmp_path: Path, scores: list[float], kind: str) -> None:
    flow = Flow.build(Config().override({"hidden": [4]}), (2,))
    finite = [value if abs(value) < 200 else 1.0 for value in scores]
    tensor = torch.tensor([abs(value) for value in finite] if kind == "uint8" else scores).to(getattr(torch, kind))
    files.write(tmp_path / "c", "calibration", {"scores": tensor}, {"model": fingerprint(flow)})
    ours(lambda: Calibration.load(tmp_path / "c", flow))


@SHORT
@given(position=st.floats(0, 0.999), byte=st.integers(0, 255), length=st.integers(0, 40))
def test_damaged_bytes_are_never_unnoticed(run: Path, tmp_path: Path, position: float, byte: int, length: int) -> None:
    content = bytearray((run / "model.safetensors").read_bytes())
    at = int(position * len(content))
    content[at : at + 1] = bytes([byte]) * length
    (tmp_path / "m").write_bytes(content)
    if content != (run / "model.safetensors").read_bytes():
        with pytest.raises(PyrnodeError):
            pyrnode.load(tmp_path / "m")


@SHORT
@given(place=PLACES, new=JSON)
def test_configurations(place: list[int], new: Any) -> None:
    table = changed(Config().to_dict(), place, new)
    ours(lambda: Config.from_dict(table))
    try:
        text = tomli_w.dumps(table)
    except (TypeError, AttributeError, ValueError):  # what TOML has no words for
        return
    ours(lambda: Config.from_toml(text))


@SHORT
@given(text=st.one_of(st.text(max_size=30), st.sampled_from(["[" * 9000, "9" * 9000, "0x" + "f" * 9000, "1e999"])))
def test_settings_as_text(text: str) -> None:
    ours(lambda: Config.from_toml(text))
    ours(lambda: Config.from_toml(f"seed = {text}"))
    ours(lambda: Config().override(command_line_settings([f"rtol={text}", f"seed={text}"])))
    ours(lambda: Config.preset(f"{text}.toml"))


BESIDE = ["metrics.jsonl", "config.toml", "versions.json"]


@SHORT
@given(
    name=st.sampled_from(BESIDE),
    text=st.one_of(
        st.binary(max_size=30),
        st.just(b"[" * 9000),
        st.builds(lambda value: (json.dumps(value) + "\n").encode() * 2, JSON),
        st.builds(lambda value: (json.dumps({"step": value, "loss": value}) + "\n").encode() * 2, JSON),
    ),
)
def test_what_lies_beside_a_checkpoint(run: Path, name: str, text: bytes) -> None:
    kept = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    try:
        (run / name).write_bytes(text)
        ours(lambda: read_metrics(run))
        ours(lambda: RunFolder(run).stored_config())
        ours(lambda: resume(run))
    finally:
        for path, content in kept.items():
            path.write_bytes(content)


@pytest.mark.parametrize("name", ["12a.safetensors", "1².safetensors", "3.safetensors", "00000009.safetensors/x"])
def test_stray_files_among_the_snapshots(run: Path, name: str) -> None:
    stray = run / "snapshots" / name
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"mine")
    before = sorted(path.name for path in (run / "snapshots").iterdir())
    resume(run)
    assert list(RunFolder(run).snapshots()) == [2]
    assert sorted(path.name for path in (run / "snapshots").iterdir()) == before
