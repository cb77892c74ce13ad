"""Scores by shards are those of one process, bit for bit; shards that are missing, damaged or others are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pyrnode.anomalies import Calibration, score_file
from pyrnode.cli import main
from pyrnode.data.readers import Part, open_file
from pyrnode.errors import CheckpointError, ConfigError, DataError
from pyrnode.flow import Flow
from pyrnode.shards import merge_shards, score_shard, shard_path
from tests.test_anomalies import build, expected_scores, normal, write

CALIBRATION = Calibration(np.random.default_rng(1).normal(-3, 1, size=50))


@pytest.fixture(scope="module")
def flow() -> Flow:
    """One whose trace is estimated: noise must belong to the sample."""
    flow = build()
    flow.divergence = flow.divergence.changed({"kind": "hutchinson"})
    return flow


def shards(flow: Flow, data: Path, out: Path, count: int, **more: Any) -> list[Path]:
    return [score_shard(flow, data, out, number, count, chunk=7, **more) for number in reversed(range(count))]


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".parquet"])
@pytest.mark.parametrize("count", [1, 3, 20])  # of 15 chunks, the last of two rows
def test_merged_shards_are_the_scores_of_one(flow: Flow, tmp_path: Path, suffix: str, count: int) -> None:
    x = normal(100)
    x[40] = 1e200  # beyond the flow's numbers: log_prob -inf
    data = write(tmp_path / f"x{suffix}", x)
    whole = score_file(flow, data, tmp_path / "whole.csv", calibration=CALIBRATION, chunk=7)
    shards(flow, data, tmp_path / "merged.csv", count)
    merged = merge_shards(flow, data, tmp_path / "merged.csv", calibration=CALIBRATION)
    assert (tmp_path / "merged.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert merged == whole
    assert merged.impossible == 1


def test_scores_are_those_of_the_flow_in_the_order_of_the_rows(tmp_path: Path) -> None:
    flow, x = build(), normal(50)
    data, out = write(tmp_path / "x.npy", x), tmp_path / "scores.parquet"
    shards(flow, data, out, 4)
    merge_shards(flow, data, out)
    frame = pd.read_parquet(out)
    assert frame["row"].tolist() == list(range(50))
    assert frame["log_prob"].to_numpy() == pytest.approx(expected_scores(flow, x), abs=1e-8)


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".parquet"])
def test_parts_of_a_file_are_its_chunks(tmp_path: Path, suffix: str) -> None:
    reader = open_file(write(tmp_path / f"x{suffix}", normal(100)))
    whole = list(reader.chunks(7))
    for number in range(4):
        part = list(reader.chunks(7, Part(number, 4)))
        assert [first for first, _ in part] == [first for first, _ in whole][number::4]
        for (_, a), (_, b) in zip(part, whole[number::4], strict=True):
            assert np.array_equal(a, b)


# -- what is missing, damaged, or of something else ------------------------------------------------------------------


@pytest.fixture
def scored(flow: Flow, tmp_path: Path) -> tuple[Path, Path]:
    data, out = write(tmp_path / "x.npy", normal(60)), tmp_path / "scores.csv"
    shards(flow, data, out, 4)
    return data, out


def test_missing_shards_are_named_and_done_again_alone(flow: Flow, scored: tuple[Path, Path]) -> None:
    data, out = scored
    for number in (1, 3):
        shard_path(out, number, 4).unlink()
    with pytest.raises(CheckpointError, match=r"missing: 1/4, 3/4; do them again with --shard 1/4"):
        merge_shards(flow, data, out)
    assert not out.exists()
    score_shard(flow, data, out, 1, 4, chunk=7)
    score_shard(flow, data, out, 3, 4, chunk=7)
    assert merge_shards(flow, data, out).samples == 60


def test_a_damaged_shard_is_named(flow: Flow, scored: tuple[Path, Path]) -> None:
    data, out = scored
    path = shard_path(out, 2, 4)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"shard-2-of-4.* is damaged.*do it again with --shard 2/4"):
        merge_shards(flow, data, out)


def test_shards_of_something_else_are_refused(flow: Flow, scored: tuple[Path, Path], tmp_path: Path) -> None:
    data, out = scored
    score_shard(build(seed=1), data, out, 3, 4, chunk=7)
    with pytest.raises(CheckpointError, match=r"shard-3-of-4.* is of another model: do it again with --shard 3/4"):
        merge_shards(flow, data, out)
    score_shard(flow, write(tmp_path / "y.npy", normal(60)), out, 3, 4, chunk=7)
    with pytest.raises(CheckpointError, match=r"shard-3-of-4.* is of another file"):
        merge_shards(flow, data, out)
    score_shard(flow, data, out, 3, 4, chunk=8)
    with pytest.raises(CheckpointError, match="chunks of different sizes"):
        merge_shards(flow, data, out)
    score_shard(flow, data, out, 3, 4, chunk=7)
    shard_path(out, 3, 4).replace(shard_path(out, 2, 4))
    score_shard(flow, data, out, 3, 4, chunk=7)
    with pytest.raises(CheckpointError, match=r"shard-2-of-4.* is another shard"):
        merge_shards(flow, data, out)
    score_shard(flow, data, out, 0, 5, chunk=7)
    with pytest.raises(CheckpointError, match="by 4 and by 5: remove those that are not meant"):
        merge_shards(flow, data, out)
    write(data, normal(61))
    shard_path(out, 0, 5).unlink()
    with pytest.raises(CheckpointError, match="of another version of the file"):
        merge_shards(flow, data, out)


@pytest.mark.parametrize("suffix", [".npy", ".csv"])
def test_a_file_with_other_samples_of_the_same_size_is_another_version(flow: Flow, tmp_path: Path, suffix: str) -> None:
    """Written anew between two shards: neither its name nor its size tells."""
    x, out = normal(100).round(6), tmp_path / "scores.csv"
    data = write(tmp_path / f"x{suffix}", x)
    score_shard(flow, data, out, 0, 2, chunk=7)
    changed = x.copy()
    changed[:] = x[::-1]
    assert write(tmp_path / f"x{suffix}", changed).stat().st_size == data.stat().st_size
    score_shard(flow, data, out, 1, 2, chunk=7)
    with pytest.raises(CheckpointError, match=r"shard-0-of-2.* is of another version of the file: .*--shard 0/2"):
        merge_shards(flow, data, out)
    score_shard(flow, data, out, 0, 2, chunk=7)
    merge_shards(flow, data, out)


def test_there_may_be_no_shards(flow: Flow, tmp_path: Path) -> None:
    data = write(tmp_path / "x.npy", normal(20))
    with pytest.raises(CheckpointError, match=r"there are no shards of .*: score them first, each with --shard I/N"):
        merge_shards(flow, data, tmp_path / "scores.csv")
    with pytest.raises(ConfigError, match="shard = 2 of 2: expected 0 to 1"):
        score_shard(flow, data, tmp_path / "scores.csv", 2, 2)
    with pytest.raises(ConfigError, match="is the file of the samples"):
        score_shard(flow, data, data, 0, 2)
    np.save(tmp_path / "none.npy", np.empty((0, 2)))
    with pytest.raises(DataError, match="has no samples"):
        score_shard(flow, tmp_path / "none.npy", tmp_path / "scores.csv", 0, 2)


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flow = build()
    flow.save(tmp_path / "model.safetensors")
    data, held_out = write(tmp_path / "x.csv", normal(40)), write(tmp_path / "held_out.csv", normal(30, seed=5))
    common = ["score", str(tmp_path / "model.safetensors"), str(data), "--chunk", "9", "--quiet", "--out"]
    assert main([*common, str(tmp_path / "whole.csv"), "--calibrate", str(held_out)]) == 0
    command = [*common, str(tmp_path / "scores.csv")]
    assert main([*command, "--shard", "0/3"]) == 0
    for rank in ("1", "2"):  # as torchrun says it
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "3")
        capsys.readouterr()
        assert main([*command, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["shard"] == int(rank)
    assert main([*command, "--merge"]) == 0  # with the calibration that is stored
    assert (tmp_path / "scores.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert main([*command, "--shard", "1/3", "--calibrate", str(held_out)]) == 1
    assert "shards have no p-values; pass it with --merge" in capsys.readouterr().err
    for wrong in ("3/3", "1", "a/b", "-1/3"):
        with pytest.raises(SystemExit):
            main([*command, f"--shard={wrong}"])
        assert "expected I/N" in capsys.readouterr().err
