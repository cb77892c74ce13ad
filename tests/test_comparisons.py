"""Pair plots and calibration plots: the artists hold the data, its histograms and closed forms."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

import pyrnode
from pyrnode import comparisons
from pyrnode.errors import ConfigError, DataError


def _normal(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_pair_plot_draws_data_below_and_samples_above() -> None:
    x, y = _normal(400, 3, 0), _normal(300, 3, 1) + 2  # so that some lie outside the window
    figure = comparisons.pair_plot(x, y, names=["a", "b", "c"])
    grid = np.array(figure.axes).reshape(3, 3)
    for row in range(3):
        low, high = np.quantile(x[:, row].numpy(), [0.001, 0.999])
        margin = 0.1 * (high - low)
        np.testing.assert_allclose(grid[row, row].get_xlim(), (low - margin, high + margin))
        for column in range(3):
            if row == column:
                continue
            drawn = grid[row, column].collections[0].get_offsets()
            np.testing.assert_array_equal(drawn, (x if row > column else y)[:, [column, row]].numpy())
            assert grid[row, column].get_ylim() == grid[row, row].get_xlim()
        for patch, points in zip(grid[row, row].patches, (x, y), strict=True):
            heights, edges, _ = patch.get_data()
            inside = ((points[:, row] >= edges[0]) & (points[:, row] <= edges[-1])).double().mean()
            assert (heights * np.diff(edges)).sum() == pytest.approx(float(inside), abs=1e-12)
    assert [axes.get_xlabel() for axes in grid[-1]] == ["a", "b", "c"]


def test_pair_plot_of_a_wide_table_says_what_it_leaves_out() -> None:
    figure = comparisons.pair_plot(_normal(20, 9, 0), _normal(20, 9, 1), title="wide")
    assert len(figure.axes) == comparisons.MOST**2
    assert figure.get_suptitle() == "wide, columns 1 to 6 of 9"
    figure.draw_without_rendering()
    assert figure._suptitle is not None
    assert not figure._suptitle.get_window_extent().overlaps(figure.legends[0].get_window_extent())


def test_calibration_plot_draws_the_difference_and_the_band() -> None:
    pit = torch.tensor([0.9, 0.1, 0.4, 0.5], dtype=torch.float64)
    axes = comparisons.calibration_plot(pit, level=0.9).axes[0]
    u, difference = axes.lines[1].get_data()
    np.testing.assert_allclose(u, [0, 0.1, 0.1, 0.4, 0.4, 0.5, 0.5, 0.9, 0.9, 1])
    np.testing.assert_allclose(difference, [0, -0.1, 0.15, -0.15, 0.1, 0, 0.25, -0.15, 0.1, 0], atol=1e-15)
    box = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    band = math.sqrt(math.log(20) / 8)
    np.testing.assert_allclose((box.y0, box.y1), (-band, band), atol=1e-9)


def test_sixteen_calibration_lines_differ_in_colour_or_style() -> None:
    axes = comparisons.calibration_plot(
        torch.linspace(0, 1, 48, dtype=torch.float64, device="cpu").reshape(3, 16)
    ).axes[0]
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines[1:]}) == 16


def test_bad_input_is_named() -> None:
    x = _normal(5, 3, 0)
    with pytest.raises(DataError, match=r"data of 3 columns and samples of 2"):
        comparisons.pair_plot(x, x[:, :2])
    with pytest.raises(DataError, match=r"data of shape \(5,\)"):
        comparisons.pair_plot(x[:, 0], x)
    with pytest.raises(DataError, match="1 of 5 rows are not finite"):
        comparisons.pair_plot(x, x.index_fill(0, torch.tensor([2], device="cpu"), math.nan))
    with pytest.raises(ConfigError, match="2 names for 3 columns"):
        comparisons.pair_plot(x, x, names=["a", "b"])
    with pytest.raises(DataError, match=r"pit from .* to 2"):
        comparisons.calibration_plot(torch.tensor([0.5, 2.0], dtype=torch.float64))
    with pytest.raises(ConfigError, match="level = 1"):
        comparisons.calibration_plot(torch.tensor([0.5], dtype=torch.float64), level=1)


def test_a_runs_pair_plot_names_the_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(comparisons, "pair_plot", lambda *a, names=None, **k: told.append(names) or Figure())
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(60, 3)), columns=["age", "height in m", "c"])
    settings = {"hidden": [4], "max_steps": 1, "engine": "torch", "draws": 1}
    pyrnode.train(frame, out=tmp_path / "run", progress=False, **settings)
    assert told == [("age", "height in m", "c")]


def test_arrays_frames_and_narrow_columns_are_drawn() -> None:
    x = np.random.default_rng(0).normal(size=(60, 3))
    for data in (x, x.tolist(), pd.DataFrame(x), torch.from_numpy(x), 1e9 + 1e-7 * x):
        assert len(comparisons.pair_plot(data, x).axes) == 9
    for pit in (x[:, 0] % 1, (x % 1).tolist(), torch.from_numpy(x % 1)):
        assert comparisons.calibration_plot(pit).axes
    for level in ("a", None, True):
        with pytest.raises(ConfigError, match=r"level = .*: expected a probability"):
            comparisons.calibration_plot(x[:, 0] % 1, level=level)  # type: ignore[arg-type]
