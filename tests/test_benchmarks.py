"""The comparisons of densities: how tables are divided, runs kept, and a peer's configuration is chosen."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import busy, density, optimisers, small_tables, tables
from pyrnode import Config, Flow
from pyrnode.dynamics import ModuleDynamics


def _line(table: str, model: str, configuration: str, seed: int, **numbers: Any) -> dict[str, Any]:
    run = {"table": table, "model": model, "configuration": configuration, "seed": seed, "budget": 60.0}
    return {**run, "clock": "wall", "settings": {}, **numbers}


def test_a_table_is_divided_by_groups_and_standardised_by_its_training_rows() -> None:
    random = np.random.default_rng(0)
    group = np.repeat(np.arange(500), 4)
    values = np.stack([group, 3 + 7 * random.standard_normal(2_000)], axis=1).astype(float)
    table = tables.divide("t", values, group, np.random.default_rng(1))
    again = tables.divide("t", values, group, np.random.default_rng(1))
    parts = (table.train, table.validation, table.test)
    assert [len(part) for part in parts] == [1_600, 200, 200]
    first = [set(np.round(part[:, 0], 9)) for part in parts]
    assert len(set.union(*first)) == sum(map(len, first)) == 500
    np.testing.assert_allclose(table.train.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(table.train.std(axis=0), 1, atol=1e-12)
    np.testing.assert_array_equal(table.test, again.test)


def test_rounded_values_are_spread_over_what_they_were_rounded_from() -> None:
    source = tables.Source(None, np.random.default_rng(0))
    exact = np.random.default_rng(1).uniform(3, 4, 4_000)
    spread = source.spread(exact.round(1), 0.1)
    np.testing.assert_array_equal(spread.round(1), exact.round(1))
    assert len(np.unique(spread)) == 4_000


def test_clock_times_are_minutes() -> None:
    np.testing.assert_array_equal(tables.minutes([517, 2400, 1, 1530]), [317, 1440, 1, 930])


def test_a_table_without_its_source_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert density.table_files(["patches"], tmp_path, tmp_path) == {}
    assert f"patches: not made (cifar10-jpeg is not in {tmp_path})" in capsys.readouterr().out


def test_the_report_chooses_a_peers_configuration_by_validation() -> None:
    lines = [
        *(_line("a", "nsf", "small", seed, validation=-1.0, nats=-1.0) for seed in (0, 1)),
        *(_line("a", "nsf", "large", seed, validation=-0.5, nats=nats) for seed, nats in ((0, -3.0), (1, -2.0))),
        *(_line("a", "pyrnode", "defaults", seed, validation=-9.0, nats=-2.75) for seed in (0, 1)),
        _line("b", "pyrnode", "fast", 0, validation=0.0, nats=1.5),
        _line("b", "maf", "small", 0, failed="ValueError: no"),
    ]
    assert density.report(lines).splitlines() == [
        "60 s of training:",
        "",
        "| table | nsf | pyrnode defaults | pyrnode fast |",
        "|---|---|---|---|",
        "| a | **−2.50 ± 0.50** | −2.75 ± 0.00 |  |",
        "| b |  |  | **1.50** |",
        "",
        "Chosen by validation: a: nsf large.",
        "",
        "Failed: b, maf:small, seed 0, 60 s: ValueError: no.",
    ]


@pytest.mark.slow
def test_runs_are_scored_kept_and_taken_up_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=torch.float64), covariance)
    values = normal.sample((5_000,)).numpy()
    table = tables.divide("normal", values, np.arange(len(values)), np.random.default_rng(0))
    table.save(tmp_path / "normal.npz")
    truth = float(-normal.entropy() + np.log(values.std(axis=0)).sum())  # in standardised units
    monkeypatch.setattr(density, "find_spec", lambda package: None)
    out = tmp_path / "out.jsonl"
    command = ["--out", str(out), "--tables", str(tmp_path / "normal.npz"), "--seeds", "1", "--seconds", "2"]
    command += ["--clock", "cpu", "--models", "pyrnode", "nsf", "mixture"]
    command += ["--ours", 'quick={"learning_rate": 0.01, "hidden": [16]}', "--ours", 'wrong={"learning_rate": -1}']
    density.main(command)
    said = capsys.readouterr().out
    assert "nsf: skipped (pip install zuko)" in said
    found = {line["configuration"]: line for line in density.read(out)}
    assert list(found) == ["quick", "wrong", "searched"]
    for label, within in (("quick", 0.15), ("searched", 0.1)):
        assert found[label]["nats"] == pytest.approx(truth, abs=within)
        assert found[label]["seconds"] < 3
    assert found["quick"]["steps"] > 10
    assert "learning_rate = -1" in found["wrong"]["failed"]
    before = out.read_text(encoding="utf-8")
    density.main(command[:-2])  # without the wrong settings: nothing is left to do
    assert out.read_text(encoding="utf-8") == before
    assert "| normal |" in capsys.readouterr().out
    assert all(json.loads(line) for line in before.splitlines())


class _Turning(nn.Module):
    """f = (θ J + s I) z: a rotation by θ and a growth by eˢ in the time of a block."""

    def __init__(self, angle: float, growth: float) -> None:
        super().__init__()
        matrix = torch.tensor([[growth, -angle], [angle, growth]], dtype=torch.float64, device="cpu")
        self.matrix = nn.Parameter(matrix)

    def forward(self, t: Any, z: torch.Tensor) -> torch.Tensor:
        return z @ self.matrix.T


@pytest.mark.parametrize(("angle", "growth"), [(1.5, 0.0), (0.0, 0.7), (1.0, 0.5)])
def test_how_a_flow_moves_rows_against_the_closed_form(angle: float, growth: float) -> None:
    accurate = {"rtol": 1e-8, "atol": 1e-8}
    config = Config().override({"dtype": "float64", "standardize": "none", "evaluation.solver": accurate})
    flow = Flow.build(config, (2,), dynamics=lambda shape: ModuleDynamics(_Turning(angle, growth), shape))
    rows = np.random.default_rng(0).standard_normal((40, 2))
    found = density.movement(flow, rows)
    e = np.exp(growth)  # a spiral of z' = (s + iθ) z, whose speed is |s + iθ| eˢᵗ |x|
    path = np.hypot(angle, growth) * ((e - 1) / growth if growth else 1)
    assert found["detour"] == pytest.approx(path / abs(e * np.exp(1j * angle) - 1), rel=1e-3)
    mean, square = ((e - 1) / growth, (e**2 - 1) / (2 * growth)) if growth else (1, 1)
    assert found["variation"] == pytest.approx(np.sqrt(max(square / mean**2 - 1, 0)), abs=1e-3)
    assert 0 < found["inversion"] < 1e-6
    assert found["weights"] == 4
    assert found["evaluations"] > 10


def test_small_tables_has_a_number_for_every_column(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["small_tables", "--quick", "--tables", "iris"])
    small_tables.main()
    head, _, row = capsys.readouterr().out.splitlines()
    names, cells = (line.strip("| ").split(" | ") for line in (head, row))
    assert len(names) == len(cells) == 4 + len(small_tables.VARIANTS)
    assert cells[0] == "iris (150, 4)"
    for cell in cells[1:]:
        nats, error = map(float, cell.split(" ± "))
        assert -20 < nats < 0 < error


def test_busy_has_a_row_for_every_load_and_number_of_threads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["busy", "--repeats", "1", "--loops", "0", "1", "--width", "8", "--batch", "2", "--size", "4"]
    monkeypatch.setattr("sys.argv", command)
    before = torch.get_num_threads()
    busy.main()
    assert torch.get_num_threads() == before
    _, head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["loops", "threads", "wall", "processor", "ratio"]
    found = [row.split() for row in rows[: rows.index("")]]
    assert len(rows) == len(found) + 1 + 4  # and the same as a table, a line for each load
    assert [row[:2] for row in found] == [["0", "1"], ["0", "2"], ["1", "1"], ["1", "2"]]
    assert all(float(wall.removesuffix("ms")) >= 0 and float(ratio) > 0 for *_, wall, _, ratio in found)
    assert [row[-1] for row in found[::2]] == ["1.00", "1.00"]


def test_busy_loops_end_with_what_they_run_beside() -> None:
    with busy.busy(2) as processes:
        assert [process.poll() for process in processes] == [None, None]
    assert [process.poll() for process in processes] == [-9, -9]


def test_optimisers_are_timed_in_turns_of_the_same_steps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, before = tmp_path / "found.json", torch.get_num_threads()
    monkeypatch.setattr("sys.argv", ["optimisers", "--cases", "table", "--repeats", "1", "--json", str(path)])
    try:
        optimisers.main()
    finally:
        torch.set_num_threads(before)
    (row,) = json.loads(path.read_text())["results"]
    assert capsys.readouterr().out.splitlines()[2].split(" | ")[0] == "| table"
    assert row["ratio"] == pytest.approx(row["soap_ms"] / row["adam_ms"])  # of one turn
    shapes = [tuple(p.shape) for p in optimisers.trainer("table", "adam").flow.parameters()]
    means = sum(4 + 2 * 4 * math.prod(shape) for shape in shapes)  # beside the number of steps
    sides = sum(4 * 2 * length**2 for shape in shapes if len(shape) == 2 for length in shape if length > 1)
    assert row["adam_mib"] == pytest.approx(means / 2**20)
    assert row["soap_mib"] == pytest.approx((means + sides) / 2**20)
