"""Validation: the held-out score by the accurate solver, the one in use, and how far the training solver is from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrnode.composition import Composition, Passage
from pyrnode.config import Config, Divergence, SolverConfig
from pyrnode.data import Batch, Samples
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


class Validation:
    """Scores a flow on the validation set, always with the same noise.

    The trace is exact up to 8 dimensions, and beyond estimated with the same probes each time, for both solvers.

    Args:
        flow: The flow; its weights at the time of the call are scored.
        samples: The validation set.
        config: Settings.

    Attributes:
        size: Number of samples that are scored.
        tick: Called with the number of those scored so far.
    """

    def __init__(self, flow: Composition, samples: Samples, config: Config) -> None:
        self._flow, self._samples, self._config = flow, samples, config
        self.tick: Callable[[int], None] = lambda done: None
        most = config.training.validation_limit or min(_MOST, max(200, _NUMBERS // flow.dim))
        self.size = min(len(samples), most)
        use = config.evaluation.divergence
        exact = use.exact(flow.dim) and flow.dim <= _EXACT
        self._divergence = Divergence("exact" if exact else "hutchinson", use.probes)

    @torch.no_grad()
    def score(self, solver: SolverConfig) -> Outcome:
        """The held-out score, and the training solver beside it."""
        config = self._config
        scores, trained, weights, cost, done = list[Tensor](), list[Tensor](), list[Tensor](), 0.0, 0
        for number, batch in enumerate(
            self._samples.batches(torch.arange(self.size, device="cpu"), config.evaluation.chunk)
        ):
            for parts, used in ((scores, config.evaluation.solver), (trained, solver)):
                try:
                    passage = self._passage(batch, number, used, self._divergence)
                    parts.append(passage.log_prob.double().cpu())
                    cost += passage.nfe * len(batch) * price(self._divergence, self._flow.dim)
                except SolverError:
                    parts.append(torch.full((len(batch),), -math.inf, dtype=torch.float64, device="cpu"))
            weights.append(
                torch.ones(len(batch), dtype=torch.float64, device="cpu")
                if batch.weight is None
                else batch.weight.double().cpu()
            )
            self.tick(done := done + len(batch))
        score, weight = torch.cat(scores), torch.cat(weights) / torch.cat(weights).sum()
        mean = float((score * weight).sum())
        error = float(((score - mean).square() * weight.square()).sum().sqrt())
        apart = float((score - torch.cat(trained)).abs().nan_to_num(math.inf, math.inf).mul(weight).sum())
        dim = self._flow.dim
        return Outcome(-mean / dim if math.isfinite(mean) else math.inf, error / dim, apart / dim, cost)

    @torch.no_grad()
    def differ(self, one: SolverConfig, other: SolverConfig) -> float:
        """Mean ``|Δ log p|`` between two solvers on a few samples, nats per dimension; infinite where one fails."""
        low, high = _PROBES
        batch = self._samples.first(min(self.size, max(low, min(high, self._config.training.batch_size // 4))))
        divergence = estimator(self._flow, self._config.penalties)
        try:
            first, second = (self._passage(batch, 0, solver, divergence).log_prob for solver in (one, other))
        except SolverError:
            return math.inf
        apart = float((first - second).abs().mean()) / self._flow.dim
        return apart if math.isfinite(apart) else math.inf

    def _passage(self, batch: Batch, number: int, solver: SolverConfig, divergence: Divergence) -> Passage:
        """The batch of that number, with its noise."""
        random = generator(self._config.seed, "validation", number)
        x, context = self._flow.admit(batch.x, batch.context)
        draw = self._flow.draw(divergence, random, noise=self._config.penalties.noise)
        return self._flow.solve(x, draw, solver, context=context, generator=random)


def price(divergence: Divergence, dim: int) -> float:
    """What an evaluation with that divergence costs, in evaluations with one probe."""
    return 1 + dim / 2 if divergence.exact(dim) else float(divergence.probes or 1)
