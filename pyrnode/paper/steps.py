"""The paper's step-size heuristic made visible: which solver is the cheapest that is still right?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyrnode import engines, evaluation, plotting
from pyrnode.config import EvaluationConfig, SolverConfig
from pyrnode.errors import SolverError
from pyrnode.flow import Flow
from pyrnode.paper.experiment import Experiment, tuning_remark
from pyrnode.paper.report import Claim, Finding
from pyrnode.paper.scales import COLOURS, LABELS, Scale
from pyrnode.paper.study import Need, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("none", "rnode")
STEPS = (1.0, 0.5, 0.25, 0.125)
FIXED = ("Euler", "Midpoint", "Heun", "RK4")
ADAPTIVE = ("Tsit5", "DP5")
TOLERANCES = (1e-2, 1e-3, 1e-4)
JULIA = ("Vern7", "VCABM", "ROCK2")
RIGHT = 0.01
"""Up to how many bits per dimension from the accurate solver a score counts as right."""

_CELLS = ("bits/dim", "off by (bits/dim)", "nfe", "seconds", "failed")

_MARKERS = dict(zip((*FIXED, *ADAPTIVE, *JULIA), "v^<osDP*X", strict=False))


def _needs(scale: Scale) -> list[Need]:
    return [Need(scale.images[0], method) for method in METHODS]


def candidates(solver: SolverConfig, engine: str) -> Iterator[SolverConfig]:
    """The solvers to compare, as changes of `solver`."""
    for name in FIXED:
        for step in STEPS:
            yield replace(solver, name=name, step_size=step)
    for name in ADAPTIVE + (JULIA if engine == "julia" else ()):
        for tolerance in TOLERANCES:
            yield replace(solver, name=name, rtol=tolerance, atol=tolerance)


def _label(solver: SolverConfig) -> str:
    if solver.name in FIXED:
        return f"{solver.name}, step {solver.step_size:g}"
    return f"{solver.name}, tolerance {solver.rtol:g}"


def _measure(study: Study) -> Finding:
    data = study.scale.images[0]
    runs = {need.method: study.run(need) for need in _needs(study.scale)}
    rows: list[dict[str, Any]] = []
    engine = ""
    for method, run in runs.items():
        flow, config = run.flow, replace(run.config.evaluation, draws=1)
        engine = engines.choose(run.config.engine, run.config.device)[0]
        x = study.splits(run.config).test.tensor()[: study.scale.stepped]
        accurate = evaluation.measure(flow, x, replace(flow.solver, name="DP5", rtol=1e-6, atol=1e-6), config=config)
        for solver in candidates(flow.solver, engine):
            study.say(f"{LABELS[method]}: {_label(solver)}")
            row = {"flow": "regularised" if method == "rnode" else "not regularised", "solver": _label(solver)}
            rows.append(row | _compared(flow, x, solver, config, accurate) | {"method": method, "name": solver.name})
    cheapest = {m: _cheapest([row for row in rows if row["method"] == m]) for m in METHODS}
    trained = {m: next(r for r in rows if r["method"] == m and r["solver"] == "RK4, step 0.25") for m in METHODS}
    told = {m: "none" if c is None else f"{c['solver']} ({c['nfe']:.0f} evaluations)" for m, c in cheapest.items()}
    nfe = {m: math.inf if c is None else c["nfe"] for m, c in cheapest.items()}
    fewer = nfe["rnode"] < math.inf and nfe["rnode"] <= nfe["none"]
    right = trained["rnode"]["off by (bits/dim)"] <= RIGHT
    return Finding(
        name=EXPERIMENT.name,
        title=f"{EXPERIMENT.title}, {data}",
        claims=[
            Claim(
                "A fixed step of 0.25 with RK4 is accurate for the regularised flow.",
                "step 0.25",
                f"off by {trained['rnode']['off by (bits/dim)']:.1e} bits/dim; without penalties by "
                f"{trained['none']['off by (bits/dim)']:.1e}",
                "holds" if right else "does not hold",
                f"Accurate: within {RIGHT:g} bits/dim of DP5 at 1e-6, on average over images, with the same noise.",
            ),
            Claim(
                "The regularised flow can be solved with fewer evaluations.",
                "",
                f"cheapest solver that is still right: {told['rnode']}; without penalties {told['none']}",
                "holds" if fewer else "does not hold",
            ),
        ],
        numbers={
            **{f"nfe {m}": c["nfe"] for m, c in cheapest.items() if c is not None},
            **{f"off {m}": trained[m]["off by (bits/dim)"] for m in METHODS},
        },
        tables={"steps": [{k: v for k, v in row.items() if k not in ("method", "name")} for row in rows]},
        shown="steps",
        figures={"steps": _draw(rows)},
        remarks=[
            tuning_remark(study, data, METHODS),
            f"Both flows were trained with RK4 at step 0.25; {study.scale.stepped} test images, one dequantisation.",
            f"Engine: {engine}."
            + ("" if engine == "julia" else " With the Julia engine, its solvers are compared too."),
        ],
        configs={run.need.name: run.config for run in runs.values()},
    )


def _compared(
    flow: Flow, x: Tensor, solver: SolverConfig, config: EvaluationConfig, accurate: evaluation.Measurement
) -> dict[str, Any]:
    """Score, difference to the accurate solver, evaluations and time of one solver; a solve that fails says so."""
    try:
        evaluation.measure(flow, x[:1], solver, config=config)  # Julia compiles a solver on its first use: not timed
        found = evaluation.measure(flow, x, solver, config=config)
    except SolverError as error:
        return dict(zip(_CELLS, (None, math.inf, None, None, error.status), strict=True))
    off = float((found.log_prob - accurate.log_prob).abs().mean()) / flow.dim / math.log(2)
    return dict(zip(_CELLS, (found.score.bits, off, found.nfe, found.seconds, ""), strict=True))


def _cheapest(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    right = [row for row in rows if row["off by (bits/dim)"] <= RIGHT]
    return min(right, key=lambda row: row["nfe"], default=None)


def _draw(rows: list[dict[str, Any]]) -> Figure:
    figure = plotting.new_figure(8.4, 4.6)
    axes = figure.add_subplot()
    for method in METHODS:
        for name, marker in _MARKERS.items():
            points = [r for r in rows if r["method"] == method and r["name"] == name and r["nfe"] is not None]
            if points:
                x, y = [r["nfe"] for r in points], [r["off by (bits/dim)"] for r in points]
                label = f"{name}, {'regularised' if method == 'rnode' else 'not regularised'}"
                axes.loglog(x, y, marker=marker, ms=6, lw=1, color=COLOURS[method], alpha=0.85, label=label)
    axes.axhline(RIGHT, color="0.3", lw=0.8, ls=":")
    axes.set(xlabel="evaluations of f per image", ylabel="difference to an accurate solver (bits/dim)")
    axes.grid(alpha=0.25, which="both")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return figure


EXPERIMENT = Experiment("steps", "the cheapest solver that is still right", _needs, _measure)
