"""How large: the published configuration, one for two cores, or one for a look. The code that runs is the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pyrnode.config import Config
from pyrnode.errors import ConfigError, unknown_name

METHODS: dict[str, dict[str, Any]] = {
    "rnode": {},
    "ffjord": {
        "solver.name": "DP5",
        "solver.rtol": 1e-5,
        "solver.atol": 1e-5,
        "solver.precision": "ieee",
        "penalties.kinetic": 0.0,
        "penalties.jacobian": 0.0,
    },
    "none": {"penalties.kinetic": 0.0, "penalties.jacobian": 0.0},
    "kinetic": {"penalties.jacobian": 0.0},
    "jacobian": {"penalties.kinetic": 0.0},
}
"""What each method changes in the regularised preset: vanilla FFJORD, and the ablations with the fixed-step solver."""

POTENTIALS = ("monge-ampere", "potential-flow", "ot-flow")
"""Flows along the gradient of a potential, which the paper leaves out (§8): each has a preset of its name."""

LABELS = {
    "rnode": "RNODE",
    "ffjord": "FFJORD",
    "none": "no penalty",
    "kinetic": "kinetic only",
    "jacobian": "Jacobian only",
    "monge-ampere": "Monge-Ampère flow",
    "potential-flow": "potential flow",
    "ot-flow": "OT-Flow",
}
"""What the methods are called in pictures and reports."""

COLOURS = {
    "rnode": "#0b6bb3",
    "ffjord": "#d95f0e",
    "none": "#7a7a7a",
    "kinetic": "#2f8f4e",
    "jacobian": "#8e44ad",
    "monge-ampere": "#b8860b",
    "potential-flow": "#2f8f4e",
    "ot-flow": "#8e44ad",
}

PRESETS = {
    "mnist": "finlay2020-mnist",
    "cifar10": "finlay2020-cifar10",
    "digits": "digits",
    "two-bumps": "toy",
    "8gaussians": "toy",
}
"""The regularised preset of each data set."""


@dataclass(frozen=True)
class Scale:
    """The sizes of all experiments.

    Attributes:
        name: What it is called.
        published: Whether the image flows have the paper's own configuration, so that numbers may be compared.
        images: Sets of images, the one of the ablation first and the one of the timings last.
        seeds: Seeds of the runs whose spread is shown.
        overrides: Settings by data set, on top of its preset.
        potentials: Settings by flow of a potential, on top of its preset.
        learning_rates: Grid over which each method's learning rate is tuned on validation; one is taken as it is.
        tuning_steps: Optimiser steps of a tuning run.
        scored: Validation images on which the model of every validation is scored.
        stepped: Test images on which solvers are compared.
        classifiers: Sets that are classified.
        classifier: Settings of the classifier, on top of its defaults.
    """

    name: str
    published: bool
    images: tuple[str, ...]
    seeds: tuple[int, ...]
    overrides: Mapping[str, Mapping[str, Any]]
    potentials: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = (1e-3,)
    tuning_steps: int = 0
    scored: int = 1000
    stepped: int = 1000
    classifiers: tuple[str, ...] = ("digits", "mnist")
    classifier: Mapping[str, Any] = field(default_factory=dict)

    def config(self, data: str, method: str = "rnode", *, seed: int = 0) -> Config:
        """The settings of one run, before any tuning.

        A flow of a potential has the data and the evaluation of the data set's own preset, and in a scale that is not
        published also its training and its solver; what the scale says of it comes last.
        """
        if data not in PRESETS:
            raise ConfigError(unknown_name("data set of the experiments", data, PRESETS))
        config = Config.preset(PRESETS[data]).override({"data.name": data, "seed": seed})
        config = config.override(self.overrides.get(data, {}))
        if method not in POTENTIALS:
            return config.override(METHODS[method])
        own = replace(Config.preset(method), data=config.data, evaluation=config.evaluation, seed=seed)
        if not self.published:
            flow = replace(config.flow, network=own.flow.network)
            own = replace(own, flow=flow, training=config.training, solver=config.solver, dtype=config.dtype)
        return own.override(self.potentials.get(method, {}))


def _small_potentials(*, width: int, layer: int) -> dict[str, dict[str, Any]]:
    """The potentials with networks of that width, and one layer in Monge-Ampère's; their training is the MLPs'."""
    shared = {"training.learning_rate": 0.01}
    two = shared | {"flow.network.hidden": [width, width]}
    return {
        "monge-ampere": shared | {"flow.network.hidden": [layer]},
        "potential-flow": two,
        "ot-flow": two,
    }


_SMALL_IMAGES = {
    "flow.blocks": 1,
    "flow.network.hidden": [16, 16],
    "training.epochs": 1,
    "training.max_steps": 90,
    "training.batch_size": 16,
    "training.warmup_steps": 15,
    "training.validate_every": 9,
    "training.validation_limit": 100,
    "training.checkpoint_every": 9,
    "training.snapshots": True,
    "evaluation.test_limit": 250,
    "evaluation.draws": 2,
}

SCALES = {
    "tiny": Scale(
        name="tiny",
        published=False,
        images=("digits",),
        seeds=(0, 1),
        overrides={
            "digits": _SMALL_IMAGES
            | {
                "flow.standardize": "scale",
                "flow.network.hidden": [4],
                "solver.name": "RK4",
                "solver.step_size": 0.25,
                "penalties.kinetic": 0.1,
                "penalties.jacobian": 0.1,
                "training.max_steps": 12,
                "training.warmup_steps": 0,
                "training.schedule": "constant",
                "training.ema": None,
                "training.validate_every": 3,
                "training.validation_limit": 20,
                "training.checkpoint_every": 4,
                "evaluation.test_limit": 20,
            },
            "two-bumps": {
                "data.samples": 1000,
                "penalties.kinetic": 0.5,
                "penalties.jacobian": 0.5,
                "training.max_steps": 60,
                "training.validate_every": 20,
                "training.checkpoint_every": 10,
            },
            "8gaussians": {
                "data.samples": 1000,
                "flow.network.hidden": [8, 8],
                "training.max_steps": 20,
                "training.warmup_steps": 0,
                "training.batch_size": 64,
                "training.validate_every": 10,
            },
        },
        potentials=_small_potentials(width=4, layer=8),
        learning_rates=(1e-3, 1e-2),
        tuning_steps=3,
        scored=20,
        stepped=10,
        classifiers=("digits",),
        classifier={"hidden": [4], "epochs": 2, "batch_size": 32, "limit": 128, "test_limit": 50, "penalty": 1.0},
    ),
    "cpu": Scale(
        name="cpu",
        published=False,
        images=("mnist",),
        seeds=(0, 1, 2),
        overrides={
            "mnist": _SMALL_IMAGES,
            "two-bumps": {
                "penalties.kinetic": 0.05,
                "penalties.jacobian": 0.05,
                "training.max_steps": 1000,
                "training.validate_every": 200,
            },
            "8gaussians": {"training.max_steps": 500, "training.validate_every": 50},
        },
        potentials=_small_potentials(width=32, layer=128),
        learning_rates=(3e-3, 1e-2, 3e-2),
        tuning_steps=30,
        scored=100,
        stepped=50,
        classifier={"hidden": [8, 8], "epochs": 8, "limit": 1000},
    ),
    "paper": Scale(
        name="paper",
        published=True,
        images=("mnist", "cifar10"),
        seeds=(0, 1, 2),
        overrides={
            "mnist": {"training.snapshots": True},
            "cifar10": {"training.snapshots": True},
            "two-bumps": {"penalties.kinetic": 0.05, "penalties.jacobian": 0.05},
            "8gaussians": {"data.samples": 100000},
        },
        classifier={"limit": None, "epochs": 30, "hidden": [64, 64, 64]},
    ),
}
"""The scales by name; a `Scale` of your own does as well."""


def scale_of(scale: str | Scale) -> Scale:
    """The scale of that name; one of the user's own passes through."""
    if isinstance(scale, Scale):
        return scale
    if scale not in SCALES:
        raise ConfigError(unknown_name("scale", scale, SCALES))
    return SCALES[scale]
