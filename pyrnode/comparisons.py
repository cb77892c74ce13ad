"""Pictures of samples against data beyond two dimensions, and of calibration.

As in `pyrnode.plotting`, each gives a matplotlib `Figure` outside pyplot, for `pyrnode.plotting.save`. Data is blue and
solid, what the flow made is orange and dashed: the two stay apart in grey print and for the colour-blind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyrnode.data.arrays import numbers
from pyrnode.errors import ConfigError, DataError
from pyrnode.plotting import BLUE, GREY, ORANGE, Array, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 6
"""Columns that `pair_plot` draws; of a wider table the first ones."""

_STYLES = ("-", "--", "-.", ":")
_COLORS = (BLUE, ORANGE, "black", GREY)


def pair_plot(data: Any, samples: Any, *, names: Sequence[str] | None = None, title: str = "") -> Figure:
    """Every pair of columns, data below the diagonal and samples above it; on the diagonal, histograms of both.

    The window of each column is the data's 0.1 % to 99.9 % quantiles and a tenth more on either side, so that samples
    in the wrong place are missing rather than rescaled. The first `MOST` columns are drawn.

    Args:
        data: Held-out rows, ``(n, d)``, d at least 2: a tensor, an array or a data frame.
        samples: The flow's samples, ``(m, d)``, in the data's units and order of columns.
        names: The columns' names, d of them; else ``x_1`` and so on.
        title: Title of the picture.

    Raises:
        DataError: The shapes are not ``(n, d)`` and ``(m, d)``, or a value is not finite.
        ConfigError: There are not d names.
    """
    x = _rows(data, "data")
    d = x.shape[1]
    y = _rows(samples, "samples")
    if d < 2 or y.shape[1] != d:
        raise DataError(f"data of {d} columns and samples of {y.shape[1]}: expected the same number, at least 2")
    labels = _names(names, d)
    shown = min(d, MOST)
    low, high = np.quantile(x[:, :shown], [0.001, 0.999], axis=0)
    margin = np.where(high > low, 0.1 * (high - low), 0.5)  # a constant column has a window too
    margin = np.maximum(margin, 100 * np.finfo(np.float64).eps * np.maximum(abs(low), abs(high)))  # of several numbers
    low, high = low - margin, high + margin
    figure = new_figure(1.7 * shown + 0.4, 1.7 * shown + 0.8)
    grid = figure.subplots(shown, shown, sharex="col", squeeze=False)
    for row in range(shown):
        for column in range(shown):
            axes = grid[row, column]
            axes.set_xlim(low[column], high[column])
            if row == column:
                _histograms(axes, x[:, row], y[:, row], (float(low[row]), float(high[row])))
            else:
                points, color = (x, BLUE) if row > column else (y, ORANGE)
                alpha = min(1.0, max(0.15, 500 / len(points)))
                axes.scatter(points[:, column], points[:, row], s=3, color=color, alpha=alpha, linewidths=0)
                axes.set_ylim(low[row], high[row])
            axes.tick_params(labelsize=7, labelleft=column == 0 and row > 0)
            if row == shown - 1:
                axes.set_xlabel(labels[column])
            if column == 0:
                axes.set_ylabel(labels[row])
    handles, texts = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=2, frameon=False)
    note = f"columns 1 to {shown} of {d}" if shown < d else ""
    if title or note:
        figure.suptitle(", ".join(filter(None, (title, note))), fontweight="bold")
    return figure


def _histograms(axes: Axes, x: Array, y: Array, window: tuple[float, float]) -> None:
    """Both densities over all rows: what lies outside the window is missing from the area under the line."""
    for values, color, style, name in ((x, BLUE, "-", "data (below)"), (y, ORANGE, "--", "samples (above)")):
        counts, edges = np.histogram(values, bins=30, range=window)
        axes.stairs(counts / (len(values) * np.diff(edges)), edges, color=color, linestyle=style, lw=1.5, label=name)
    axes.set_yticks([])


def calibration_plot(pit: Any, *, names: Sequence[str] | None = None, level: float = 0.95) -> Figure:
    """How far the distribution of PIT values lies from the uniform one that a calibrated model has.

    Draws ``F_n(u) - u``, with ``F_n`` the empirical distribution of each column, over the band that all of a calibrated
    column's curve stays in with probability of at least `level` (Dvoretzky-Kiefer-Wolfowitz with Massart's constant:
    ``sqrt(log(2 / (1 - level)) / (2 n))``). Above 0 on the left and below on the right: the truth is more often in the
    tails than the model says; the reverse: the model is too wide.

    Args:
        pit: Values of the model's distribution function at the truth, in ``[0, 1]``, ``(n,)`` or ``(n, k)``; also
            ranks of simulation-based calibration over their number; a tensor or an array. A flow's are
            ``torch.special.ndtr(flow.encode(x))``.
        names: The columns' names, k of them; else ``x_1`` and so on.
        level: Probability of the band, inside ``(0, 1)``.

    Raises:
        DataError: A value lies outside ``[0, 1]`` or is NaN, or the shape is another.
        ConfigError: The level lies outside ``(0, 1)``, or there are not k names.
    """
    if isinstance(level, bool) or not isinstance(level, (int, float)) or not 0 < level < 1:
        raise ConfigError(f"level = {level!r}: expected a probability inside (0, 1), as 0.95")
    pit = numbers(pit, "pit")
    values = _rows(pit[:, None] if pit.ndim == 1 else pit, "pit")
    if values.min() < 0 or values.max() > 1:
        raise DataError(
            f"pit from {values.min():g} to {values.max():g}: expected values of a distribution function, 0 to 1"
        )
    n, k = values.shape
    labels = _names(names, k)
    band = math.sqrt(math.log(2 / (1 - level)) / (2 * n))
    figure = new_figure(6.4, 4)
    axes = figure.add_subplot()
    axes.axhspan(-band, band, color=GREY, alpha=0.2, linewidth=0, label=f"{100 * level:g} % band of {n}")
    axes.axhline(0, color=GREY, lw=1)
    for column in range(k):
        u = np.repeat(np.sort(values[:, column]), 2)  # each value is a jump: both its ends
        steps = np.stack([np.arange(n), np.arange(1, n + 1)], 1).reshape(-1) / n
        u, steps = np.concatenate([[0.0], u, [1.0]]), np.concatenate([[0.0], steps, [1.0]])
        color = _COLORS[(column + column // len(_STYLES)) % len(_COLORS)]  # 16 pairs of colour and style
        axes.plot(u, steps - u, color=color, linestyle=_STYLES[column % len(_STYLES)], lw=1.5, label=labels[column])
    axes.set(xlabel="PIT value $u$", ylabel="$F_n(u) - u$", xlim=(0, 1))
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _rows(values: Any, name: str) -> Array:
    found = numbers(values, name)
    if found.ndim != 2 or not found.numel():
        raise DataError(f"{name} of shape {tuple(found.shape)}: expected (n, d), n and d at least 1")
    rows: Array = found.detach().cpu().double().numpy()
    if not np.isfinite(rows).all():
        raise DataError(
            f"{name}: {int((~np.isfinite(rows)).any(1).sum())} of {len(rows)} rows are not finite: leave them out"
        )
    return rows


def _names(names: Sequence[str] | None, d: int) -> list[str]:
    if names is None:
        return [f"$x_{{{i}}}$" for i in range(1, d + 1)]
    if len(names) != d:
        raise ConfigError(f"{len(names)} names for {d} columns: give one for each")
    return list(names)
