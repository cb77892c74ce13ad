"""Pictures: learning curves, samples, and densities in one and two dimensions.

Every function gives a matplotlib `Figure` of its own, outside pyplot: no window, no backend and no global state is
touched. `save` writes it as a PNG or a PDF.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyrnode.errors import ConfigError, DataError, unknown_name
from pyrnode.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LogProb = Callable[[Tensor], Tensor]
"""Log-density in nats ``(n,)`` of points ``(n, d)``."""

Array = np.ndarray[Any, np.dtype[Any]]
History = Sequence[Mapping[str, object]]

DPI = 150
BLUE, ORANGE, GREEN, GREY = "#0b6bb3", "#d95f0e", "#2f8f4e", "#7a7a7a"
UNITS = {"nats/dim": 1.0, "bits/dim": 1 / math.log(2)}
"""What a number in nats per dimension is to be multiplied by."""

_MIN_CELL = 80  # side in pixels that a small image is enlarged to
_GAP = 2  # pixels between images
_TIGHT: dict[str, Any] = {"columnspacing": 1.0, "handlelength": 1.2, "handletextpad": 0.5, "borderaxespad": 0.2}


def save(figure: Figure, path: str | Path) -> None:
    """Writes a figure as a PNG (150 dots per inch) or a PDF, by the file's name, atomically.

    Raises:
        ConfigError: The name ends in neither ``.png`` nor ``.pdf``.
        CheckpointError: The file cannot be written.
    """
    path = _picture(path, ".png", ".pdf")
    buffer = io.BytesIO()
    metadata = {"CreationDate": None} if path.suffix.lower() == ".pdf" else None  # the same picture, the same bytes
    figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=DPI, metadata=metadata)
    write_atomically(path, buffer.getvalue())


def _picture(path: str | Path, *suffixes: str) -> Path:
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise ConfigError(f"path = {str(path)!r}: end the picture's name in {' or '.join(suffixes)}")
    return path


def new_figure(width: float, height: float) -> Figure:
    """An empty figure outside pyplot, its sides in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


# --- learning curves ---


def learning_curves(history: History, *, unit: str) -> Figure:
    """Training against validation, the penalties, and the evaluations of the dynamics, by optimiser step.

    Args:
        history: Records of steps (``step, nll, E, n, nfe``) and of validations (``step, validation``, and perhaps
            ``disagreement``, the training solver's with the accurate one), nats per dimension, as in a
            `TrainingResult`; other keys, and values that are not finite, are passed over.
        unit: ``"nats/dim"`` or ``"bits/dim"``.

    Raises:
        ConfigError: The unit is unknown.
        DataError: There is nothing to draw.
    """
    if unit not in UNITS:
        raise ConfigError(unknown_name("unit", unit, UNITS))
    curves = {key: _curve(history, key) for key in ("nll", "validation", "E", "n", "nfe", "disagreement")}
    if not len(curves["nll"][0]) and not len(curves["validation"][0]):
        raise DataError(f"none of the history's {len(history)} records has a finite 'nll' or 'validation': train first")
    rows = 3 if curves["disagreement"][1].any() else 2
    figure = new_figure(10, 2.0 * rows + 0.6)
    grid = figure.add_gridspec(rows, 2, width_ratios=(1.6, 1))
    main = figure.add_subplot(grid[:, 0])
    _likelihood_panel(main, curves["nll"], curves["validation"], unit)
    panels = [figure.add_subplot(grid[row, 1], sharex=main) for row in range(rows)]
    _penalty_panel(panels[0], curves["E"], curves["n"])
    panels[1].plot(*curves["nfe"], color=GREY, lw=1.2)
    panels[1].set(ylabel="evaluations of f\nper sample (forward)")
    panels[1].set_ylim(0, 1.15 * max(curves["nfe"][1].max(initial=0), 1))
    if rows == 3:
        steps, values = curves["disagreement"]
        sizes = np.where(values == 0, np.nan, np.abs(values)) * UNITS[unit]  # zero has no logarithm: a gap
        panels[2].semilogy(steps, sizes, color=GREY, lw=1.2, marker=".")
        panels[2].set(ylabel=f"solver against\nthe accurate one\n({unit})")
    for panel in panels:
        panel.grid(alpha=0.25)
        panel.tick_params(labelbottom=panel is panels[-1])
        panel.locator_params(axis="x", nbins=5)
    panels[-1].set_xlabel("optimiser step")
    figure.align_ylabels(panels)
    return figure


def _curve(history: History, key: str) -> tuple[Array, Array]:
    """Steps and finite values of the records that have `key`."""
    pairs = [(float(r["step"]), float(r[key])) for r in history if r.get(key) is not None]  # type: ignore[arg-type]
    kept = np.array([pair for pair in pairs if math.isfinite(pair[1])], dtype=np.float64).reshape(-1, 2)
    return kept[:, 0], kept[:, 1]


def smooth(values: Array, window: int) -> Array:
    """Lines fitted to `window` values (an odd number) around each: in between, that is their mean.

    Near an end, where a window about the value would leave the curve, it is the line of the last whole window: a window
    that narrows would show the curve's noise there, and a mean that does not would lose its slope.
    """
    if window < 1 or window % 2 == 0:
        raise ConfigError(f"window = {window!r}: expected an odd positive number")
    window = min(window, len(values) - (len(values) + 1) % 2)
    if window < 3:
        return np.array(values, dtype=np.float64)
    half, total = window // 2, np.concatenate([[0.0], np.cumsum(values)])
    smoothed = np.empty(len(values))
    smoothed[half : len(values) - half] = (total[window:] - total[:-window]) / window
    away = np.arange(-half, half + 1)
    for middle, ends in ((half, away[:half]), (len(values) - 1 - half, away[half + 1 :])):
        slope = away @ values[middle - half : middle + half + 1] / (away @ away)
        smoothed[middle + ends] = smoothed[middle] + slope * ends
    return smoothed


def _likelihood_panel(axes: Axes, train: tuple[Array, Array], validation: tuple[Array, Array], unit: str) -> None:
    scale = UNITS[unit]
    steps, raw = train[0], train[1] * scale
    window = 2 * (len(raw) // 100) + 1
    smoothed = smooth(raw, window)
    faint = window > 1
    if faint:
        axes.plot(steps, raw, color=BLUE, lw=0.6, alpha=0.25)
    if len(raw):
        label = f"training (mean of {window})" if faint else "training"
        axes.plot(steps, smoothed, color=BLUE, lw=1.6, label=label)
    shown = np.concatenate([raw, validation[1] * scale])
    if len(validation[0]):
        values = validation[1] * scale
        best = int(values.argmin())
        axes.plot(validation[0], values, color=ORANGE, lw=1.6, marker=".", ms=5, label="validation")
        axes.plot(
            validation[0][best],
            values[best],
            color=ORANGE,
            marker="*",
            ms=14,
            mec="white",
            ls="none",
            zorder=5,
            label=f"best {values[best]:.4g}, step {validation[0][best]:.0f}",
        )
    # The first steps are far above the rest and would flatten it: they may leave the panel.
    low, high = shown.min(), np.quantile(shown, 0.97)
    margin = 0.08 * max(high - low, 1e-3 * abs(high), 1e-9)
    axes.set_ylim(low - margin, high + 2 * margin)
    axes.set(xlabel="optimiser step", ylabel=f"negative log-likelihood ({unit})")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=9, **_TIGHT)


def _penalty_panel(axes: Axes, energy: tuple[Array, Array], jacobian: tuple[Array, Array]) -> None:
    """E and n, each on an axis of its own: they differ by orders of magnitude."""
    other = axes.twinx()
    for panel, (steps, values), colour, label in (
        (axes, energy, BLUE, "kinetic energy\nE per dim"),
        (other, jacobian, GREEN, "Jacobian\nn per dim"),
    ):
        panel.plot(steps, smooth(values, 2 * (len(values) // 100) + 1), color=colour, lw=1.4)
        panel.set_ylabel(label, color=colour)
        panel.tick_params(axis="y", labelcolor=colour)
        panel.set_ylim(bottom=0)
        panel.margins(y=0.1)


# --- images ---


def image_grid(images: Tensor, *, levels: int, rows: int | None = None) -> Figure:
    """Images side by side, each of their pixels a sharp square.

    Args:
        images: ``(n, C, H, W)``, one channel (grey) or three (RGB); integers or floating-point in ``[0, levels−1]``.
        levels: Number of levels; ``levels − 1`` is white.
        rows: Rows of the grid; default about as many as columns.

    Raises:
        DataError: Wrong shape or values.
        ConfigError: `levels` or `rows` does not fit.
    """
    picture = tile(images, levels=levels, rows=rows)
    height, width = picture.shape[:2]
    figure = new_figure(width / DPI, height / DPI)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))  # one pixel of the picture is one of the PNG
    axes.imshow(picture, interpolation="nearest")
    axes.set_axis_off()
    return figure


def save_image_grid(images: Tensor, path: str | Path, *, levels: int, rows: int | None = None) -> None:
    """Writes the grid of `image_grid` straight to a PNG; small images are enlarged by a whole factor.

    Raises:
        DataError: Wrong shape or values.
        ConfigError: `levels`, `rows` or the file's name does not fit.
        CheckpointError: The file cannot be written.
    """
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(tile(images, levels=levels, rows=rows)).save(buffer, "PNG")
    write_atomically(_picture(path, ".png"), buffer.getvalue())


def tile(images: Tensor, *, levels: int, rows: int | None = None) -> Array:
    """The grid of `image_grid` as pixels, ``(height, width, 3)`` uint8; arguments and errors as there."""
    from torchvision.utils import make_grid

    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise DataError(f"images of shape {tuple(images.shape)}: expected (n, C, H, W) with 1 or 3 channels")
    if levels < 2:
        raise ConfigError(f"levels = {levels!r}: expected at least 2")
    n, _, height, width = images.shape
    rows = max(1, math.isqrt(n)) if rows is None else rows
    if not 1 <= rows <= n:
        raise ConfigError(f"rows = {rows!r}: expected 1 to {n}, the number of images")
    values = images.detach().cpu().to(torch.float64)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= levels - 1):  # NaN fails too
        raise DataError(f"image values {low:g} to {high:g}: expected 0 to {levels - 1} (levels = {levels})")
    pixels = (values * (255 / (levels - 1))).round().to(torch.uint8)
    factor = math.ceil(_MIN_CELL / max(height, width))
    pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    tiled = make_grid(pixels, nrow=math.ceil(n / rows), padding=_GAP, pad_value=255)
    return np.ascontiguousarray(tiled.permute(1, 2, 0).numpy())


# --- densities ---


def density_2d(
    log_prob: LogProb,
    bounds: tuple[float, ...],
    *,
    truth: LogProb | None = None,
    samples: Tensor | None = None,
    title: str = "",
    resolution: int = 120,
) -> Figure:
    """A learned density in the plane, beside the truth (on one colour scale) and its samples.

    Args:
        log_prob: The learned log-density in nats, ``(n,)`` of ``(n, 2)``.
        bounds: Window ``(xmin, xmax, ymin, ymax)``.
        truth: The true log-density.
        samples: Samples of the learned density, ``(n, 2)``.
        title: Title of the picture.
        resolution: Cells along each side of the window.

    Raises:
        ConfigError: The window is empty.
        DataError: A density is NaN or of the wrong shape, or the samples are not ``(n, 2)``.
    """
    x, y = (_centres(low, high, resolution) for low, high in _window(bounds, 2))
    points = torch.cartesian_prod(y, x).flip(1)  # rows of the picture are y
    shape = (resolution, resolution)
    learned = _density(log_prob, points, "learned").reshape(shape)
    panels = {"learned": learned}
    if truth is not None:
        panels = {"true": _density(truth, points, "true").reshape(shape), **panels}
    top = float(panels.get("true", learned).max()) or 1.0  # by the truth: a learned spike does not darken both
    count = len(panels) + (samples is not None)
    figure = new_figure(3.4 * count + 1.0, 4.4 if title else 4.1)
    figure.set_layout_engine("compressed")  # as constrained, for axes of fixed aspect
    axes = figure.subplots(1, count, squeeze=False, sharex=True, sharey=True)[0]
    for panel, (name, density) in zip(axes, panels.items(), strict=False):
        image = panel.imshow(density, origin="lower", extent=bounds, cmap="viridis", vmin=0, vmax=top)
        panel.set_title(f"{name} density")
    if samples is not None:
        _scatter(axes[-1], _points(samples, 2), bounds)
    for panel in axes:
        panel.set(xlabel="$x_1$", xlim=bounds[:2], ylim=bounds[2:], aspect="equal")
    axes[0].set_ylabel("$x_2$")
    over = "max" if learned.max() > top * (1 + 1e-6) else "neither"
    figure.colorbar(image, ax=list(axes), label="density $p(x)$", extend=over, aspect=30, pad=0.015)
    if title:
        figure.suptitle(title, fontweight="bold")
    return figure


def _scatter(axes: Axes, points: Array, bounds: tuple[float, ...]) -> None:
    alpha = min(1.0, max(0.15, 500 / len(points)))
    axes.scatter(points[:, 0], points[:, 1], s=3, color=BLUE, alpha=alpha, linewidths=0)
    xmin, xmax, ymin, ymax = bounds
    inside = (points >= (xmin, ymin)).all(1) & (points <= (xmax, ymax)).all(1)
    beyond = len(points) - int(inside.sum())
    axes.set_title(f"{len(points)} samples" + (f", {beyond} outside" if beyond else ""))


def density_1d(
    log_prob: LogProb,
    bounds: tuple[float, ...],
    *,
    truth: LogProb | None = None,
    samples: Tensor | None = None,
    title: str = "",
    resolution: int = 400,
) -> Figure:
    """A learned density on the line, over the truth and a histogram of its samples.

    Args:
        log_prob: The learned log-density in nats, ``(n,)`` of ``(n, 1)``.
        bounds: Window ``(xmin, xmax)``.
        truth: The true log-density.
        samples: Samples of the learned density, ``(n, 1)``.
        title: Title of the picture.
        resolution: Points along the window.

    Raises:
        ConfigError: The window is empty.
        DataError: A density is NaN or of the wrong shape, or the samples are not ``(n, 1)``.
    """
    ((low, high),) = _window(bounds, 1)
    x = _centres(low, high, resolution)
    learned = _density(log_prob, x[:, None], "learned")
    peak = learned.max()
    figure = new_figure(6.4, 4)
    axes = figure.add_subplot()
    if samples is not None:
        points = _points(samples, 1)[:, 0]
        counts, edges = np.histogram(points, bins=60, range=(low, high))
        heights = counts / (len(points) * np.diff(edges))
        peak = max(peak, heights.max())
        axes.stairs(heights, edges, fill=True, color=BLUE, alpha=0.2, label=f"{len(points)} samples")
    if truth is not None:
        density = _density(truth, x[:, None], "true")
        peak = max(peak, density.max())
        axes.plot(x, density, color="black", lw=3, alpha=0.35, label="true")
    axes.plot(x, learned, color=ORANGE, lw=1.6, label="learned")
    axes.set(xlabel="$x$", ylabel="density $p(x)$", xlim=(low, high), ylim=(0, 1.3 * peak or 1.0), title=title)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper center", ncols=3, framealpha=0.9)
    return figure


def _window(bounds: tuple[float, ...], d: int) -> list[tuple[float, float]]:
    sides = list(zip(bounds[::2], bounds[1::2], strict=False))
    if len(bounds) != 2 * d or not all(math.isfinite(high - low) and low < high for low, high in sides):
        names = "(xmin, xmax)" if d == 1 else "(xmin, xmax, ymin, ymax)"
        raise ConfigError(f"bounds = {tuple(bounds)!r}: expected finite {names}, each minimum below its maximum")
    return sides


def _centres(low: float, high: float, count: int) -> Tensor:
    """Middles of `count` equal cells of ``[low, high]``."""
    if count < 2:
        raise ConfigError(f"resolution = {count!r}: expected at least 2")
    return low + (torch.arange(count, dtype=torch.float32, device="cpu") + 0.5) * ((high - low) / count)


def _points(samples: Tensor, d: int) -> Array:
    if samples.ndim != 2 or samples.shape[1] != d or not len(samples):
        raise DataError(f"samples of shape {tuple(samples.shape)}: expected (n, {d}), n at least 1")
    return np.asarray(samples.detach().cpu().to(torch.float64))


def _density(log_prob: LogProb, points: Tensor, name: str) -> Array:
    """``p`` at points ``(n, d)``, ``(n,)``."""
    with torch.no_grad():
        values = log_prob(points).detach().cpu().to(torch.float64)
    if values.shape != points.shape[:1]:
        raise DataError(f"the {name} log-density has shape {tuple(values.shape)}: expected ({len(points)},)")
    if bool((values.isnan() | (values == math.inf)).any()):
        bad = int((values.isnan() | (values == math.inf)).nonzero()[0])
        raise DataError(f"the {name} log-density is {float(values[bad])} at x = {points[bad].tolist()}")
    return np.asarray(values.exp())
