"""What an experiment is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pyrnode.paper.report import Finding
from pyrnode.paper.scales import Scale
from pyrnode.paper.study import Need, Study


@dataclass(frozen=True)
class Experiment:
    """One figure, table or claim of the paper.

    Attributes:
        name: What the command calls it.
        title: What it is about.
        needs: The flows that it trains, or shares with others.
        measure: Trains what is missing, and measures.
    """

    name: str
    title: str
    needs: Callable[[Scale], Sequence[Need]]
    measure: Callable[[Study], Finding]


TUNING = (
    "Data, split, network, initialisation and batches are the same for all methods; models are selected on "
    "validation, and "
    "scored on the same samples with the same noise and the same accurate solver (DP5, tolerances 1e-5)."
)


def tuning_remark(study: Study, data: str) -> str:
    """How the optimisers were tuned."""
    rates = study.scale.learning_rates
    if len(rates) == 1:
        return f"{TUNING} Both methods have the published learning rate, {rates[0]:g}."
    chosen = {method: study.learning_rate(data, method) for method in ("ffjord", "rnode")}
    return (
        f"{TUNING} FFJORD and RNODE each had their learning rate chosen from {', '.join(f'{r:g}' for r in rates)}, "
        "by the "
        f"validation value after {study.scale.tuning_steps} steps of seed 0: FFJORD {chosen['ffjord']:g}, "
        f"RNODE {chosen['rnode']:g} (its ablations too)."
    )
