"""How far solvers of fixed steps are from the accurate one, by their step: which of them a flow can be solved with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from pyrnode import evaluation, solvers
from pyrnode.config import SolverConfig
from pyrnode.errors import ConfigError, DataError, SolverError, unknown_name
from pyrnode.flow import Flow
from pyrnode.plotting import BLUE, GREEN, GREY, ORANGE, UNITS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SOLVERS = ("Euler", "Midpoint", "RK4", "DP5")
"""Orders 1, 2, 4 and 5."""

_STEPS = (1.0, 0.5, 0.25, 0.125)
_LOOKS = ((BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, "-.", "^"), ("black", ":", "D"), (GREY, "-", "v"))


@dataclass(frozen=True)
class Disagreement:
    """How far a solver is from the accurate one.

    Attributes:
        solver: Its name.
        step: Its step.
        nfe: Evaluations of the dynamics per sample, all blocks together; `None` where it failed.
        nats: Mean ``|Δ log p|``, nats per dimension; `None` where it failed.
        trained: Whether training used it.
    """

    solver: str
    step: float
    nfe: float | None
    nats: float | None
    trained: bool = False


def disagreement_by_step(
    flow: Flow,
    x: Tensor,
    *,
    context: Tensor | None = None,
    names: Sequence[str] = SOLVERS,
    steps: Sequence[float] = _STEPS,
    seed: int = 0,
) -> list[Disagreement]:
    """Scores samples with solvers of fixed steps, and with the accurate one on the same noise.

    The training solver comes last, where it has a fixed step.

    Args:
        flow: The flow; `flow.solver` is the accurate solver.
        x: Samples, ``(n, *event)``, integers for discrete data.
        context: ``(n, m)``, for conditional flows.
        names: Solvers of the flow's engine; adaptive ones take fixed steps.
        steps: Steps, as shares of a block's time: 1 is a single step.
        seed: Seed of the noise.

    Raises:
        ConfigError: A step is not in ``(0, 1]``.
        EngineUnavailableError: The engine has no such solver.
        DataError: `x` does not fit the flow.
        SolverError: The accurate solve failed.
    """
    for share in steps:
        if not 0 < share <= 1:
            raise ConfigError(f"steps = {tuple(steps)!r}: expected shares of a block's time, above 0 and at most 1")
    config, trained = replace(flow.config.evaluation, divergence=flow.divergence, draws=1), flow.config.solver
    accurate = evaluation.measure(flow, x, flow.solver, context=context, config=config, seed=seed)

    def compared(solver: SolverConfig, *, trained: bool = False) -> Disagreement:
        name, step = solver.name, float(solver.step_size)
        flow.engine.check(solver)
        try:
            found = evaluation.measure(flow, x, solver, context=context, config=config, seed=seed)
        except SolverError:
            return Disagreement(name, step, None, None, trained)
        off = float((found.log_prob - accurate.log_prob).abs().mean()) / flow.dim
        return Disagreement(name, step, found.nfe, off, trained)

    fixed = replace(flow.solver, adaptive=False, options={})
    end = flow.config.flow.end_time
    rows = [compared(replace(fixed, name=name, step_size=end * share)) for name in names for share in steps]
    if solvers.fixed(trained) and trained.step_size != "auto":
        rows.append(compared(trained, trained=True))
    return rows


def disagreement_plot(rows: Sequence[Disagreement], *, unit: str = "nats/dim", tolerance: float = 0.01) -> Figure:
    """What `disagreement_by_step` found, over the step; a solver of order p falls by 2^p where its step is halved.

    Args:
        rows: What was found; solves that failed and differences of 0, which have no logarithm, are left out.
        unit: ``"nats/dim"`` or ``"bits/dim"``.
        tolerance: A line below which training holds a solver for right, nats per dimension.

    Raises:
        ConfigError: The unit is unknown.
        DataError: There is nothing to draw.
    """
    if unit not in UNITS:
        raise ConfigError(unknown_name("unit", unit, UNITS))
    drawn = [(row, row.nats * UNITS[unit]) for row in rows if row.nats]
    if not drawn:
        raise DataError(f"none of {len(rows)} solvers has a difference to the accurate one that is not 0")
    figure = new_figure(6.4, 4.2)
    axes = figure.add_subplot()
    names = list(dict.fromkeys(row.solver for row in rows if not row.trained))
    for name, (colour, style, marker) in zip(names, _LOOKS * len(names), strict=False):
        points = [(row.step, value) for row, value in drawn if row.solver == name and not row.trained]
        failed = sum(row.nats is None for row in rows if row.solver == name and not row.trained)
        label = name + (f" ({failed} failed)" if failed else "")
        look = {"color": colour, "linestyle": style, "marker": marker}
        axes.loglog([x for x, _ in points], [y for _, y in points], ms=5, lw=1.4, label=label, **look)
    for row, value in drawn:
        if row.trained:
            label = f"training: {row.solver}, step {row.step:g}"
            axes.loglog(
                [row.step], [value], marker="*", ms=15, color=GREY, mec="black", ls="none", label=label, zorder=5
            )
    axes.axhline(tolerance * UNITS[unit], color=GREY, lw=1, ls=":", label="tolerance of training")
    steps = sorted({row.step for row in rows})
    axes.set(xlabel="step", ylabel=f"from the accurate solver ({unit})")
    axes.set_xticks(steps, [f"{step:g}" for step in steps])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure
