"""Figure 1: the particles of a regularised flow go straight and at constant speed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrnode import evaluation, particles, plotting, solvers
from pyrnode.flow import Flow
from pyrnode.paper.experiment import Experiment
from pyrnode.paper.report import Claim, Finding, Row
from pyrnode.paper.scales import COLOURS, Scale
from pyrnode.paper.study import Need, Run, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = "two-bumps"
METHODS = {"rnode": "regularised", "none": "unregularised"}
PARTICLES, TIMES = 200, 65


def _needs(scale: Scale) -> list[Need]:
    return [Need(DATA, method) for method in METHODS]


def speed_change(times: Tensor, states: Tensor) -> float:
    """Mean over particles of ``1/T ∫ (d‖v‖/dt)² dt``, by differences.

    Args:
        times: Evenly spaced times ``(points,)``.
        states: ``(points, n, d)`` at those times.
    """
    h = float(times[1] - times[0])
    speeds = (states[1:] - states[:-1]).double().norm(dim=2) / h
    return float(((speeds[1:] - speeds[:-1]) / h).square().mean())


def _measure(study: Study) -> Finding:
    runs = {method: study.run(Need(DATA, method)) for method in METHODS}
    x = study.splits(runs["rnode"].config).test.tensor()
    chosen = x[:PARTICLES].sort(0).values
    rows: list[Row] = []
    paths: dict[str, tuple[Tensor, Tensor]] = {}
    curves: list[Row] = []
    for method, run in runs.items():
        times, states = paths[method] = particles.particle_paths(run.flow, chosen, TIMES)
        found = evaluation.measure(run.flow, x, world=study.world)
        rows.append(
            {
                "flow": METHODS[method],
                "squared change of speed": speed_change(times, states),
                "variation of speed": particles.speed_variation(states),
                "nats": found.score.nats,
                "E": found.E,
                "n": found.n,
                "nfe": found.nfe,
            }
        )
        for time, state in zip(times.tolist(), states[..., 0], strict=True):
            curves += [{"flow": METHODS[method], "particle": i, "t": time, "z": float(z)} for i, z in enumerate(state)]
    changes = [float(row["squared change of speed"]) for row in rows]
    nats = [float(row["nats"]) for row in rows]
    kinetic, jacobian, _ = runs["rnode"].config.penalties.weights
    solver = solvers.describe(runs["rnode"].config.solver)
    return Finding(
        name=EXPERIMENT.name,
        title=EXPERIMENT.title,
        claims=[
            Claim(
                "Regularised trajectories are straight lines at constant speed; unregularised ones fluctuate.",
                "",
                f"mean squared change of speed {changes[0]:.3g} against {changes[1]:.3g}",
                "holds" if changes[0] < changes[1] else "does not hold",
            ),
            Claim(
                "Both flows fit the same density.",
                "",
                f"{nats[0]:.4f} and {nats[1]:.4f} nats; the truth: {-_entropy(study, runs['rnode']):.4f}",
                "holds" if abs(nats[0] - nats[1]) < 0.02 else "does not hold",
                "The scores are on the same test samples; 0.02 nats apart counts as the same.",
            ),
        ],
        numbers={f"{key} {METHODS[m]}": float(r[key]) for m, r in zip(METHODS, rows, strict=True) for key in _KEYS},
        tables={"fig1": rows, "paths": curves},
        shown="fig1",
        figures={"fig1": draw(runs, paths, METHODS)},
        remarks=[
            f"Both flows have the same network, solver ({solver}), learning rate, batches and seed; they "
            f"differ in the penalties alone (λ_K = {kinetic:g}, λ_J = {jacobian:g} against 0).",
            f"Speeds along {PARTICLES} paths at {TIMES} times, solved with DP5 at 1e-5, in standardised units.",
        ],
        configs={run.need.name: run.config for run in runs.values()},
    )


_KEYS = ("squared change of speed", "nats", "E", "n", "nfe")


def _entropy(study: Study, run: Run) -> float:
    density = study.splits(run.config).density
    assert density is not None
    return density.entropy()


def draw(runs: Mapping[str, Run], paths: Mapping[str, tuple[Tensor, Tensor]], labels: Mapping[str, str]) -> Figure:
    """For each flow of one dimension: learned density, trajectories, base."""
    figure = plotting.new_figure(9, 3.2 * len(labels))
    grid = figure.subplots(len(labels), 3, width_ratios=(1, 4, 1), sharey=True)
    for row, (method, label) in zip(grid, labels.items(), strict=True):
        times, states = paths[method]
        flow, limit = runs[method].flow, float(states.abs().max()) * 1.05
        z = torch.linspace(-limit, limit, 301, dtype=torch.float32, device="cpu")
        row[0].fill_betweenx(z, _pulled_back(flow, z), color=COLOURS[method], alpha=0.35, lw=0)
        row[0].invert_xaxis()
        row[2].fill_betweenx(z, torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi), color="0.6", lw=0)
        row[1].plot(times, states[:, :: max(1, PARTICLES // 40), 0], color=COLOURS[method], lw=0.8, alpha=0.7)
        row[1].set(title=label, xlim=(float(times[0]), float(times[-1])), ylim=(-limit, limit))
        row[0].set(ylabel="$z$")
        for side in (row[0], row[2]):
            side.set_xticks([])
    grid[0, 0].set_title("learned density")
    grid[0, 2].set_title("base")
    grid[-1, 1].set_xlabel("time $t$")
    return figure


@torch.no_grad()
def _pulled_back(flow: Flow, z: Tensor) -> Tensor:
    """The flow's density in its own (standardised) space, where the paths are."""
    x: Any = flow.transform.inverse(z[:, None])
    _, log_det = flow.transform(x, torch.Generator().manual_seed(0))
    density: Tensor = (flow.log_prob(x) - log_det).exp()
    return density


EXPERIMENT = Experiment("fig1", "trajectories of a one-dimensional flow, with and without penalties", _needs, _measure)
