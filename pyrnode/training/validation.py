"""Validation: the held-out score by the accurate solver, the one in use, and how far the training solver is from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyrnode.composition import Composition, Passage
from pyrnode.config import Config, Divergence, SolverConfig
from pyrnode.data import Batch, Samples
from pyrnode.distributed import World, alone
from pyrnode.embedding import evaluating
from pyrnode.errors import SolverError
from pyrnode.seeds import generator
from pyrnode.training.step import estimator

_MOST, _NUMBERS = 2000, 200_000
"""Samples that are validated on without a limit: at most so many, of so many numbers in all, but at least 200."""

_EXACT = 8
"""Up to how many dimensions the trace is exact."""

_PROBES = (16, 64)
"""Samples on which two solvers are compared: a quarter of a batch, between these."""


@dataclass(frozen=True)
class Outcome:
    """What a validation found.

    Attributes:
        value: Mean of ``−log p`` by the accurate solver, weighted as the samples are, nats per dimension; infinite
            where that solver failed.
        error: Its standard error over the samples.
        disagreement: Mean ``|Δ log p|`` between the training solver and the accurate one, nats per dimension.
        cost: Evaluations of the dynamics, summed over the samples; of an exact trace, what its products cost.
    """

    value: float
    error: float
    disagreement: float
    cost: float

    def record(self) -> dict[str, float]:
        """What goes into a run's records: the numbers that are finite, since JSON has no others."""
        bits = self.value / math.log(2)
        named = {"validation": self.value, "validation_bits": bits, "validation_error": self.error}
        return {k: v for k, v in {**named, "disagreement": self.disagreement}.items() if math.isfinite(v)}


class _Scored(NamedTuple):
    """What was found of some samples: log-densities by the accurate and the training solver, weights, and the cost."""

    score: Tensor
    trained: Tensor
    weight: Tensor
    cost: float


class Validation:
    """Scores a flow on the validation set, always with the same noise.

    The trace is exact up to 8 dimensions, and beyond estimated with the same probes each time, for both solvers.

    Args:
        flow: The flow; its weights at the time of the call are scored.
        samples: The validation set.
        config: Settings.
        world: The processes that share it.

    Attributes:
        size: Number of samples that are scored.
        tick: Called with the number of those scored so far.
    """

    def __init__(self, flow: Composition, samples: Samples, config: Config, world: World = alone) -> None:
        self._flow, self._samples, self._config, self._world = flow, samples, config, world
        self.tick: Callable[[int], None] = lambda done: None
        most = config.training.validation_limit or min(_MOST, max(200, _NUMBERS // flow.dim))
        self.size = min(len(samples), most)
        use = config.evaluation.divergence
        exact = use.exact(flow.dim) and flow.dim <= _EXACT
        self._divergence = Divergence("exact" if exact else "hutchinson", use.probes)

    @torch.no_grad()
    def score(self, solver: SolverConfig) -> Outcome:
        """The held-out score, and the training solver beside it."""
        parts = zip(*self._world.gathered(lambda: list(self._scored(solver))), strict=True)  # by batch, from all
        joined = [part for batch in parts for part in batch]
        score, trained, weight = (torch.cat(tensors) for tensors in list(zip(*joined, strict=True))[:3])
        weight = weight / weight.sum()
        mean = float((score * weight).sum())
        error = float(((score - mean).square() * weight.square()).sum().sqrt())
        apart = float((score - trained).abs().nan_to_num(math.inf, math.inf).mul(weight).sum())
        dim, cost = self._flow.dim, sum(part.cost for part in joined)
        return Outcome(-mean / dim if math.isfinite(mean) else math.inf, error / dim, apart / dim, cost)

    def _scored(self, solver: SolverConfig) -> Iterator[_Scored]:
        """What this process finds of each batch."""
        config, done = self._config, 0
        every = torch.arange(self.size, device="cpu")
        for number, batch in enumerate(self._samples.shares(every, config.evaluation.chunk, self._world.share)):
            score, cost = self._log_prob(batch, number, config.evaluation.solver, self._divergence)
            trained, more = self._log_prob(batch, number, solver, self._divergence)
            weight = torch.ones(len(batch), dtype=torch.float64, device="cpu")
            weight = weight if batch.weight is None else batch.weight.double().cpu()
            yield _Scored(score.double(), trained.double(), weight, cost + more)
            self.tick(done := done + batch.total)

    @torch.no_grad()
    def differ(self, one: SolverConfig, other: SolverConfig) -> float:
        """Mean ``|Δ log p|`` between two solvers on a few samples, nats per dimension; infinite where one fails."""
        low, high = _PROBES
        most = min(self.size, max(low, min(high, self._config.training.batch_size // 4)))
        every, divergence = torch.arange(most, device="cpu"), estimator(self._flow, self._config.penalties)

        def apart() -> Tensor:
            batch = next(self._samples.shares(every, most, self._world.share))
            first, second = (self._log_prob(batch, 0, solver, divergence)[0] for solver in (one, other))
            return (first - second).abs()

        mean = float(torch.cat(self._world.gathered(apart)).mean()) / self._flow.dim
        return mean if math.isfinite(mean) else math.inf

    def _log_prob(
        self, batch: Batch, number: int, solver: SolverConfig, divergence: Divergence
    ) -> tuple[Tensor, float]:
        """Log-densities of the batch of that number, on the CPU, and what they cost; −inf where a solve fails."""
        if not len(batch):
            return torch.zeros(0, dtype=torch.float64, device="cpu"), 0.0
        try:
            with evaluating(self._flow.embedding):
                passage = self._passage(batch, number, solver, divergence)
        except SolverError:
            return torch.full((len(batch),), -math.inf, dtype=torch.float64, device="cpu"), 0.0
        cost = passage.nfe * len(batch) * price(divergence, self._flow.dim)
        return passage.log_prob.cpu(), cost

    def _passage(self, batch: Batch, number: int, solver: SolverConfig, divergence: Divergence) -> Passage:
        """The batch of that number, with its noise."""
        random = batch.noise(generator(self._config.seed, "validation", number))
        x, context = self._flow.admit(batch.x, batch.context)
        draw = self._flow.draw(divergence, random, noise=self._config.penalties.noise)
        return self._flow.solve(x, draw, solver, context=context, generator=random)


def price(divergence: Divergence, dim: int) -> float:
    """What an evaluation with that divergence costs, in evaluations with one probe."""
    return 1 + dim / 2 if divergence.exact(dim) else float(divergence.probes or 1)


def wrong(solver: str, disagreement: float, step: int, tolerance: float) -> str:
    """What is said of a training solver that is not right."""
    return (
        f"at step {step} the training solver, {solver}, is {disagreement:.2g} nats per dimension from the accurate one "
        f"(tolerance {tolerance:g}): the loss is no longer the density's. The best model is chosen by the accurate "
        "solver all the same. Remedies: solver='auto', a smaller step_size, larger penalties (kinetic, jacobian)"
    )
