"""Exported files of anyone's making: every one is read, or refused in our words, at the cost of what is in it."""

from __future__ import annotations

import copy
import random
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyrnode import export, files
from pyrnode.errors import CheckpointError, PyrnodeError
from pyrnode.export import containers, exported, to_torch
from tests.test_export import small
from tests.test_flow import FLOWS

Parts = tuple[dict[str, Tensor], dict[str, Any]]

ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    7,
    26000,
    10**9,
    10**30,
    0.5,
    1e308,
    float("nan"),
    "",
    "x",
    [],
    {},
    [1] * 4,
    [[1]],
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Parts]:
    path = tmp_path_factory.mktemp("parts") / "flow.safetensors"
    result = []
    for flow in (small(), FLOWS["images, two scales"]().float()):
        export.save(to_torch(flow, {"step_size": 1.0}, divergence="hutchinson"), path, to="safetensors")
        result.append(files.read(path, "torch module"))
    return result


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document but the reading aid."""
    if at:
        yield at
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        if key != "reading":
            yield from places(entry, (*at, key))


def changed(description: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A description with one or two values changed or gone."""
    result = copy.deepcopy(description)
    for _ in range(rng.randint(1, 2)):
        *way, last = rng.choice(list(places(result)))
        holder = result
        for key in way:
            holder = holder[key]
        if rng.random() < 0.2:
            del holder[last]
        else:
            holder[last] = copy.deepcopy(rng.choice(ODD))
    return result


def test_descriptions_that_are_signed_again(parts: list[Parts], tmp_path: Path) -> None:
    path, rng, refused, longest = tmp_path / "flow.safetensors", random.Random(0), 0, 0
    for _ in range(300):
        tensors, description = rng.choice(parts)
        files.write(path, "torch module", tensors, changed(description, rng))
        try:
            export.load(path)
            export.verify(path)
        except PyrnodeError as error:
            refused, longest = refused + 1, max(longest, len(str(error)))
    assert refused > 100
    assert longest < 2000


def test_tensors_that_are_signed_again(parts: list[Parts], tmp_path: Path) -> None:
    path, rng = tmp_path / "flow.safetensors", random.Random(1)
    for _ in range(60):
        tensors, description = rng.choice(parts)
        name = rng.choice(list(tensors))
        kinds: list[Tensor | None] = [None, torch.zeros(0), torch.zeros(3), tensors[name].double(), tensors[name].int()]
        other = rng.choice(kinds)
        if other is not None and (other.dtype, other.shape) == (tensors[name].dtype, tensors[name].shape):
            continue  # it was in double precision already
        given = {k: v for k, v in tensors.items() if k != name} | ({} if other is None else {name: other})
        files.write(path, "torch module", given, description)
        try:
            export.verify(path)
        except PyrnodeError:
            continue
        assert name.startswith("example."), name  # whose type may be another


def test_a_description_costs_no_more_than_the_file(parts: list[Parts], tmp_path: Path) -> None:
    tensors, description = copy.deepcopy(parts[0])
    path = tmp_path / "flow.safetensors"
    (block,) = description["parts"]
    wide = {**block["layers"][1], "inputs": 26000, "outputs": 26000}
    claims = [
        {
            "parts": [
                {
                    **block,
                    "layers": [
                        {**block["layers"][0], "outputs": 26000},
                        wide,
                        {**block["layers"][-1], "inputs": 26000},
                    ],
                }
            ]
        },
        {"divergence": {**description["divergence"], "probes": 10**9}},
        {"event_shape": [10**9]},
        {"context_dim": 10**9},
    ]
    for claim in claims:
        files.write(path, "torch module", tensors, description | claim)
        before = _peak()
        with pytest.raises(CheckpointError, match="does not describe a flow of this version"):
            export.load(path)
        assert _peak() - before < 64


def _peak() -> float:
    """Largest resident set so far, MiB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    pytest.skip("peak memory is measured on Linux only")


def archive(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return path


def test_archives_that_claim_more_than_they_hold(tmp_path: Path) -> None:
    bomb = archive(tmp_path / "a.pt2", {"archive/extra/pyrnode.json": bytes(2**28)}, zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    for trust in (False, True):
        with pytest.raises(CheckpointError, match="claims to hold more than it does"):
            export.verify(bomb, trust=trust)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    content = bytearray(archive(tmp_path / "b.pt2", {"archive/a": b"a" * 100}).read_bytes())
    at = content.rfind(b"PK\x01\x02") + 20
    content[at : at + 8] = b"\xff\xff\xff\x7f" * 2  # the sizes of the directory
    (tmp_path / "b.pt2").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"claims to hold more|truncated"):
        export.verify(tmp_path / "b.pt2")


TABLE = {
    "format": exported.FORMAT,
    "program": "encode",
    "versions": {"torch": "2"},
    "dtype": "float32",
    "input_dtypes": {"x": "float32"},
    "inputs": {"x": [[0.0, 0.0]]},
    "outputs": {"z": [[0.0, 0.0]], "log_det": [0.0], "log_prob": [0.0]},
    "tolerance": 1e-4,
}


def test_tables_that_are_signed_again(tmp_path: Path) -> None:
    """Of programs, which are not run."""
    plain = archive(tmp_path / "plain.pt2", {"archive/models/model.json": b"{}"}).read_bytes()
    path, rng, refused = tmp_path / "flow.pt2", random.Random(2), 0
    for i in range(300):
        table = changed(TABLE, rng) if i else dict(TABLE)
        seal, path = rng.choice(
            [(containers.seal_archive, tmp_path / "a.pt2"), (containers.seal_model, tmp_path / "a.onnx")]
        )
        path.write_bytes(seal(plain if path.suffix == ".pt2" else b"", table))
        try:
            assert not export.verify(path).executed
        except CheckpointError:
            assert i
            refused += 1
    assert refused > 100


def test_random_bytes(tmp_path: Path) -> None:
    rng = random.Random(3)
    whole = containers.seal_archive(archive(tmp_path / "p", {"archive/models/model.json": b"{}"}).read_bytes(), TABLE)
    model = containers.seal_model(b"", TABLE)
    deep = containers.seal_archive(archive(tmp_path / "q", {"archive/a.json": b"[" * 10**5}).read_bytes(), TABLE)
    (tmp_path / "deep.pt2").write_bytes(deep)
    with pytest.raises(CheckpointError, match="no JSON"):
        export.verify(tmp_path / "deep.pt2")
    for _ in range(400):
        content = bytearray(rng.choice([whole, model, rng.randbytes(rng.randint(0, 200))]))
        for _ in range(rng.randint(1, 4)):
            if content:
                content[rng.randrange(len(content))] = rng.randrange(256)
        path = tmp_path / "file"
        path.write_bytes(content)
        try:
            export.verify(path)
        except PyrnodeError:
            continue
