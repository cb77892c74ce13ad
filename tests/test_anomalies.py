"""Anomaly scores: p-values against their definition and their guarantee, files in chunks, and bad files."""

from __future__ import annotations

import argparse
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import pyrnode
from pyrnode import files
from pyrnode.anomalies import Calibration, calibrate, calibration_path, fingerprint, log_densities, score_file
from pyrnode.cli import score
from pyrnode.config import Config
from pyrnode.data import TensorSamples
from pyrnode.data.chunks import open_chunks
from pyrnode.errors import CheckpointError, ConfigError, DataError, SolverError
from pyrnode.flow import Flow


def build(d: int = 2, *, seed: int = 0, levels: int | None = None, image: bool = False) -> Flow:
    config = Config().override({"hidden": [4], "dtype": "float64", "seed": seed})
    flow = Flow.build(config, (1, 4, 4) if image else (d,), levels=levels)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return flow


def normal(n: int, d: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def expected_scores(flow: Flow, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return flow.log_prob(torch.from_numpy(np.ascontiguousarray(x))).numpy()


def write(path: Path, x: np.ndarray) -> Path:
    """The samples in a file of that kind."""
    if path.suffix == ".npy":
        np.save(path, x)
    elif path.suffix == ".csv":
        pd.DataFrame(x, columns=[f"x{i}" for i in range(x.shape[1])]).to_csv(path, index=False)
    else:
        pd.DataFrame(x, columns=[f"x{i}" for i in range(x.shape[1])]).to_parquet(path, row_group_size=30)
    return path


READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": pd.read_csv,
    ".json": lambda path: pd.DataFrame(json.loads(path.read_text())),
    ".parquet": pd.read_parquet,
}

# -- p-values --------------------------------------------------------------------------------------------------------


def test_p_values_are_ranks_among_the_calibration() -> None:
    calibration = Calibration(np.array([3.0, 1.0, 2.0, 2.0]))
    expected = [1 / 5, 2 / 5, 2 / 5, 4 / 5, 4 / 5, 5 / 5, 5 / 5]
    np.testing.assert_allclose(calibration.p_values([0.5, 1, 1.5, 2, 2.5, 3, 9]), expected, rtol=1e-15)


def test_a_density_of_nan_has_no_p_value_and_minus_infinity_the_smallest() -> None:
    calibration = Calibration(np.array([3.0, 1.0, 2.0, 2.0]))
    with pytest.raises(DataError, match="score 1 is NaN"):
        calibration.p_values([0.5, np.nan])
    scores = torch.tensor([0.5, 9.0], requires_grad=True)  # as `log_prob` returns them
    np.testing.assert_allclose(calibration.p_values(scores), calibration.p_values([0.5, 9]))
    np.testing.assert_allclose(calibration.p_values([-np.inf, np.inf]), [1 / 5, 1], rtol=1e-15)
    assert calibration.p_values([]).shape == (0,)


@pytest.mark.parametrize("flow_seed", [0, 1])
def test_p_values_are_valid_whatever_the_flow(flow_seed: int) -> None:
    """Over many calibrations, P(p ≤ α) is α to the next multiple of 1/(n+1), though the flow was never trained."""
    flow, alpha, n = build(seed=flow_seed), 0.1, 19
    values = expected_scores(flow, normal(20 * 400))
    p = np.concatenate([Calibration(part[1:]).p_values(part[:1]) for part in values.reshape(400, 20)])
    assert (p <= alpha).mean() == pytest.approx(2 / (n + 1), abs=4 * np.sqrt(0.1 * 0.9 / 400))
    grid = np.arange(1, n + 2) / (n + 1)
    counts = np.array([np.isclose(p, g).sum() for g in grid])
    assert stats.chisquare(counts).pvalue > 0.01


def test_fresh_samples_are_uniform_and_outliers_small() -> None:
    flow = build()
    calibration = calibrate(flow, torch.from_numpy(normal(2000)))
    p = calibration.p_values(expected_scores(flow, normal(1000, seed=1)))
    assert stats.ks_2samp(p, np.linspace(1 / 2001, 1, 2001)).pvalue > 0.01
    far = calibration.p_values(expected_scores(flow, normal(1000, seed=1) + np.array([6, 0])))
    assert (far < 0.01).mean() > 0.9


def test_a_calibration_is_made_from_files_tensors_and_samples_alike(tmp_path: Path) -> None:
    flow, x = build(), normal(70)
    expected = np.sort(expected_scores(flow, x))
    sources = [torch.from_numpy(x), TensorSamples(torch.from_numpy(x)), write(tmp_path / "x.npy", x)]
    for source in sources:
        np.testing.assert_allclose(calibrate(flow, source, chunk=32).scores, expected, rtol=1e-12)


def test_a_calibration_is_stored_with_its_model(tmp_path: Path) -> None:
    flow, other = build(), build(seed=1)
    calibration = Calibration(normal(50)[:, 0])
    calibration.save(tmp_path / "c", flow)
    np.testing.assert_array_equal(Calibration.load(tmp_path / "c", flow).scores, calibration.scores)
    with pytest.raises(CheckpointError, match="was made with another model: calibrate again"):
        Calibration.load(tmp_path / "c", other)
    flow.solver = pyrnode.SolverConfig()
    with pytest.raises(CheckpointError, match="another model"):
        Calibration.load(tmp_path / "c", flow)


@pytest.mark.parametrize("settings", [{"end_time": 2.0}, {"activation": "tanh"}, {"time": "none"}, {"hidden": [5]}])
def test_a_calibration_of_a_flow_with_the_same_weights_and_another_meaning_is_refused(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    flow = build()
    other = Flow.build(flow.config.override(settings), (2,))
    if settings.keys() <= {"end_time", "activation"}:
        other.load_state_dict(flow.state_dict())
    Calibration(normal(50)[:, 0]).save(tmp_path / "c", flow)
    with pytest.raises(CheckpointError, match="was made with another model: calibrate again"):
        Calibration.load(tmp_path / "c", other)


@pytest.mark.parametrize(
    "scores",
    [
        torch.zeros(3),
        torch.zeros(3, 1).double(),
        torch.zeros(0).double(),
        torch.tensor([1, torch.nan]).double(),
        torch.zeros(3, dtype=torch.complex64),
        torch.zeros(3, dtype=torch.uint8),
    ],
)
def test_a_calibration_of_the_right_digest_with_useless_scores(tmp_path: Path, scores: torch.Tensor) -> None:
    flow = build()
    files.write(tmp_path / "c", "calibration", {"scores": scores}, {"model": fingerprint(flow)})
    with pytest.raises(CheckpointError, match="is not a calibration: calibrate again"):
        Calibration.load(tmp_path / "c", flow)


def test_damaged_and_foreign_calibrations(tmp_path: Path) -> None:
    flow, path = build(), tmp_path / "c"
    with pytest.raises(CheckpointError, match="does not exist"):
        Calibration.load(path, flow)
    Calibration(np.zeros(9)).save(path, flow)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        Calibration.load(path, flow)
    flow.save(path)
    with pytest.raises(CheckpointError, match="holds a flow, not a calibration"):
        Calibration.load(path, flow)
    files.write(path, "calibration", {"ranks": torch.zeros(3)}, {"model": fingerprint(flow)})
    with pytest.raises(CheckpointError, match="calibrate again"):
        Calibration.load(path, flow)


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [np.inf], [[1.0]]])
def test_useless_calibrations(values: Any) -> None:
    with pytest.raises(DataError, match="calibration scores of shape"):
        Calibration(np.array(values))


# -- files in chunks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [".npy", ".csv", ".parquet"])
@pytest.mark.parametrize("target", [".csv", ".json", ".parquet"])
def test_every_kind_of_file_to_every_other(source: str, target: str, tmp_path: Path) -> None:
    flow, x = build(), normal(100, seed=2)
    calibration = Calibration(expected_scores(flow, normal(500)))
    data, out = write(tmp_path / f"data{source}", x), tmp_path / f"scores{target}"
    summary = score_file(flow, data, out, calibration=calibration, chunk=17)
    frame = READERS[target](out)
    assert list(frame.columns) == ["row", "log_prob", "p_value"]
    np.testing.assert_array_equal(frame["row"], np.arange(100))
    expected = expected_scores(flow, x)
    np.testing.assert_allclose(frame["log_prob"], expected, rtol=1e-12)
    np.testing.assert_array_equal(frame["p_value"], calibration.p_values(frame["log_prob"]))
    assert (summary.samples, summary.calibration) == (100, 500)
    assert summary.mean == pytest.approx(expected.mean())
    assert summary.below == {level: int((frame["p_value"] <= level).sum()) for level in (0.05, 0.01, 0.001)}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([data.name, out.name])


def test_scores_alone(tmp_path: Path) -> None:
    flow = build()
    summary = score_file(flow, write(tmp_path / "x.npy", normal(10)), tmp_path / "out.csv")
    assert list(pd.read_csv(tmp_path / "out.csv").columns) == ["row", "log_prob"]
    assert summary.below == {}
    assert str(summary) == f"10 samples, mean log-density {summary.mean:.4f} nats"


def test_a_summary_says_what_is_to_be_expected(tmp_path: Path) -> None:
    flow, x = build(), normal(40)
    calibration = Calibration(expected_scores(flow, normal(99, seed=1)))
    summary = score_file(flow, write(tmp_path / "x.npy", x), tmp_path / "out.csv", calibration=calibration)
    lines = str(summary).splitlines()
    assert lines[1] == f"p ≤ 0.05: {summary.below[0.05]}, where 2.0 are expected of ordinary samples"
    assert lines[3] == "p ≤ 0.001: needs 999 calibration samples, there are 99"


def test_a_line_of_names_is_optional(tmp_path: Path) -> None:
    flow, x = build(), normal(20)
    np.savetxt(tmp_path / "bare.csv", x, delimiter=",")
    score_file(flow, tmp_path / "bare.csv", tmp_path / "out.csv", chunk=7)
    np.testing.assert_allclose(pd.read_csv(tmp_path / "out.csv")["log_prob"], expected_scores(flow, x), rtol=1e-9)


def test_discrete_images(tmp_path: Path) -> None:
    flow = build(levels=17, image=True)
    x = np.random.default_rng(0).integers(0, 17, size=(12, 4, 4), dtype=np.uint8)
    np.save(tmp_path / "x.npy", x)
    score_file(flow, tmp_path / "x.npy", tmp_path / "out.csv")
    expected = log_densities(flow, torch.from_numpy(x[:, None]))
    np.testing.assert_allclose(pd.read_csv(tmp_path / "out.csv")["log_prob"], expected, rtol=1e-12)
    np.save(tmp_path / "x.npy", x / 16)
    with pytest.raises(DataError, match="models discrete ones: expected integers"):
        score_file(flow, tmp_path / "x.npy", tmp_path / "out.csv")


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".parquet"])
def test_integers_are_numbers_for_a_continuous_flow(suffix: str, tmp_path: Path) -> None:
    flow, x = build(), np.arange(20).reshape(10, 2) // 7
    score_file(flow, write(tmp_path / f"x{suffix}", x), tmp_path / "out.csv", chunk=4)
    expected = expected_scores(flow, x.astype(float))
    np.testing.assert_allclose(pd.read_csv(tmp_path / "out.csv")["log_prob"], expected, rtol=1e-9)


def test_estimated_scores_do_not_depend_on_the_chunks(tmp_path: Path) -> None:
    """70 dimensions: one probe per sample, which must be the sample's own in the calibration and in every chunk."""
    flow, x = build(70), normal(30, 70)
    for chunk in (7, 30):
        score_file(flow, write(tmp_path / "x.npy", x), tmp_path / f"{chunk}.csv", chunk=chunk)
    first, second = (pd.read_csv(tmp_path / f"{chunk}.csv")["log_prob"] for chunk in (7, 30))
    np.testing.assert_allclose(first, second, rtol=1e-10)


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".parquet"])
def test_one_chunk_is_in_memory_at_a_time(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the sizes that the flow sees, and by what Python and numpy hold at the most."""
    flow, sizes, n, d = build(8), list[int](), 20_000, 8
    data = write(tmp_path / f"x{suffix}", normal(n, d))
    if suffix == ".parquet":
        pd.read_parquet(data).to_parquet(data, row_group_size=1000)

    def cheap(x: torch.Tensor, context: None, **settings: Any) -> torch.Tensor:
        sizes.append(len(x))
        return x.sum(1)

    monkeypatch.setattr(flow, "log_prob", cheap)
    score_file(flow, data, tmp_path / "warm.csv", chunk=1000)  # imports
    sizes.clear()
    tracemalloc.start()
    score_file(flow, data, tmp_path / "out.csv", chunk=500, calibration=Calibration(np.zeros(3)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sizes == [500] * 40
    assert peak < n * d * 8 / 2  # the array is 1.3 MB


def test_chunks_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    data = write(tmp_path / "x.csv", normal(1000))
    with data.open("a") as file:
        file.write("1,text\n")
    chunks = iter(open_chunks(data, 100, event_shape=(2,)))
    assert [next(chunks)[0] for _ in range(10)] == list(range(0, 1000, 100))
    with pytest.raises(DataError, match="row 1000, column 'x1' is not a number"):
        next(chunks)


# -- bad files -------------------------------------------------------------------------------------------------------


def bad_csv(text: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "x.csv").write_text(text)
        return folder / "x.csv"

    return make


def truncated(suffix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = write(folder / f"x{suffix}", normal(200))
        path.write_bytes(path.read_bytes()[:-100])
        return path

    return make


def table(**columns: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        pd.DataFrame(columns).to_parquet(folder / "x.parquet")
        return folder / "x.parquet"

    return make


def array(value: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        np.save(folder / "x.npy", value, allow_pickle=True)
        return folder / "x.npy"

    return make


def rows_with_nan_at(row: int) -> np.ndarray:
    x = normal(50)
    x[row, 1] = np.nan
    return x


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "not there": (lambda folder: folder / "x.csv", "does not exist"),
    "unknown kind": (lambda folder: folder / "x.txt", r"unknown kind of file of .*'.txt'.*known: .csv, .npy, .parquet"),
    "npy, truncated": (truncated(".npy"), "is not a .npy file of numbers, or truncated"),
    "npy, wrong width": (array(normal(5, 3)), r"shape \(3,\); the flow models \(2,\)"),
    "npy, one axis": (array(np.zeros(5)), r"has shape \(5,\)"),
    "npy, objects": (array(np.array([{}, {}])), "is not a .npy file of numbers"),
    "npy, half precision": (array(normal(5).astype(np.float16)), "float16: convert it to float32"),
    "npy, NaN": (array(rows_with_nan_at(37)), "row 37, column 1 is NaN, empty or infinite"),
    "npy, empty": (array(np.zeros((0, 2))), "has no samples"),
    "csv, empty": (bad_csv(""), "is empty"),
    "csv, names only": (bad_csv("a,b\n"), "has no samples"),
    "csv, wrong width": (bad_csv("a,b,c\n1,2,3\n"), r"shape \(3,\)"),
    "csv, text": (bad_csv("a,b\n" + "1,2\n" * 12 + "1,big\n"), "row 12, column 'b' is not a number \\('big'\\)"),
    "csv, a row cut short": (bad_csv("a,b\n" + "1,2\n" * 12 + "1\n"), "row 12, column 1 is NaN, empty or infinite"),
    "csv, a row too long": (bad_csv("a,b\n" + "1,2\n" * 12 + "1,2,3\n"), "cannot be read as comma-separated"),
    "csv, all rows too long": (bad_csv("a,b\n" + "1,2,3\n" * 12), "more fields than its line of names"),
    "csv, not text": (lambda folder: bad_bytes(folder / "x.csv"), "cannot be read as comma-separated"),
    "parquet, truncated": (truncated(".parquet"), "is not a parquet file, or truncated"),
    "parquet, foreign": (lambda folder: bad_bytes(folder / "x.parquet"), "is not a parquet file, or truncated"),
    "parquet, empty place": (table(a=[1.0, None], b=[1.0, 2.0]), "row 1, column 0 is NaN, empty or infinite"),
    "parquet, text": (table(a=[1.0, 2.0], b=["1", "x"]), "row 1, column 'b' is not a number \\('x'\\)"),
    "parquet, truth values": (table(a=[1.0, 2.0], b=[True, False]), "column 'b' holds truth values"),
}


def bad_bytes(path: Path) -> Path:
    path.write_bytes(bytes(range(128, 256)) * 10)
    return path


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    make, message = BAD[name]
    data, out = make(tmp_path), tmp_path / "out" / "scores.csv"
    out.parent.mkdir()
    out.write_text("before")
    with pytest.raises(DataError, match=message) as caught:
        score_file(build(), data, out, chunk=5)
    assert str(data) in str(caught.value)
    assert [path.name for path in out.parent.iterdir()] == ["scores.csv"]
    assert out.read_text() == "before"


def test_bad_targets(tmp_path: Path) -> None:
    flow, data = build(), write(tmp_path / "x.csv", normal(5))
    with pytest.raises(ConfigError, match=r"'.xlsx'; known: .csv, .json, .parquet"):
        score_file(flow, data, tmp_path / "out.xlsx")
    with pytest.raises(CheckpointError, match=r"cannot write .*No such file or directory"):
        score_file(flow, data, tmp_path / "nowhere" / "out.csv")
    with pytest.raises(ConfigError, match="is the file of the samples"):
        score_file(flow, data, tmp_path / "." / "x.csv")
    for size in (0, -1, True):
        with pytest.raises(ConfigError, match="chunk = "):
            score_file(flow, data, tmp_path / "out.csv", chunk=size)


def test_an_argument_that_there_is_not_is_an_error_for_files_and_arrays(tmp_path: Path) -> None:
    flow, x = build(), normal(5)
    data: Any
    for data in (x, write(tmp_path / "x.csv", x)):
        with pytest.raises(ConfigError, match=r"argument 'seperator'; known: decimal, header, sep"):
            calibrate(flow, data, **{"seperator": ";"})
        with pytest.raises(ConfigError, match="argument 'limit'"):  # a setting, but not of how a file is written
            calibrate(flow, data, **{"limit": 10})
        with pytest.raises(ConfigError, match="sep = "):
            calibrate(flow, data, sep="#")
    with pytest.raises(ConfigError, match="argument 'seperator'"):
        score_file(flow, tmp_path / "x.csv", tmp_path / "out.csv", **{"seperator": ";"})
    assert not (tmp_path / "out.csv").exists()


def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the solves of whatever has a value above 50."""
    original = Flow.log_prob

    def log_prob(self: Flow, x: torch.Tensor, context: None, **settings: Any) -> torch.Tensor:
        if float(x.max()) > 50:
            raise SolverError("block 0: too stiff", status="MaxIters", block=0)
        return original(self, x, context, **settings)

    monkeypatch.setattr(Flow, "log_prob", log_prob)


def test_a_held_out_sample_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch)
    x = normal(30)
    x[17] = 99
    with pytest.raises(SolverError, match="in rows 10 to 19: block 0: too stiff") as caught:
        calibrate(build(), torch.from_numpy(x), chunk=10)
    assert (caught.value.status, caught.value.block) == ("MaxIters", 0)


@pytest.mark.parametrize("bad", [[17], [0, 1, 2], [10, 19, 29], list(range(30))])
def test_samples_whose_solve_fails_are_impossible_and_the_others_are_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: list[int]
) -> None:
    flow, x, held_out = build(), normal(30), Calibration(expected_scores(build(), normal(200, seed=1)))
    expected = expected_scores(flow, x)
    expected[bad], x[bad] = -np.inf, 99
    failing(monkeypatch)
    data, out = write(tmp_path / "x.npy", x), tmp_path / "out.csv"
    summary = score_file(flow, data, out, chunk=10, calibration=held_out)
    table = pd.read_csv(out)
    np.testing.assert_allclose(table["log_prob"], expected, rtol=1e-10)
    np.testing.assert_allclose(table["p_value"], held_out.p_values(expected), rtol=1e-12)
    assert set(table["p_value"][bad]) == {1 / 201}
    assert summary.impossible == len(bad)
    np.testing.assert_allclose(summary.mean, np.mean(np.delete(expected, bad)) if len(bad) < 30 else np.nan, rtol=1e-9)
    assert str(summary).splitlines()[1].startswith(f"{len(bad)} of them failed or are out of all range")


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".parquet"])
@pytest.mark.parametrize("value", [1e39, -1e300, 1e30])
def test_a_row_out_of_all_range_does_not_end_the_scoring(tmp_path: Path, suffix: str, value: float) -> None:
    """1e39 is no 32-bit number; the square of 1e30 is none either."""
    flow, x, held_out = build().float(), normal(20), Calibration(np.zeros(9))
    expected = expected_scores(flow, x.astype(np.float32))
    x[7, 1], expected[7] = value, -np.inf
    data, out = write(tmp_path / f"x{suffix}", x), tmp_path / "out.json"
    summary = score_file(flow, data, out, chunk=6, calibration=held_out)
    text = out.read_text()
    assert "Infinity" not in text
    assert "NaN" not in text
    rows = json.loads(text, parse_constant=pytest.fail)
    assert rows[7] == {"row": 7, "log_prob": None, "p_value": 0.1}
    np.testing.assert_allclose([row["log_prob"] or -np.inf for row in rows], expected, rtol=1e-5)
    assert summary.impossible == 1
    assert summary.mean == pytest.approx(np.delete(expected, 7).mean(), rel=1e-5)


def test_a_row_of_nan_is_an_error_still(tmp_path: Path) -> None:
    x = normal(20)
    x[7, 1], x[3] = np.nan, 1e39
    with pytest.raises(DataError, match="row 7, column 1 is NaN"):
        score_file(build().float(), write(tmp_path / "x.npy", x), tmp_path / "out.csv")


# -- the command -----------------------------------------------------------------------------------------------------


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    score.score_arguments(parser)
    return score.score(parser.parse_args([*arguments, "--quiet"]))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The folder of a run, as far as scoring needs one."""
    folder = tmp_path / "run"
    folder.mkdir()
    build().save(folder / "model.safetensors")
    return folder


def test_the_command_calibrates_once(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flow, out = build(), tmp_path / "out.json"
    data, held_out = write(tmp_path / "x.npy", normal(50)), write(tmp_path / "h.parquet", normal(300, seed=1))
    assert command(str(model), str(data), "--out", str(out), "--calibrate", str(held_out)) == 0
    assert capsys.readouterr().out.endswith(f"written to {out}\n")
    first = out.read_text()
    p = Calibration(expected_scores(flow, normal(300, seed=1))).p_values(expected_scores(flow, normal(50)))
    np.testing.assert_allclose([row["p_value"] for row in json.loads(first)], p, rtol=1e-12)
    assert calibration_path(model).is_file()
    assert command(str(model), str(data), "--out", str(out), "--json") == 0
    assert out.read_text() == first
    summary = json.loads(capsys.readouterr().out)
    assert summary["samples"] == 50
    assert summary["calibration"] == 300
    assert summary["below"]["0.05"] == int((p <= 0.05).sum())


def test_the_command_without_a_calibration(model: Path, tmp_path: Path) -> None:
    data, out = write(tmp_path / "x.npy", normal(5)), tmp_path / "out.csv"
    with pytest.raises(DataError, match=r"has no calibration: .* --calibrate .* --scores-only"):
        command(str(model), str(data), "--out", str(out))
    assert command(str(model / "model.safetensors"), str(data), "--out", str(out), "--scores-only") == 0
    assert list(pd.read_csv(out).columns) == ["row", "log_prob"]


def test_the_command_takes_the_runs_own_test_set(tmp_path: Path) -> None:
    x = normal(200, seed=3)
    np.save(tmp_path / "train.npy", x)
    settings = {"hidden": [4], "max_steps": 2, "batch_size": 20}
    run = pyrnode.train(str(tmp_path / "train.npy"), out=tmp_path / "run", **settings, evaluate=False, progress=False)
    arguments = [str(tmp_path / "run"), str(tmp_path / "train.npy"), "--out", str(tmp_path / "out.parquet")]
    assert command(*arguments, "--calibrate", "test") == 0
    test = pyrnode.data.load(tmp_path / "train.npy").test.tensor()
    stored = Calibration.load(calibration_path(tmp_path / "run"), pyrnode.load(tmp_path / "run"))
    np.testing.assert_allclose(stored.scores, np.sort(log_densities(run.flow, test)), rtol=1e-6)
    assert len(test) == 20


def test_a_stale_calibration_is_refused(model: Path, tmp_path: Path) -> None:
    data, out = write(tmp_path / "x.npy", normal(5)), tmp_path / "out.csv"
    command(str(model), str(data), "--out", str(out), "--calibrate", str(data))
    build(seed=1).save(model / "model.safetensors")  # trained again
    with pytest.raises(CheckpointError, match="made with another model"):
        command(str(model), str(data), "--out", str(out))
