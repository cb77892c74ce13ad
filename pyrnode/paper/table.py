"""Table 1: bits per dimension and training time, next to the published ones."""

from __future__ import annotations

from pyrnode import evaluation
from pyrnode.config import Config
from pyrnode.paper.experiment import Experiment, tuning_remark
from pyrnode.paper.report import Claim, Finding, Row
from pyrnode.paper.scales import LABELS, Scale
from pyrnode.paper.study import Need, Study, hours, mean_and_spread

METHODS = ("ffjord", "rnode")
PUBLISHED: tuple[tuple[str, dict[str, float], dict[str, float]], ...] = (
    ("RealNVP", {"mnist": 1.06, "cifar10": 3.49}, {}),
    ("i-ResNet", {"mnist": 1.05, "cifar10": 3.45}, {}),
    ("Glow", {"mnist": 1.05, "cifar10": 3.35}, {}),
    ("Flow++", {"cifar10": 3.28}, {}),
    ("Residual Flow", {"mnist": 0.970, "cifar10": 3.280}, {}),
    ("FFJORD (the paper's)", {"mnist": 0.974, "cifar10": 3.363}, {"mnist": 68.5, "cifar10": 91.3}),
    ("RNODE (the paper's)", {"mnist": 0.973, "cifar10": 3.398}, {"mnist": 24.4, "cifar10": 31.8}),
)
"""Rows of the paper's Table 1: bits per dimension, and hours on one GeForce RTX 2080 Ti."""


def _needs(scale: Scale) -> list[Need]:
    return [Need(data, method, seed) for data in scale.images for seed in scale.seeds for method in METHODS]


def _measure(study: Study) -> Finding:
    rows: list[Row] = []
    claims, configs = list[Claim](), dict[str, Config]()
    numbers: dict[str, float] = {}
    for data in study.scale.images:
        for name, bits, time in PUBLISHED:
            if data in bits:
                cells = {"dequantised (bits/dim)": f"{bits[data]:g} (as published)", "bin centre (bits/dim)": ""}
                rows.append(_row(data, name, **cells, time=f"{time[data]:g} h" if data in time else ""))
        means: dict[str, tuple[float, float]] = {}
        for method in METHODS:
            reports, seconds = [], []
            for seed in study.scale.seeds:
                run = study.run(Need(data, method, seed))
                study.say(f"scoring {run.need.name} on the test set")
                config = run.config.evaluation.override({"probes": 1})
                splits = study.splits(run.config)
                report = evaluation.evaluate(run.flow, splits, config=config, baselines=False, world=study.world)
                reports.append(report)
                seconds.append(run.seconds)
                configs[run.need.name] = run.config
            dequantised = mean_and_spread(report.score.bits for report in reports)
            centre = mean_and_spread(report.bin_centre.bits for report in reports if report.bin_centre is not None)
            means[method] = dequantised[0], mean_and_spread(seconds)[0]
            rows.append(
                _row(
                    data,
                    f"{LABELS[method]} (here, {len(reports)} seed(s))",
                    **{
                        "dequantised (bits/dim)": f"{dequantised[0]:.3f} ± {dequantised[1]:.3f}",
                        "bin centre (bits/dim)": f"{centre[0]:.3f} ± {centre[1]:.3f}",
                    },
                    time=hours(means[method][1]),
                )
            )
            numbers |= {f"{data} {method} bits": dequantised[0], f"{data} {method} bin centre": centre[0]}
            numbers[f"{data} {method} seconds"] = means[method][1]
            numbers[f"{data} {method} disagreement"] = max(report.disagreement or 0.0 for report in reports)
        (f_bits, f_time), (r_bits, r_time) = means["ffjord"], means["rnode"]
        claims.append(
            Claim(
                f"RNODE matches FFJORD's bits/dim in less training time ({data}).",
                _published(data),
                f"{r_bits:.3f} in {hours(r_time)} against {f_bits:.3f} in {hours(f_time)}",
                "holds" if r_bits <= f_bits + 0.02 and r_time < f_time else "does not hold",
                "More than 0.02 bits/dim above FFJORD counts as no match. Both took the same number of steps.",
            )
        )
    return Finding(
        name=EXPERIMENT.name,
        title=EXPERIMENT.title,
        claims=claims,
        numbers=numbers,
        tables={"table1": rows},
        shown="table1",
        figures={},
        remarks=[
            tuning_remark(study, study.scale.images[-1], METHODS),
            "Ours: mean ± standard deviation over seeds, on the test set, DP5 at 1e-5. Dequantised and bin-centre "
            "scores are different quantities; the published numbers do not say which they are (the reference code "
            "prints bin centres in testing). Time is that of the optimiser steps.",
        ],
        configs=configs,
    )


def _published(data: str) -> str:
    """The paper's own two rows in words; empty for data that it does not have."""
    (_, f_bits, f_hours), (_, r_bits, r_hours) = PUBLISHED[-2:]
    if data not in r_bits:
        return ""
    return f"{r_bits[data]:g} in {r_hours[data]:g} h against {f_bits[data]:g} in {f_hours[data]:g} h"


def _row(data: str, method: str, *, time: str, **cells: str) -> Row:
    return {"data": data, "method": method, **cells, "training time": time}


EXPERIMENT = Experiment("table1", "bits per dimension and training time beside the published ones", _needs, _measure)
