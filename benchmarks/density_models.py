"""The densities that `benchmarks.density` compares: how each is trained for a number of seconds, and then scored.

A peer has several configurations, each of which is given the whole time; validation decides which of them stands in the
table. What is pyrnode's is trained once, with the settings that the command line names.
"""

from __future__ import annotations

import copy
import importlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import pyrnode
from benchmarks.tables import Array, MissingError, Table
from pyrnode.data.samples import Splits, TensorSamples

VALIDATED = 2_000
"""Validation rows that a peer is scored on while it trains."""


@dataclass
class Fitted:
    """A trained density."""

    log_prob: Callable[[Array], Array]
    """Nats of standardised rows ``(n, d)``."""
    seconds: float
    """Training, validation included."""
    steps: int
    note: str = ""
    flow: pyrnode.Flow | None = None
    """Ours, so that its paths can be measured."""


Fit = Callable[..., Fitted]
"""``fit(table, seconds, seed, clock=..., **settings)``."""

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""What a second is; the processor's own is fair beside other work."""


# -- pyrnode ----------------------------------------------------------------------------------------------------------


def train_pyrnode(table: Table, seconds: float, seed: int, *, clock: str = "wall", **settings: Any) -> Fitted:
    """`pyrnode.train` with the defaults, but for `settings`, for that time."""
    train, validation, test = (
        TensorSamples(torch.from_numpy(part)) for part in (table.train, table.validation, table.test)
    )
    splits = Splits(table.name, train, validation, test, (table.train.shape[1],))
    settings = {"engine": "torch", "seed": seed, **settings}

    def run(**more: Any) -> pyrnode.TrainingResult:
        return pyrnode.train(splits, evaluate=False, progress=False, **(settings | more))

    run(max_steps=2, validation_limit=10)  # compiles, or loads, the kernels; not counted
    with mock.patch.object(time, "perf_counter", CLOCKS[clock]):
        start = CLOCKS[clock]()
        result = run(minutes=seconds / 60)
        elapsed = CLOCKS[clock]() - start
    flow = result.flow

    @torch.no_grad()
    def log_prob(x: Array) -> Array:
        return flow.log_prob(torch.from_numpy(x)).double().numpy()

    return Fitted(log_prob, elapsed, max(record["step"] for record in result.history), "; ".join(result.notes), flow)


# -- zuko --------------------------------------------------------------------------------------------------------------


def train_zuko(
    table: Table,
    seconds: float,
    seed: int,
    *,
    flow: str,
    learning_rate: float,
    batch: int,
    clock: str = "wall",
    **options: Any,
) -> Fitted:
    """A flow of zuko: Adam, a cosine to zero over the time, gradients of norm at most 5, best weights on validation."""
    flows = _zuko()
    torch.manual_seed(seed)
    model = getattr(flows, flow)(table.train.shape[1], **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    train = torch.from_numpy(table.train).float()
    validation = torch.from_numpy(table.validation[:VALIDATED]).float()
    best, kept, steps, spent, next_validation = math.inf, copy.deepcopy(model.state_dict()), 0, 0.0, 0.0
    batches = _batches(train, batch, torch.Generator().manual_seed(seed))
    now = CLOCKS[clock]
    start = now()
    while True:
        elapsed = now() - start
        if elapsed >= next_validation or elapsed >= seconds:
            with torch.no_grad():
                value = -float(model().log_prob(validation).mean())
            if value < best:
                best, kept = value, copy.deepcopy(model.state_dict())
            spent, elapsed = now() - start - elapsed, now() - start
            next_validation = elapsed + max(seconds / 40, 10 * spent)  # at most a tenth of the time
        if elapsed >= seconds:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * elapsed / seconds))
        loss = -model().log_prob(next(batches)).mean()
        if not math.isfinite(float(loss.detach())):
            break
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        steps += 1
    elapsed = now() - start
    model.load_state_dict(kept)
    return Fitted(_scored_exactly(model), elapsed, steps, "" if elapsed >= seconds else "the loss was not finite")


def _scored_exactly(model: Any) -> Callable[[Array], Array]:
    """The log-density of zuko's flow in double precision, with the exact trace."""
    model = model.double().eval()
    for module in model.modules():
        if hasattr(module, "exact"):
            module.exact = True

    @torch.no_grad()
    def log_prob(x: Array) -> Array:
        return torch.cat([model().log_prob(part) for part in torch.from_numpy(x).split(500)]).numpy()

    return log_prob


def _zuko() -> Any:
    try:
        return importlib.import_module("zuko.flows")
    except ImportError as error:
        raise MissingError("pip install zuko") from error


def _batches(x: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Whole batches, for ever, in a new order every time."""
    while True:
        for rows in torch.randperm(len(x), generator=generator).split(size):
            if len(rows) == min(size, len(x)):
                yield x[rows]


# -- a mixture of Gaussians --------------------------------------------------------------------------------------------


def fit_mixture(
    table: Table, seconds: float, seed: int, *, ridges: list[float], kinds: list[str], clock: str = "wall"
) -> Fitted:
    """Components and kind of covariance by validation: 1, 2, 4, … components, as far as the time goes."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    warnings.simplefilter("ignore", ConvergenceWarning)  # what is stopped early is a density as well
    best, chosen, fits = -math.inf, None, 0
    last = {(kind, ridge): (0.0, -math.inf) for ridge in ridges for kind in kinds}  # seconds and value of a fit
    now = CLOCKS[clock]
    start = now()
    for components in (2**power for power in range(12)):
        for (kind, ridge), (took, value) in list(last.items()):
            begun = now() - start
            if begun + 2.5 * took > seconds:  # twice the components would not be done in time
                continue
            model = GaussianMixture(
                components,
                covariance_type=kind,
                reg_covar=ridge,
                max_iter=100,
                init_params="k-means++",
                random_state=seed,
            )
            try:
                model.fit(table.train)
                value = float(model.score(table.validation))
            except ValueError:  # a covariance collapsed
                value = -math.inf
            last[kind, ridge] = now() - start - begun, value
            fits += 1
            if value > best:
                best, chosen = value, model
    if chosen is None:
        raise ValueError("no mixture could be fitted")
    note = f"{chosen.n_components} components, {chosen.covariance_type}, ridge {chosen.reg_covar:g}"
    return Fitted(chosen.score_samples, now() - start, fits, note)


# -- which there are ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A density and the configurations that validation chooses among."""

    fit: Fit
    configurations: Mapping[str, Mapping[str, Any]]
    requires: tuple[str, ...] = field(default=())


def _zuko_flow(name: str, **configurations: Mapping[str, Any]) -> Model:
    settings = {label: {"flow": name, "batch": 512, **options} for label, options in configurations.items()}
    return Model(train_zuko, settings, ("zuko",))


FFJORD = {"kinetic": 0.0, "jacobian": 0.0, "solver": {"name": "DP5", "rtol": 1e-5, "atol": 1e-5}}
"""Vanilla: no penalty, adaptive solves; often enough validated for its slow steps."""

OFTEN = {"validate_every": 50, "validation_limit": 1_000}

MODELS = {
    "nsf": _zuko_flow(
        "NSF",
        small={"transforms": 3, "hidden_features": [128, 128], "learning_rate": 1e-3},
        fast={"transforms": 3, "hidden_features": [64, 64], "learning_rate": 5e-3},
        large={"transforms": 5, "hidden_features": [256, 256], "bins": 16, "learning_rate": 1e-3},
    ),
    "maf": _zuko_flow(
        "MAF",
        small={"transforms": 5, "hidden_features": [128, 128], "learning_rate": 1e-3},
        fast={"transforms": 5, "hidden_features": [64, 64], "learning_rate": 5e-3},
        large={"transforms": 10, "hidden_features": [256, 256], "learning_rate": 5e-4},
    ),
    "cnf": _zuko_flow(
        "CNF",
        small={"hidden_features": [64, 64], "learning_rate": 1e-3, "exact": False, "batch": 256},
        fast={"hidden_features": [64, 64], "learning_rate": 1e-2, "exact": False, "batch": 128},
        large={"hidden_features": [128, 128, 128], "learning_rate": 3e-3, "exact": False, "batch": 256},
    ),
    "mixture": Model(fit_mixture, {"searched": {"ridges": [1e-6, 1e-3], "kinds": ["full", "diag", "tied"]}}),
    "ffjord": Model(
        train_pyrnode,
        {
            "small": {**FFJORD, **OFTEN},
            "fast": {**FFJORD, **OFTEN, "learning_rate": 1e-2, "batch_size": 512},
            "published": {**FFJORD, **OFTEN, "activation": "tanh", "time": "concatsquash", "weight_decay": 1e-6},
        },
    ),
}
"""The peers."""
