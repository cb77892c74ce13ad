"""A conditional flow by sbi's rules, where a condition has the shape ``(b, m)`` and an input ``(s, b, d)``."""

from __future__ import annotations

import math
from typing import Any

import torch
from sbi.neural_nets.estimators.base import ConditionalDensityEstimator
from torch import Tensor

from pyrnode.bounded import from_bounds
from pyrnode.flow import Flow
from pyrnode.probes import Probes


class RNODEEstimator(ConditionalDensityEstimator):  # type: ignore[misc]
    """A flow as sbi's `ConditionalDensityEstimator`; `pyrnode.sbi.rnode` builds it.

    Args:
        flow: A conditional flow; ``net`` is its name here.
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__(flow, torch.Size(flow.event_shape), torch.Size([flow.context_dim]))

    def _inside(self, theta: Tensor) -> Tensor:
        return from_bounds(theta, self.net.transform.transforms)

    def log_prob(self, input: Tensor, condition: Tensor, **_: Any) -> Tensor:
        """``log q(θ | x)``, ``(s, b)``."""
        input = input if input.ndim == 3 else input[None]
        lead = torch.broadcast_shapes(input.shape[:-1], condition.shape[:-1])
        theta, x = (value.expand(*lead, -1).flatten(0, 1) for value in (self._inside(input), condition))
        log_prob: Tensor = self.net.log_prob(theta, x)
        return log_prob.reshape(lead)

    def sample(self, sample_shape: torch.Size, condition: Tensor, **_: Any) -> Tensor:
        """Parameters ``(*sample_shape, b, d)``."""
        theta: Tensor = self.net.sample(math.prod(sample_shape), condition)
        theta = theta.transpose(0, 1)
        return theta.reshape(*sample_shape, *condition.shape[:-1], *self.net.event_shape)

    def loss(self, input: Tensor, condition: Tensor, **_: Any) -> Tensor:
        """−log q(θ | x) and the penalties, ``(b,)``, with the training solver, cheaper than the accurate one."""
        flow, config = self.net, self.net.config
        theta, context = flow.admit(self._inside(input), condition)
        passage = flow.solve(theta, Probes.exact, config.solver, context=context)
        lambda_K, lambda_J, _D = config.penalties.weights
        loss: Tensor = lambda_K * passage.total("E") + lambda_J * passage.total("n") - passage.log_prob
        return loss
