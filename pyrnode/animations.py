"""A flow in motion: particles on their way from the base to the data, and the density that they have, as GIF or MP4."""

from __future__ import annotations

import importlib
import math
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyrnode.composition import base_log_prob
from pyrnode.engines.base import verify
from pyrnode.errors import CheckpointError, ConfigError, DataError
from pyrnode.files import write_atomically
from pyrnode.flow import Flow
from pyrnode.particles import particle_paths
from pyrnode.plotting import BLUE, GREY, ORANGE, Array, new_figure
from pyrnode.probes import Probes
from pyrnode.progress import SECONDS, progress_bar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Show = Callable[[int, Array], None]
"""Draws the paths up to a time's index, and the density there on the grid's points, ``(points,)``."""

SUFFIXES = (".gif", ".mp4")
"""What an animation's file may end in."""

_DPI = 100
_RATE = 12  # frames a second
_HELD = 12  # further frames for which the end stands still


def animate(
    flow: Flow, x: Tensor, path: str | Path, *, frames: int = 41, resolution: int = 80, progress: bool = False
) -> None:
    """Writes an animation from the base (t = T) to the data (t = 0), in the flow's own space, as `trajectories` is.

    On the left the density of the particles at time t, of the plane over its largest value then; on the right the
    particles, and the paths that they have come.

    Args:
        flow: An unconditional flow on vectors of one or two dimensions.
        x: Data or samples, ``(n, d)``: one particle each.
        path: File to write, atomically: ``.gif``, or ``.mp4`` where the program ffmpeg or the package
            imageio-ffmpeg is.
        frames: Times, evenly spaced from T to 0; twelve are shown a second.
        resolution: Cells of the density along each side; for each frame one solve is made of all.
        progress: Show a progress bar, if it takes more than two seconds.

    Raises:
        ConfigError: The name ends otherwise, or in ``.mp4`` and there is no ffmpeg; fewer than two frames or cells.
        DataError: The flow is conditional or has more dimensions, or `x` does not fit it.
        SolverError: A solve failed.
        CheckpointError: The file cannot be written.
    """
    path = Path(path)
    check_animation(flow, path)
    if resolution < 2:
        raise ConfigError(f"resolution = {resolution!r}: expected at least 2")
    times, states = particle_paths(flow, x, frames)
    z = np.asarray(states.cpu().double())
    sides = _sides(z, resolution)
    points = torch.cartesian_prod(*map(torch.as_tensor, sides[::-1])).reshape(-1, flow.dim).flip(1).to(flow.reference)
    figure, show = (_line if flow.dim == 1 else _plane)(np.asarray(times), z, sides)
    with (
        tempfile.TemporaryDirectory() as folder,
        progress_bar(frames, "animate", unit="frame", show=progress, delay=SECONDS) as bar,
    ):
        made = Path(folder) / f"animation{path.suffix.lower()}"
        show(frames - 1, np.ones(len(points)))
        with _grabbing(figure, made) as grab:
            for index in reversed(range(frames)):
                show(index, np.asarray(log_density_at(flow, points, float(times[index])).double().exp().cpu()))
                for _ in range(1 if index else 1 + _HELD):
                    grab()
                bar.update()
        write_atomically(path, made.read_bytes())


def check_animation(flow: Flow, path: Path) -> None:
    """Raises the errors of `animate` that can be told before anything is computed."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"path = {str(path)!r}: end the animation's name in {' or '.join(SUFFIXES)}")
    if path.suffix.lower() == ".mp4" and ffmpeg() is None:
        raise ConfigError(
            f"path = {str(path)!r}: an MP4 is written by the program ffmpeg, and there is none on the path; install it "
            "(pip install imageio-ffmpeg; Debian: apt install ffmpeg; conda: conda install ffmpeg), or end the name in "
            ".gif, which needs nothing"
        )
    if flow.context_dim:
        raise DataError("a conditional flow: animations are drawn of flows without a context")
    if flow.event_shape not in ((1,), (2,)):
        raise DataError(f"a flow of event shape {flow.event_shape}: animations are drawn for (1,) or (2,)")


@torch.no_grad()
def log_density_at(flow: Flow, z: Tensor, time: float) -> Tensor:
    """Log-density of the particles at a time of their way, in the flow's own space: what training makes of a normal.

    Args:
        flow: An unconditional flow on vectors.
        z: States, ``(n, d)``.
        time: From 0, the data, to T, the base, where it is the standard normal; the blocks follow one another.

    Returns:
        Nats, ``(n,)``.

    Raises:
        ConfigError: There is no such time.
        SolverError: A solve failed.
    """
    lengths = [block.end_time for block in flow.blocks]
    total, solver = math.fsum(lengths), flow.solver.computing_in("ieee")
    if not 0 <= time <= total * (1 + 1e-12):
        raise ConfigError(f"time = {time!r}: expected 0, the data, to {total:g}, the base")
    change, solutions, start = z.new_zeros(len(z)), [], 0.0
    for block, length in zip(flow.blocks, lengths, strict=True):
        begin = max(time - start, 0.0)
        if length - begin > 1e-9 * length:
            solution = flow.engine.integrate(block.dynamics, z, Probes.exact(z), (begin, length), solver)
            solutions.append(solution)
            z, change = solution.z, change + solution.l
        start += length
    verify(solutions)
    return base_log_prob(z) + change


def _sides(z: Array, resolution: int) -> list[Array]:
    """Centres of the cells along each axis of a window, as high as wide, that all paths stay in."""
    low, high = z.min((0, 1)), z.max((0, 1))
    half = 0.56 * float((high - low).max()) or 1.0
    cells = 2 * (np.arange(resolution) + 0.5) / resolution - 1
    return [middle + half * cells for middle in (low + high) / 2]


def _borders(side: Array) -> tuple[float, float]:
    half = (side[1] - side[0]) / 2
    return float(side[0] - half), float(side[-1] + half)


def _plane(times: Array, z: Array, sides: list[Array]) -> tuple[Figure, Show]:
    from matplotlib.collections import LineCollection

    figure = new_figure(9.0, 4.5)
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    (x, y), shape = sides, (len(sides[1]), len(sides[0]))
    extent = (*_borders(x), *_borders(y))
    image = left.imshow(np.zeros(shape), origin="lower", extent=extent, cmap="viridis", vmin=0, vmax=1, aspect="equal")
    figure.colorbar(image, ax=left, label="density over its largest value", aspect=30, pad=0.02)
    right.set(xlim=extent[:2], ylim=extent[2:], aspect="equal", xlabel="$z_1$")
    left.set(xlabel="$z_1$", ylabel="$z_2$")
    paths = right.add_collection(LineCollection([], colors=GREY, linewidths=0.7, alpha=0.55, zorder=1))
    right.scatter(*z[-1].T, s=10, color=ORANGE, linewidths=0, zorder=2, label="start (base)")
    dots = right.scatter(*z[-1].T, s=14, color=BLUE, linewidths=0, zorder=3, label="now")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    title = figure.suptitle("")

    def show(index: int, density: Array) -> None:
        image.set_data(density.reshape(shape) / (density.max() or 1.0))
        paths.set_segments(list(z[index:].swapaxes(0, 1)))
        dots.set_offsets(z[index])
        title.set_text(_told(times, index))

    return figure, show


def _line(times: Array, z: Array, sides: list[Array]) -> tuple[Figure, Show]:
    figure = new_figure(9.0, 4.5)
    left, right = figure.subplots(1, 2, sharey=True)
    (side,) = sides
    (curve,) = left.plot([], [], color=ORANGE, lw=1.6)
    left.set(ylim=_borders(side), xlim=(0, 1.05), xlabel="density over its largest value", ylabel="position $z(t)$")
    right.set(xlim=(times[-1], times[0]), xlabel="time $t$ (base at the left, data at the right)")
    lines = [right.plot([], [], color=GREY, lw=0.9, alpha=0.8)[0] for _ in range(z.shape[1])]
    dots = right.scatter([], [], s=14, color=BLUE, linewidths=0, zorder=3)
    left.grid(alpha=0.25)
    title = figure.suptitle("")

    def show(index: int, density: Array) -> None:
        curve.set_data(density / (density.max() or 1.0), side)
        for line, path in zip(lines, z[index:, :, 0].T, strict=True):
            line.set_data(times[index:], path)
        dots.set_offsets(np.stack([np.full(z.shape[1], times[index]), z[index, :, 0]], 1))
        title.set_text(_told(times, index))

    return figure, show


def _told(times: Array, index: int) -> str:
    end = {0: " (the data)", len(times) - 1: " (the base)"}.get(index, "")
    return f"$t$ = {times[index]:.2f}{end}"


def ffmpeg() -> str | None:
    """The program that MP4s are written by: matplotlib's (``ffmpeg`` on the path), else imageio-ffmpeg's, if any."""
    import matplotlib

    program: str | None = shutil.which(matplotlib.rcParams["animation.ffmpeg_path"])
    if program is None and util.find_spec("imageio_ffmpeg") is not None:
        with suppress(RuntimeError):  # that package without its program
            program = str(importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe())
    return program


def _mp4_writer() -> Any:
    """Matplotlib's writer, with that program, and without a word to its settings, which are everyone's."""
    from matplotlib.animation import FFMpegWriter

    program = ffmpeg()

    class Writer(FFMpegWriter):
        @classmethod
        def bin_path(cls) -> str:
            return str(program)

    return Writer(fps=_RATE, codec="h264")


@contextmanager
def _grabbing(figure: Figure, path: Path) -> Iterator[Callable[[], None]]:
    """Gives what takes the figure as it is for the next frame; the file is whole when the block ends well.

    The layout is found once: it takes as long as drawing, and axes that move by a pixel would flicker.
    """
    from matplotlib.animation import PillowWriter

    if path.suffix == ".gif":
        writer: Any = PillowWriter(fps=_RATE)
    else:
        writer = _mp4_writer()
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    try:
        with writer.saving(figure, str(path), _DPI):
            yield writer.grab_frame
    except (subprocess.CalledProcessError, BrokenPipeError) as error:
        raise CheckpointError(
            f"ffmpeg could not write the MP4 ({error}): it may lack the encoder h264; end the name in .gif instead"
        ) from error
