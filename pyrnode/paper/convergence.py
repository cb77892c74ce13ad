"""Figure 2: bits per dimension against time, vanilla FFJORD beside RNODE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from pyrnode import plotting
from pyrnode.paper.experiment import Experiment, tuning_remark
from pyrnode.paper.report import Claim, Finding, Row, Verdict
from pyrnode.paper.scales import COLOURS, LABELS, Scale
from pyrnode.paper.study import Need, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("ffjord", "rnode")
PAPER_RATIO = 2.8
Curve = Sequence[dict[str, float]]
Array = np.ndarray[Any, np.dtype[Any]]


def _needs(scale: Scale) -> list[Need]:
    return [Need(scale.images[-1], method, seed) for seed in scale.seeds for method in METHODS]


def time_to_reach(curve: Curve, bits: float) -> float:
    """Seconds of training until the best score so far is `bits`, between validations by a straight line; else infinity.

    Args:
        curve: Scores along a run, with ``seconds`` and ``bits``.
        bits: Bits per dimension to be reached.
    """
    before: tuple[float, float] | None = None
    for point in curve:
        seconds, value = point["seconds"], point["bits"]
        if value <= bits:
            if before is None or before[1] == value:
                return seconds
            share = (before[1] - bits) / (before[1] - value)
            return before[0] + share * (seconds - before[0])
        if before is None or value < before[1]:
            before = seconds, value
    return math.inf


def common_target(curves: Sequence[Curve]) -> float:
    """The lowest bits per dimension that every run reaches."""
    return max(min(point["bits"] for point in curve) for curve in curves)


def ratio_with_interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of positive ratios, and its 95 % interval by Student's t on their logarithms."""
    logs = np.log(np.asarray(ratios, dtype=float))
    mean, n = float(logs.mean()), len(logs)
    half = float(stats.t.ppf(0.975, n - 1) * logs.std(ddof=1) / math.sqrt(n)) if n > 1 else math.inf
    return math.exp(mean), math.exp(mean - half), math.exp(min(mean + half, 700.0))


def _measure(study: Study) -> Finding:
    data = study.scale.images[-1]
    for need in _needs(study.scale):  # in turn, so that a change in the machine's speed meets all methods
        study.run(need)
    runs = {m: [study.run(Need(data, m, seed)) for seed in study.scale.seeds] for m in METHODS}
    curves = {m: [study.curve(run) for run in runs[m]] for m in METHODS}
    target = common_target([curve for m in METHODS for curve in curves[m]])
    reached = {m: [time_to_reach(curve, target) for curve in curves[m]] for m in METHODS}
    ratio, low, high = ratio_with_interval([f / r for f, r in zip(*reached.values(), strict=True)])
    best = {m: [min(point["bits"] for point in curve) for curve in curves[m]] for m in METHODS}
    rows: list[Row] = [
        {"method": LABELS[m], "seed": seed, **point}
        for m in METHODS
        for seed, curve in zip(study.scale.seeds, curves[m], strict=True)
        for point in curve
    ]
    summary: list[Row] = [
        {
            "method": LABELS[m],
            "seed": seed,
            "training seconds": run.seconds,
            "seconds per step": run.seconds / len(run.steps),
            f"seconds to {target:.3f} bits/dim": time,
            "best bits/dim": bits,
        }
        for m in METHODS
        for seed, run, time, bits in zip(study.scale.seeds, runs[m], reached[m], best[m], strict=True)
    ]
    difference = float(np.mean(best["rnode"]) - np.mean(best["ffjord"]))
    spread = max(float(np.std(best[m])) for m in METHODS)
    return Finding(
        name=EXPERIMENT.name,
        title=f"{EXPERIMENT.title}, {data}",
        claims=[
            Claim(
                "RNODE reaches the same bits/dim in less time than vanilla FFJORD.",
                f"{PAPER_RATIO:g} times faster",
                f"{ratio:.2f} times faster (95 % interval {_number(low)} to {_number(high)}, "
                f"{len(study.scale.seeds)} seeds)",
                _verdict(low, high),
                f"Time to {target:.3f} bits/dim on validation, the lowest that every run reaches.",
            ),
            Claim(
                "Regularisation costs no bits/dim after the same number of steps.",
                "0.973 against 0.974 (MNIST), 3.398 against 3.363 (CIFAR10)",
                f"RNODE minus FFJORD: {difference:+.3f} bits/dim, standard deviation over seeds {spread:.3f}",
                "holds" if difference <= 0.02 else "does not hold",
                "More than 0.02 bits/dim counts as a cost.",
            ),
        ],
        numbers={"ratio": ratio, "low": low, "high": high, "target": target, "difference": difference},
        tables={"fig2": summary, "curves": rows},
        shown="fig2",
        figures={"fig2": _draw(curves, target)},
        remarks=[
            tuning_remark(study, data, METHODS),
            "Time is that of the optimiser steps alone: validation, scoring and checkpoints are left out. The methods' "
            "runs took turns on one machine.",
        ],
        configs={run.need.name: run.config for m in METHODS for run in runs[m]},
    )


def _number(x: float) -> str:
    return f"{x:.2f}" if x < 1000 else "unbounded"


def _verdict(low: float, high: float) -> Verdict:
    if low > 1:
        return "holds"
    return "does not hold" if high < 1 else "undecided"


def band(curves: Sequence[Curve], points: int = 100) -> tuple[Array, Array, Array]:
    """Mean of the curves over time, and the half width of its 95 % confidence band (Student's t; 0 for one curve)."""
    start = max(curve[0]["seconds"] for curve in curves)
    end = min(curve[-1]["seconds"] for curve in curves)
    times = np.linspace(start, end, points)
    values = np.array([np.interp(times, [p["seconds"] for p in c], [p["bits"] for p in c]) for c in curves])
    n = len(curves)
    half = stats.t.ppf(0.975, n - 1) * values.std(0, ddof=1) / math.sqrt(n) if n > 1 else np.zeros(points)
    return times, values.mean(0), half


def _draw(curves: dict[str, list[Curve]] | dict[str, list[list[dict[str, float]]]], target: float) -> Figure:
    figure = plotting.new_figure(7, 4.4)
    axes = figure.add_subplot()
    for method, of_method in curves.items():
        colour = COLOURS[method]
        for curve in of_method:
            axes.plot([p["seconds"] for p in curve], [p["bits"] for p in curve], color=colour, lw=0.6, alpha=0.5)
        times, mean, half = band(of_method)
        axes.plot(times, mean, color=colour, lw=2, label=LABELS[method])
        axes.fill_between(times, mean - half, mean + half, color=colour, alpha=0.2, lw=0)
    axes.axhline(target, color="0.4", lw=0.8, ls=":", label=f"reached by all: {target:.3f}")
    finals = [curve[-1]["bits"] for of_method in curves.values() for curve in of_method]
    firsts = [curve[0]["bits"] for of_method in curves.values() for curve in of_method]
    margin = 0.05 * (max(firsts) - min(finals))
    axes.set(xlabel="training time (s)", ylabel="validation (bits/dim)", xlim=(0, None))
    axes.set_ylim(min(finals) - 2 * margin, max(firsts) + margin)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure


EXPERIMENT = Experiment("fig2", "bits per dimension against training time", _needs, _measure)
