"""Particles on their way from the data to the base: followed, measured, and drawn.

How straight the paths are, and how constant the speed, is what the penalties are for (figure 1 of the paper).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyrnode.errors import ConfigError, DataError
from pyrnode.flow import Flow
from pyrnode.plotting import BLUE, GREY, ORANGE, Array, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@torch.no_grad()
def particle_paths(flow: Flow, x: Tensor, points: int = 33) -> tuple[Tensor, Tensor]:
    """Where particles are on their way from the data (time 0) to the base.

    The blocks follow one another in time; the states are those of the flow's own space, after its transform.

    Args:
        flow: A flow on vectors.
        x: Data, ``(n, d)``.
        points: Number of times, evenly spaced; the first and the last one are the ends.

    Returns:
        Times ``(points,)`` and states ``(points, n, d)``.

    Raises:
        ConfigError: Fewer than two points.
        DataError: The flow is on images, or `x` does not fit it.
        SolverError: A solve failed.
    """
    if points < 2:
        raise ConfigError(f"points = {points!r}: expected at least 2")
    if len(flow.event_shape) != 1:
        raise DataError(f"a flow on images {flow.event_shape}: paths are followed for vectors (d,) only")
    z = flow.transformed(flow.admit(x)[0], torch.Generator().manual_seed(0))[0]
    if not len(z):
        raise DataError(f"x of shape {tuple(x.shape)}: expected at least one particle")
    lengths, solver = [block.end_time for block in flow.blocks], flow.solver.computing_in("ieee")
    starts = [math.fsum(lengths[:i]) for i in range(len(lengths))]
    times = torch.linspace(0, math.fsum(lengths), points, dtype=torch.float64, device="cpu")
    states, block, now = [z], 0, 0.0
    for time in times[1:].tolist():
        while True:
            span = (now - starts[block], min(time - starts[block], lengths[block]))
            if span[1] - span[0] > 1e-9 * lengths[block]:
                solution = flow.engine.integrate(flow.blocks[block].dynamics, z, None, span, solver)
                if solution.verify is not None:
                    solution.verify()
                z = solution.z
                now = starts[block] + span[1]
            if block + 1 == len(lengths) or time <= starts[block + 1] * (1 + 1e-12):
                break
            block, now = block + 1, starts[block + 1]
        states.append(z)
    return times, torch.stack(states)


def _segments(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lengths of the segments ``(points−1, n)``, distances from end to end ``(n,)``, and which particles move."""
    if states.ndim != 3 or len(states) < 2 or 0 in states.shape:
        raise DataError(f"states of shape {tuple(states.shape)}: expected (points, n, d), at least two points")
    rounding = len(states) * torch.finfo(states.dtype).eps * states.abs().amax((0, 2)).double()
    z = states.detach().double()
    lengths = (z[1:] - z[:-1]).norm(dim=2)
    return lengths, (z[-1] - z[0]).norm(dim=1), lengths.sum(0) > rounding


def straightness(states: Tensor) -> float:
    """Length of a path over the distance between its ends, mean over the particles: 1 is straight.

    The few particles that come back to where they started can dominate the mean.

    Args:
        states: ``(points, n, d)``; a particle that does not move counts as straight.
    """
    return float(detours(states).mean())


def detours(states: Tensor) -> Tensor:
    """Length of each particle's path over the distance between its ends, ``(n,)``: what `straightness` is the mean of.

    Args:
        states: ``(points, n, d)``; a particle that does not move counts as straight.

    Raises:
        DataError: The states are of another shape.
    """
    lengths, distance, moves = _segments(states)
    return torch.where(moves, lengths.sum(0) / distance, 1.0)


def speed_variation(states: Tensor) -> float:
    """Standard deviation over mean of a particle's speed along its path, mean over the particles: 0 is constant.

    Args:
        states: ``(points, n, d)`` at evenly spaced times; a particle that does not move counts as 0.
    """
    lengths, _, moves = _segments(states)
    return float(torch.where(moves, lengths.std(0, correction=0) / lengths.mean(0), 0.0).mean())


def trajectories(flow: Flow, x: Tensor, *, points: int = 33) -> Figure:
    """Paths of particles from the data to the base, in the flow's own space: over time (d = 1) or in the plane (d = 2).

    Args:
        flow: A flow on vectors of one or two dimensions.
        x: Data, ``(n, d)``: one particle each.
        points: Number of times along a path.

    Raises:
        ConfigError: Fewer than two points.
        DataError: The flow has more dimensions, or `x` does not fit it.
        SolverError: A solve failed.
    """
    if flow.event_shape not in ((1,), (2,)):
        raise DataError(f"a flow of event shape {flow.event_shape}: trajectories are drawn for (1,) or (2,)")
    times, states = particle_paths(flow, x, points)
    z = np.asarray(states.cpu().double())
    figure = new_figure(6.2, 4.6) if flow.dim == 1 else new_figure(6.2, 6.4)
    axes = figure.add_subplot()
    if flow.dim == 1:
        _paths_over_time(axes, np.asarray(times), z[..., 0], [block.end_time for block in flow.blocks])
    else:
        draw_in_plane(axes, z)
        axes.set(xlabel="$z_1$", ylabel="$z_2$")
        axes.set_aspect("equal", adjustable="datalim")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False)
    ratio, variation = float(detours(states).quantile(0.5)), speed_variation(states)
    axes.set_title(f"path length / distance {ratio:.3f} (median), speed varies by {100 * variation:.0f} %", fontsize=11)
    return figure


def _paths_over_time(axes: Axes, times: Array, z: Array, lengths: list[float]) -> None:
    from matplotlib import colormaps

    order = np.argsort(np.argsort(z[0])) / max(z.shape[1] - 1, 1)
    for path, rank in zip(z.T, order, strict=True):
        axes.plot(times, path, color=colormaps["viridis"](0.95 * rank), lw=0.9, alpha=0.8)
    for border in np.cumsum(lengths)[:-1]:
        axes.axvline(border, color=GREY, lw=0.8, ls=":")
    axes.set(xlabel="time $t$ (data at the left, base at the right)", ylabel="position $z(t)$")
    axes.set_xlim(times[0], times[-1])


def draw_in_plane(axes: Axes, z: Array) -> None:
    """Draws paths ``(points, n, 2)`` with their ends; the axes' limits, scale and legend are the caller's."""
    axes.plot(z[..., 0], z[..., 1], color=GREY, lw=0.7, alpha=0.55, zorder=1)
    for state, colour, label in ((z[0], BLUE, "start (data)"), (z[-1], ORANGE, "end (base)")):
        axes.scatter(state[:, 0], state[:, 1], s=14, color=colour, linewidths=0, zorder=2, label=label)
