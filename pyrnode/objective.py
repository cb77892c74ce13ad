"""What training minimises (eq. 17 of the paper), and its parts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrnode.config import PenaltyConfig
from pyrnode.flow import FlowSolution, base_log_prob


@dataclass
class Objective:
    """The loss of a batch and its parts, each a (weighted) mean over the batch.

    Attributes:
        loss: What is minimised: nats (``convention="paper"``) or bits (``"ffjord-rnode"``) per dimension. The parts
            below are detached from autograd's graph.
        nll: ``−log p(x)``, nats per dimension.
        E: Kinetic energy ``∫ ‖f‖²``, summed over the blocks, per dimension.
        n: ``∫ ‖∂f/∂z‖_F²``, summed over the blocks, per dimension.
    """

    loss: Tensor
    nll: Tensor
    E: Tensor
    n: Tensor

    @property
    def bits(self) -> float:
        """``−log₂ p(x)`` per dimension."""
        return float(self.nll) / math.log(2)


def objective(
    solution: FlowSolution, log_det: Tensor, penalties: PenaltyConfig, weights: Tensor | None = None
) -> Objective:
    """The regularised negative log-likelihood of a batch.

    ``1/(N d) Σ_i [−log p(x_i) + λ_K E_i(T) + λ_J n_i(T)]``, sums running over all blocks (eq. 17); with
    ``convention="ffjord-rnode"``, bits per dimension plus, for every block, ``λ_K ½ E/d_b + λ_J n/d_b`` with ``d_b``
    the block's own dimensions, as in the reference code.

    Args:
        solution: The pass through the blocks.
        log_det: Log-determinant of the fixed transform, nats, ``(batch,)``.
        penalties: ``λ_K``, ``λ_J``, the weight of the total derivative, and the convention.
        weights: Weight of each sample, ``(batch,)``, with mean 1 over the whole training set (not the batch, so that
            the gradient stays unbiased); `None` weighs all alike.
    """

    def mean(values: Tensor) -> Tensor:
        return values.mean() if weights is None else (weights * values).mean()

    d = solution.z.shape[1]
    nll = -mean(base_log_prob(solution.z) + solution.log_det + log_det) / d
    E, n = mean(solution.total("E")) / d, mean(solution.total("n")) / d
    lambda_K, lambda_J, lambda_D = penalties.kinetic, penalties.jacobian, penalties.total_derivative
    if penalties.convention == "paper":
        loss = nll
        for weight, value in ((lambda_K, E), (lambda_J, n)):
            if weight:
                loss = loss + weight * value
        if lambda_D:
            loss = loss + lambda_D * mean(solution.total("D")) / d
        return Objective(loss, nll.detach(), E.detach(), n.detach())
    per_block = [
        mean(lambda_K * 0.5 * block.E + lambda_J * block.n + lambda_D * block.D) / block.z[0].numel()
        for block in solution.blocks
    ]
    loss = nll / math.log(2) + torch.stack(per_block).sum()
    return Objective(loss, nll.detach(), E.detach(), n.detach())
