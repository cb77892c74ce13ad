"""Large files are mapped: the same samples as in memory, the same transforms and errors, and a piece at a time."""

from __future__ import annotations

import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pyrnode.config import Config, DataConfig
from pyrnode.data import MappedSamples, TensorSamples, load, mapped, support
from pyrnode.data.loading import leaves_files
from pyrnode.errors import DataError
from pyrnode.training.blueprint import Blueprint


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is large, and pieces are small."""
    monkeypatch.setattr(mapped, "LARGE", 100)
    monkeypatch.setattr(mapped, "_PIECE", 1000)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


def table(dtype: str = "float64") -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(500, 3)) @ [[1.0, 0.9, 0.0], [0.0, 0.4, 0.0], [0.0, 0.0, 50.0]]
    return (x + np.array([0, 3, 1000])).astype(dtype)


def written(path: Path, x: np.ndarray) -> Path:
    frame = pd.DataFrame(x, columns=["a", "b", "c"]) if x.ndim == 2 else None
    if path.suffix == ".npy":
        np.save(path, x)
    elif frame is not None and path.suffix == ".parquet":
        frame.to_parquet(path, row_group_size=70)
    elif frame is not None:
        frame.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".csv"])
def test_the_samples_are_those_of_the_file(tmp_path: Path, small: None, suffix: str, dtype: str) -> None:
    path = written(tmp_path / f"x{suffix}", table(dtype))
    found = load(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapped, "LARGE", 2**40)
        expected = load(path)
    assert (found.name, found.event_shape, found.levels, found.features) == (
        expected.name,
        expected.event_shape,
        expected.levels,
        expected.features,
    )
    for part in ("train", "validation", "test"):
        there, here = getattr(found, part), getattr(expected, part)
        assert isinstance(there, MappedSamples)
        assert isinstance(here, TensorSamples)
        assert torch.equal(there.tensor(), here.tensor())
        assert there.tensor().dtype == here.tensor().dtype
    assert support.remarks(found) == support.remarks(expected)


def test_images_are_mapped_too(tmp_path: Path, small: None) -> None:
    x = np.random.default_rng(0).integers(0, 256, size=(60, 4, 4), dtype=np.uint8)
    found = load(written(tmp_path / "x.npy", x))
    assert isinstance(found.train, MappedSamples)
    assert (found.event_shape, found.levels) == ((1, 4, 4), 256)
    rows = set(map(tuple, found.train.tensor().flatten(1).tolist()))
    assert len(rows) == 48
    assert rows < set(map(tuple, x.reshape(60, -1).tolist()))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("standardize", ["scale", "whiten", "auto"])
def test_the_transforms_are_those_of_the_samples_in_memory(
    tmp_path: Path, small: None, standardize: str, weighted: bool
) -> None:
    config = Config().override({"flow.standardize": standardize, "engine": "torch"})
    found = load(written(tmp_path / "x.npy", table()))
    weight = torch.rand(len(found.train), generator=torch.Generator().manual_seed(0)) + 0.1
    there = found.train.carrying(weight=weight if weighted else None)
    here = TensorSamples(there.tensor()).carrying(weight=there.weight)
    flows = []
    for train in (there, here):
        splits = type(found)("x", train, found.validation, found.test, (3,))
        flows.append(Blueprint(splits, None).fitted(config))
    (a, b) = (flow.transform.state_dict() for flow in flows)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.allclose(value, b[name], rtol=1e-9, atol=1e-9), name


def test_what_is_written_out_is_written_once(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "x.parquet", table())
    first = load(path)
    (kept,) = (tmp_path / "temporary").glob("*/*")
    before = kept.stat()
    assert kept.parent.stat().st_mode & 0o777 == 0o700
    assert torch.equal(load(path).train.tensor(), first.train.tensor())
    assert kept.stat().st_mtime_ns == before.st_mtime_ns
    assert leaves_files(path, DataConfig())
    assert leaves_files("mnist", DataConfig())
    assert not leaves_files("8gaussians", DataConfig())
    assert not leaves_files(table(), DataConfig())
    written(path, table() + 1)  # another version of the file
    assert not torch.equal(load(path).train.tensor(), first.train.tensor())


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".csv"])
@pytest.mark.parametrize("bad", ["nan", "constant"])
def test_errors_are_those_of_the_samples_in_memory(tmp_path: Path, small: None, suffix: str, bad: str) -> None:
    x = table()
    if bad == "nan":
        x[321, 1] = np.nan
    else:
        x[:, 2] = 7
    path = written(tmp_path / f"x{suffix}", x)
    told = []
    for size in (100, 2**40):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mapped, "LARGE", size)
            with pytest.raises(DataError) as caught:
                load(path)
        told.append(str(caught.value))
    assert told[0] == told[1]
    assert ("row 321, column " if bad == "nan" else "is constant (7) in all 500 samples") in told[0]


@pytest.mark.parametrize("dtype", ["int64", "float16", ">f8"])
def test_other_types_are_read_as_a_whole(tmp_path: Path, small: None, dtype: str) -> None:
    path = written(tmp_path / "x.npy", (10 * table()).astype(dtype))
    if dtype == ">f8":
        assert isinstance(load(path).train, TensorSamples)
        return
    with pytest.raises(DataError, match=r"set levels = L|convert it to float32"):
        load(path)


def test_one_piece_is_in_memory_at_a_time(tmp_path: Path, small: None) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(50_000, 20)))  # 8 MB
    load(tmp_path / "x.npy")  # what is imported on the way
    tracemalloc.start()
    found = load(tmp_path / "x.npy")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(found.train, MappedSamples)
    assert peak < 1e6  # of numpy's and Python's own


def test_rows_are_not_changed_in_the_file(tmp_path: Path, small: None) -> None:
    path = written(tmp_path / "x.npy", table())
    found = load(path)
    assert isinstance(found.train, MappedSamples)
    found.train._values[0] = 0
    assert np.array_equal(np.load(path), table())
