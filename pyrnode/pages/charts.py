"""The charts of a page: what each shows, and how it is to be read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chart:
    """One chart of the page.

    Attributes:
        id: Its name.
        title: What it shows, with the unit (``{unit}``: that of the likelihood).
        series: Tables and columns of its curves, the last one the more important.
        says: How it is to be read.
        log: Whether its axis is logarithmic.
        stepped: Whether a value holds until the next one.
        scaled: Whether it is a likelihood, in nats or bits.
        main: Whether it is shown at once.
    """

    id: str
    title: str
    series: tuple[tuple[str, str], ...]
    says: str
    log: bool = False
    stepped: bool = False
    scaled: bool = False
    main: bool = True

    @property
    def thins(self) -> bool:
        """Whether it has a point for each optimiser step, of which there may be too many to draw."""
        return any(kind == "train" for kind, _ in self.series)

    def named(self, unit: str = "nats/dim") -> str:
        """Its title in a unit."""
        return self.title.replace("{unit}", unit)


CHARTS = (
    Chart(
        "likelihood",
        "Negative log-likelihood, {unit}",
        (("train", "nll"), ("checked", "validation")),
        "Lower is better. Thin: training, by the training solver. Strong, with dots: validation, by the accurate one.",
        scaled=True,
    ),
    Chart(
        "energy",
        "Kinetic energy E per dimension",
        (("train", "E"),),
        "The mean squared speed of the particles on their way: what the kinetic penalty keeps small.",
    ),
    Chart(
        "jacobian",
        "Squared Jacobian n per dimension",
        (("train", "n"),),
        "How much the field bends and stretches: what the Jacobian penalty keeps small.",
    ),
    Chart(
        "evaluations",
        "Evaluations of the dynamics per sample",
        (("train", "nfe"),),
        "What a forward solve costs. It follows the training solver.",
    ),
    Chart(
        "disagreement",
        "Training solver against the accurate one, {unit}",
        (("checked", "disagreement"),),
        "Mean difference of log p at each validation. Above the tolerance the loss is no longer the density's.",
        log=True,
        scaled=True,
    ),
    Chart(
        "step",
        "Step of the training solver",
        (("checked", "step_size"),),
        "Halved where the density is not the solver's, doubled where it is with a margin.",
        log=True,
        stepped=True,
    ),
    Chart(
        "gradient",
        "Length of the gradient",
        (("train", "grad_norm"),),
        "Before clipping.",
        log=True,
        main=False,
    ),
    Chart("rate", "Learning rate", (("train", "learning_rate"),), "As the schedule has it.", main=False),
)
