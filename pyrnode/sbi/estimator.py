"""A conditional flow by sbi's rules, where a condition has the shape ``(b, m)`` and an input ``(s, b, d)``."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from sbi.neural_nets.estimators.base import ConditionalDensityEstimator
from torch import Tensor

from pyrnode.bounded import from_bounds
from pyrnode.config import SolverConfig
from pyrnode.embedding import evaluating
from pyrnode.errors import ConfigError, SolverError
from pyrnode.flow import Flow
from pyrnode.sbi.pace import Pace
from pyrnode.training.ladder import EVERY, Ladder
from pyrnode.training.step import estimator

_COMPARED = 50
"""Samples on which two solvers are compared."""


class RNODEEstimator(ConditionalDensityEstimator):  # type: ignore[misc]
    """A flow as sbi's `ConditionalDensityEstimator`; `pyrnode.sbi.rnode` builds it.

    While it is trained (``estimator.train()``) it takes the training solver, the cheapest that is right, and else the
    accurate one: so what sbi validates by, and stops early by, is the density that is used.

    Args:
        flow: A conditional flow; ``net`` is its name here.
        name: What it is a density of: ``"the parameters"`` or ``"the observations"``.
        conditions: The conditions that it is to be trained with, ``(n, m)``: they are no inputs.
    """

    def __init__(self, flow: Flow, name: str, conditions: Tensor | None = None) -> None:
        super().__init__(flow, torch.Size(flow.event_shape), torch.Size(flow.context_shape))
        config = flow.config
        self._ladder = Ladder(config.solver, config.flow.end_time, config.training.tolerance)
        self._refinement = self._calm = self._losses = 0
        self._name, self._conditions = name, conditions
        self._pace = Pace()

    def train(self, mode: bool = True) -> Self:
        """Puts the weights that are trained in place, or, for use and validation, their average."""
        (self._pace.resume if mode else self._pace.use)(self.net)
        super().train(mode)
        return self

    def _inside(self, theta: Tensor) -> Tensor:
        return from_bounds(theta, self.net.transform.transforms)

    @property
    def solver(self) -> SolverConfig:
        """The present solver: that of training, or the accurate one."""
        return self._ladder[self._refinement] if self.training else self.net.solver

    def log_prob(self, input: Tensor, condition: Tensor, **_: Any) -> Tensor:
        """``log q(θ | x)``, ``(s, b)``, of ``(s, b, d)`` and ``(b, m)`` or ``(s, b, m)``; a 1 for s or b fits all.

        With an embedding m stands for the shape of a condition.
        """
        if self.training and torch.is_grad_enabled():  # sbi's losses of later rounds are made of it
            self._pace.follow(self.net)
        input = input if input.ndim == 3 else input[None]
        density = self.net.distribution(condition, solver=self.solver, validate_args=False)
        log_prob: Tensor = density.log_prob(self._inside(input))
        return log_prob

    def sample(self, sample_shape: torch.Size, condition: Tensor, **_: Any) -> Tensor:
        """Parameters ``(*sample_shape, b, d)``."""
        theta: Tensor = self.net.sample(math.prod(sample_shape), condition)
        theta = theta.transpose(0, 1)
        lead = condition.shape[: condition.ndim - len(self.condition_shape)]
        return theta.reshape(*sample_shape, *lead, *self.net.event_shape)

    def loss(self, input: Tensor, condition: Tensor, **_: Any) -> Tensor:
        """``(b,)``: −log q(θ | x), and in training the penalties besides.

        Raises:
            SolverError: A solve failed, and at half the rate, from the averaged weights, another one.
        """
        if not self.training:
            losses = -self.log_prob(input, condition)[0]
            self._pace.validated(losses)
            return losses
        self._pace.follow(self.net)
        theta, context = self.net.admit(self._inside(input), condition)
        self._recognise(theta)
        if self._losses % EVERY == 0:
            self._adjust(theta, condition)
        self._losses += 1
        try:
            return self._penalised(theta, context)
        except SolverError:
            self._pace.retreat(self.net)
            self._adjust(theta, condition)
            return self._penalised(theta, context)

    def _penalised(self, theta: Tensor, context: Tensor) -> Tensor:
        """The integrand of eq. 17, ``(b,)``, of what `Flow.admit` gives."""
        penalties = self.net.config.penalties
        divergence = estimator(self.net, penalties)
        draw = self.net.draw(divergence, torch.default_generator, noise=penalties.noise)
        passage = self.net.solve(theta, draw, self.solver, context=context)
        lambda_K, lambda_J, _D = penalties.weights
        loss: Tensor = lambda_K * passage.total("E") + lambda_J * passage.total("n") - passage.log_prob
        return loss

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """Refused: it is what sbi's ratio estimation calls.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "ratio estimation (NRE) trains a classifier of pairs (θ, x), and a flow is none: it is a density. Take NPE "
            "with pyrnode.sbi.rnode(prior), or NLE with pyrnode.sbi.likelihood()"
        )

    def _recognise(self, batch: Tensor) -> None:
        """Raises `ConfigError` where the first batch is of what was to be the condition: shapes alone do not tell."""
        known, self._conditions = self._conditions, None
        if known is None or known.shape[1:] != batch.shape[1:]:
            return
        if not bool((known.to(batch) == batch[:1]).flatten(1).all(1).any()):
            return
        posterior = self._name == "the parameters"
        other, remedy = (
            ("observations", "likelihood() for NLE") if posterior else ("parameters", "rnode(prior) for NPE")
        )
        raise ConfigError(
            f"this estimator is a density of {self._name}, and is trained on the {other}: take pyrnode.sbi.{remedy}"
        )

    @torch.no_grad()
    def _adjust(self, theta: Tensor, condition: Tensor) -> None:
        """Takes a finer training solver where the present one is wrong, or a cheaper one, as `pyrnode.train` does."""
        if not self._ladder.moves:
            return
        few, context = theta[:_COMPARED], condition[:_COMPARED]

        def differ(one: SolverConfig, other: SolverConfig) -> float:
            try:
                with evaluating(self.net.embedding):
                    first, second = (self.net.log_prob(few, context, solver=solver) for solver in (one, other))
            except SolverError:
                return math.inf
            mean = float((first - second).abs().mean()) / self.net.dim
            return mean if math.isfinite(mean) else math.inf

        before = self._refinement
        self._refinement, _ = self._ladder.climb(before, differ)
        if self._refinement == before:
            self._refinement, self._calm = self._ladder.descend(before, self._calm, 0, differ)
        else:
            self._calm = 0
