"""Figure 3: the larger the Jacobian, the more evaluations an adaptive solver needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

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
_RESAMPLES = 2000


def _needs(scale: Scale) -> list[Need]:
    return [Need(scale.images[-1], method, seed) for seed in scale.seeds for method in METHODS]


def spearman(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Spearman's rank correlation and its 95 % percentile interval, from resampling the pairs (a fixed seed)."""
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    random, values = np.random.default_rng(0), list[float]()
    while len(values) < _RESAMPLES:
        rows = random.integers(0, len(a), len(a))
        if np.ptp(a[rows]) and np.ptp(b[rows]):  # constant ranks have no correlation
            values.append(float(stats.spearmanr(a[rows], b[rows]).statistic))
    low, high = np.quantile(values, (0.025, 0.975))
    return float(stats.spearmanr(a, b).statistic), float(low), float(high)


def _measure(study: Study) -> Finding:
    data = study.scale.images[-1]
    needs = _needs(study.scale)
    runs = [study.run(need) for need in needs]
    rows: list[Row] = []
    for run in runs:
        blocks = len(run.flow.blocks)
        for point in study.curve(run):
            rms = math.sqrt(point["n"] * run.flow.dim / blocks)
            rows.append(
                {
                    "method": LABELS[run.need.method],
                    "seed": run.need.seed,
                    "step": int(point["step"]),
                    "jacobian_norm": rms,
                    "nfe": point["nfe"],
                    "bits": point["bits"],
                }
            )
    of = {m: [row for row in rows if row["method"] == LABELS[m]] for m in METHODS}
    found = {m: spearman([r["jacobian_norm"] for r in of[m]], [r["nfe"] for r in of[m]]) for m in METHODS}
    correlation, low, high = found["ffjord"]
    ends = {m: float(np.mean([r["nfe"] for r in of[m] if r["step"] == max(q["step"] for q in of[m])])) for m in METHODS}
    verdict: Verdict = "holds" if low > 0 else "does not hold" if high < 0 else "undecided"
    summary: list[Row] = [
        {
            "method": LABELS[m],
            "Spearman's ρ": found[m][0],
            "from": found[m][1],
            "to": found[m][2],
            "evaluations at the end": ends[m],
            "points": len(of[m]),
        }
        for m in METHODS
    ]
    return Finding(
        name=EXPERIMENT.name,
        title=f"{EXPERIMENT.title}, {data}",
        claims=[
            Claim(
                "Without regularisation, the adaptive solver's evaluations grow with the Jacobian's Frobenius norm.",
                "a picture, no number",
                f"Spearman's ρ = {correlation:.2f} (95 % interval {low:.2f} to {high:.2f}, {len(of['ffjord'])} models)",
                verdict,
                "The models of one run follow one another, so the interval, which resamples them one by one, is "
                "narrow.",
            ),
            Claim(
                "A regularised flow needs fewer evaluations of the same solver.",
                "",
                f"{ends['rnode']:.0f} against {ends['ffjord']:.0f} at the end of training",
                "holds" if ends["rnode"] < ends["ffjord"] else "does not hold",
            ),
        ],
        numbers={"spearman": correlation, "low": low, "high": high, **{f"nfe {m}": ends[m] for m in METHODS}},
        tables={"fig3": summary, "models": rows},
        shown="fig3",
        figures={"fig3": _draw(of)},
        remarks=[
            tuning_remark(study, data, METHODS),
            f"Every point is the model of a validation, solved on {study.scale.scored} validation images with DP5 at "
            "1e-5. The norm is the root of the mean over images, blocks and time of ‖∂f/∂z‖_F², estimated with one "
            "probe.",
        ],
        configs={run.need.name: run.config for run in runs},
    )


def _draw(of: dict[str, list[Row]]) -> Figure:
    figure = plotting.new_figure(6.4, 4.4)
    axes = figure.add_subplot()
    for method, rows in of.items():
        x, y = [row["jacobian_norm"] for row in rows], [row["nfe"] for row in rows]
        axes.scatter(x, y, s=18, color=COLOURS[method], alpha=0.7, linewidths=0, label=LABELS[method])
    axes.set(xlabel="Frobenius norm of the Jacobian (root mean square)", ylabel="evaluations of f (DP5, 1e-5)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure


EXPERIMENT = Experiment("fig3", "evaluations against the Jacobian's norm during training", _needs, _measure)
