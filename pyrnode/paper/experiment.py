"""What an experiment is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pyrnode.paper.report import Finding
from pyrnode.paper.scales import LABELS, Scale
from pyrnode.paper.study import TUNED, Need, Study


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


SAME = (
    "Data, split, network, initialisation and batches are the same for all methods; models are selected on "
    "validation, and scored on the same samples with the same noise and the same accurate solver (DP5, tolerances "
    "1e-5)."
)


def tuning_remark(study: Study, data: str, methods: Sequence[str]) -> str:
    """How the optimisers of the compared methods were tuned."""
    rates = study.scale.learning_rates
    if len(rates) == 1:
        return f"{SAME} All have the published learning rate, {rates[0]:g}."
    tuned = [method for method in TUNED if method in methods]
    chosen = ", ".join(f"{LABELS[method]} {study.learning_rate(data, method):g}" for method in tuned)
    ablations = "" if set(methods) <= set(TUNED) else " Its ablations have the same."
    return (
        f"{SAME} The learning rate was chosen from {', '.join(f'{rate:g}' for rate in rates)}, for each method by "
        f"itself, by the validation value after {study.scale.tuning_steps} steps of seed 0: {chosen}.{ablations}"
    )
