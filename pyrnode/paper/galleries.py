"""Figure 5: samples with and without regularisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrnode import plotting
from pyrnode.paper.experiment import Experiment, tuning_remark
from pyrnode.paper.report import Claim, Finding, Row
from pyrnode.paper.scales import LABELS, Scale
from pyrnode.paper.study import Need, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("ffjord", "rnode")
SIDE, PAIRS = 5, 10


def _needs(scale: Scale) -> list[Need]:
    return [Need(data, method) for data in scale.images for method in METHODS]


@torch.no_grad()
def _measure(study: Study) -> Finding:
    figures: dict[str, Figure] = {}
    rows: list[Row] = []
    configs, distances = {}, {}
    for data in study.scale.images:
        runs = {m: study.run(Need(data, m)) for m in METHODS}
        splits = study.splits(runs["rnode"].config)
        levels = splits.levels or 256
        real = splits.test.tensor()[: SIDE * SIDE]
        base = torch.randn(
            PAIRS, runs["rnode"].flow.dim, generator=torch.Generator().manual_seed(1), dtype=torch.float32, device="cpu"
        )
        grids: dict[str, Tensor] = {"data": real}
        pairs: dict[str, Tensor] = {}
        for method, run in runs.items():
            grids[LABELS[method]] = run.flow.sample(SIDE * SIDE, seed=0)
            pairs[LABELS[method]] = run.flow.decode(base)
            rows.append({"data": data, "method": LABELS[method], **_moments(grids[LABELS[method]], real)})
            configs[run.need.name] = run.config
        distance = float((pairs["FFJORD"].double() - pairs["RNODE"].double()).abs().mean())
        distances[data] = distance
        figures[f"fig5-{data}"] = _grids(grids, levels)
        figures[f"fig5-{data}-same-base"] = _grids(pairs, levels, rows=1)
    shares = ", ".join(f"{row['method']} {row['mean']:.3g}" for row in rows)
    apart = ", ".join(f"{value:.3g} ({data})" for data, value in distances.items())
    return Finding(
        name=EXPERIMENT.name,
        title=EXPERIMENT.title,
        claims=[
            Claim(
                "Samples with and without regularisation look alike.",
                "a picture, no number",
                f"to be judged by eye; mean grey level {shares}, of the data {rows[0]['mean of the data']:.3g}",
                "undecided",
                "The second picture's rows start from the same points of the base; on average their pixels are "
                f"{apart} grey levels apart.",
            )
        ],
        numbers={f"difference {data}": value for data, value in distances.items()},
        tables={"fig5": rows},
        shown="fig5",
        figures=figures,
        remarks=[tuning_remark(study, study.scale.images[-1], METHODS), "Samples are decoded with DP5 at 1e-5."],
        configs=configs,
    )


def _moments(images: Tensor, real: Tensor) -> dict[str, float]:
    x, y = images.double(), real.double()
    return {
        "mean": float(x.mean()),
        "standard deviation": float(x.std()),
        "mean of the data": float(y.mean()),
        "standard deviation of the data": float(y.std()),
    }


def _grids(grids: dict[str, Tensor], levels: int, rows: int | None = None) -> Figure:
    """Grids of images, side by side, or one below the other where each has one row."""
    count, below = len(grids), rows == 1
    figure = plotting.new_figure(*((9, 1.25 * count) if below else (3.1 * count, 3.4)))
    panels = figure.subplots(*((count, 1) if below else (1, count)), squeeze=False).flat
    for axes, (name, images) in zip(panels, grids.items(), strict=True):
        axes.imshow(plotting.tile(images, levels=levels, rows=rows), interpolation="nearest")
        axes.set_title(name)
        axes.set_axis_off()
    return figure


EXPERIMENT = Experiment("fig5", "samples with and without regularisation", _needs, _measure)
