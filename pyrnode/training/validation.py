"""Validation: the held-out score by the training solver, and how far that solver is from half its step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pyrnode.composition import Composition
from pyrnode.config import Config, SolverConfig
from pyrnode.data import Batch, Samples
from pyrnode.seeds import generator

_PROBE_SAMPLES = 64  # samples on which the training solver is compared with half its step


class Validation:
    """Scores a flow on the validation set, always with the same noise.

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
        self.size = min(len(samples), config.training.validation_limit or len(samples))

    @torch.no_grad()
    def value(self, solver: SolverConfig) -> float:
        """Mean of ``−log p``, weighted as the samples are, nats per dimension."""
        total, weights, done = 0.0, 0.0, 0
        batches = self._samples.batches(torch.arange(self.size), self._config.evaluation.chunk)
        for number, batch in enumerate(batches):
            log_prob = self._log_prob(batch, number, solver).double().cpu()
            weight = torch.ones(len(batch)).double() if batch.weight is None else batch.weight
            self.tick(done := done + len(batch))
            total, weights = total + float((log_prob * weight).sum()), weights + float(weight.sum())
        return -total / weights / self._flow.dim

    @torch.no_grad()
    def disagreement(self, solver: SolverConfig) -> float:
        """Mean ``|log p − log p'|`` of a solver and of half its step, nats per dimension."""
        finer = replace(solver, step_size=float(solver.step_size) / 2, rtol=solver.rtol / 10, atol=solver.atol / 10)
        batch = self._samples.first(min(_PROBE_SAMPLES, self.size))
        difference = self._log_prob(batch, 0, solver) - self._log_prob(batch, 0, finer)
        return float(difference.abs().mean()) / self._flow.dim

    def _log_prob(self, batch: Batch, number: int, solver: SolverConfig) -> Tensor:
        """Log-densities of the batch of that number."""
        random, penalties = generator(self._config.seed, "validation", number), self._config.penalties
        x, context = self._flow.admit(batch.x, batch.context)
        draw = self._flow.draw(penalties.estimator, random, noise=penalties.noise)
        return self._flow.solve(x, draw, solver, context=context, generator=random).log_prob
