"""What a run's folder says of its evaluation: the report, as text and as JSON, and the pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrnode import agreement, comparisons, files, particles, plotting, solvers
from pyrnode.data import Splits
from pyrnode.data.frames import said
from pyrnode.evaluation import Report, extra
from pyrnode.flow import Flow
from pyrnode.runs import Record, RunFolder

_CALIBRATED, _SOLVED = 2000, 64
"""Held-out samples that the pictures of calibration and of solvers are made from, at most."""


def write_report(folder: RunFolder, flow: Flow, splits: Splits, report: Report, history: list[Record]) -> None:
    """Writes ``report.json``, ``report.txt`` and the pictures of a run; what cannot be drawn becomes a note.

    Raises:
        CheckpointError: The report cannot be written.
    """
    shape = splits.event_shape
    if history:
        with extra("the learning curves", report.notes):
            _draw_curves(folder, splits, history)
    if splits.levels is not None and len(shape) == 3 and shape[0] in (1, 3):
        with extra("the picture of samples", report.notes):
            _draw_samples(folder, flow, splits)
    elif splits.levels is None and shape in ((1,), (2,)) and not splits.context_dim:
        with extra("the pictures of the density", report.notes):
            _draw_density(folder, flow, splits)
    elif splits.levels is None and len(shape) == 1 and not splits.context_dim:
        with extra("the pair plot", report.notes):
            _draw_pairs(folder, flow, splits)
    if splits.levels is None and len(shape) == 1:
        with extra("the calibration plot", report.notes):
            _draw_calibration(folder, flow, splits)
    with extra("the picture of solvers", report.notes):
        _draw_solvers(folder, flow, splits)
    folder.write_text("report.json", files.to_json(report.to_dict(), indent=2) + "\n")
    folder.write_text("report.txt", f"{report}\n")


def _unit(splits: Splits) -> str:
    return "bits/dim" if splits.levels is not None else "nats/dim"


def _draw_curves(folder: RunFolder, splits: Splits, history: list[Record]) -> None:
    plotting.save(plotting.learning_curves(history, unit=_unit(splits)), folder.path / "curves.png")


def _draw_samples(folder: RunFolder, flow: Flow, splits: Splits) -> None:
    assert splits.levels is not None
    grid, seed = flow.config.evaluation.grid, flow.config.seed
    if splits.test.context is None:
        samples = flow.sample(grid, seed=seed)
    else:
        samples = flow.sample(1, splits.test.context[:grid], seed=seed)[:, 0]
    plotting.save_image_grid(samples, folder.path / "samples.png", levels=splits.levels)


@torch.no_grad()
def _draw_density(folder: RunFolder, flow: Flow, splits: Splits) -> None:
    """Pictures of a continuous density in one or two dimensions, beside the truth where it is known."""
    x, density = splits.test.tensor(), splits.density
    truth = density.log_prob if density is not None and density.exact else None
    if splits.event_shape == (2,):
        samples = flow.sample(2000, seed=flow.config.seed)
        bounds = density.bounds if density is not None else _window(x, samples)
        figure = plotting.density_2d(flow.log_prob, bounds, truth=truth, samples=samples, title=splits.name)
    else:
        bounds = density.bounds if density is not None else _window(x, flow.sample(2000, seed=flow.config.seed))
        figure = plotting.density_1d(flow.log_prob, bounds, truth=truth, title=splits.name)
    plotting.save(figure, folder.path / "density.png")
    plotting.save(particles.trajectories(flow, x[:100]), folder.path / "trajectories.png")


@torch.no_grad()
def _draw_pairs(folder: RunFolder, flow: Flow, splits: Splits) -> None:
    """Held-out rows of a wider table against as many samples, 2000 at most."""
    x = splits.test.tensor()[:2000]
    figure = comparisons.pair_plot(
        x, flow.sample(len(x), seed=flow.config.seed), names=said(splits.features), title=splits.name
    )
    plotting.save(figure, folder.path / "pairs.png")


@torch.no_grad()
def _draw_calibration(folder: RunFolder, flow: Flow, splits: Splits) -> None:
    """PIT values of held-out rows, 2000 at most: of the first latents, and of the squared length of all of them."""
    rows = splits.test.first(_CALIBRATED)
    z = flow.encode(rows.x, rows.context).cpu().double()
    shown = min(flow.dim, comparisons.MOST)
    pit, names = torch.special.ndtr(z[:, :shown]), [f"$z_{{{i}}}$" for i in range(1, shown + 1)]
    if flow.dim > 1:
        length = torch.special.gammainc(z.new_tensor(flow.dim / 2), z.square().sum(1) / 2)  # the χ² distribution
        pit, names = torch.cat([pit, length[:, None]], 1), [*names, "$|z|^2$"]
    plotting.save(comparisons.calibration_plot(pit, names=names), folder.path / "calibration.png")


def _draw_solvers(folder: RunFolder, flow: Flow, splits: Splits) -> None:
    """How far solvers of fixed steps are from the accurate one on a few held-out samples.

    Of Julia's solvers the training solver alone: each other one would be compiled first, which takes its time.
    """
    rows, trained = splits.test.first(_SOLVED), flow.config.solver
    names = agreement.SOLVERS if flow.engine.name == "torch" else (trained.name,) * solvers.fixed(trained)
    found = agreement.disagreement_by_step(flow, rows.x, context=rows.context, names=names, seed=flow.config.seed)
    if all(row.nats == 0 for row in found):
        return  # nothing moves, and there is nothing to see
    tolerance = flow.config.training.tolerance
    figure = agreement.disagreement_plot(found, unit=_unit(splits), tolerance=tolerance)
    plotting.save(figure, folder.path / "solvers.png")


def _window(x: Tensor, samples: Tensor) -> tuple[float, ...]:
    """``(min, max)`` of each column of held-out rows, with a margin; of too few rows to say, of the flow's samples too.

    In the plane the outermost thousandths are left out; on the line everything is seen.
    """
    if bool((x.amin(0) == x.amax(0)).any()):
        x = torch.cat([x, samples.to(x)])
    out, margin = (0.001, 0.1) if x.shape[1] == 2 else (0.0, 0.0)
    low, high = x.quantile(out, 0), x.quantile(1 - out, 0)
    low, high = low - margin * (high - low), high + margin * (high - low)
    return tuple(torch.stack([low, high], 1).flatten().tolist())
