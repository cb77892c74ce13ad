"""What training minimises (eq. 17 of the paper), and its parts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrnode.composition import Passage
from pyrnode.config import PenaltyConfig


@dataclass
class Objective:
    """The loss of a batch and its parts, each a (weighted) mean over the batch.

    Attributes:
        loss: What is minimised: nats (``convention="paper"``) or bits (``"ffjord-rnode"``) per dimension. The parts
            below are detached from autograd's graph.
        nll: ``−log p(x)``, nats per dimension.
        E: Kinetic energy ``∫ ‖f‖²``, summed over the blocks, per dimension.
        n: ``∫ ‖∂f/∂z‖_F²``, summed over the blocks, per dimension.
        H: ``∫ |∂Φ/∂t − ½‖∇Φ‖²|``, likewise; zero unless it has a weight.
    """

    loss: Tensor
    nll: Tensor
    E: Tensor
    n: Tensor
    H: Tensor

    @property
    def bits(self) -> float:
        """``−log₂ p(x)`` per dimension."""
        return float(self.nll) / math.log(2)


def objective(passage: Passage, penalties: PenaltyConfig, weights: Tensor | None = None) -> Objective:
    """The regularised negative log-likelihood of a batch.

    ``1/(N d) Σ_i [−log p(x_i) + λ_K E_i(T) + λ_J n_i(T)]``, sums running over all blocks (eq. 17); with
    ``convention="ffjord-rnode"``, bits per dimension plus, for every block, ``λ_K ½ E/d_b + λ_J n/d_b`` with ``d_b``
    the block's own dimensions, as in the reference code.

    Args:
        passage: The pass through transform and blocks.
        penalties: ``λ_K``, ``λ_J``, the weights of the total derivative and of H, and the convention.
        weights: Weight of each sample, ``(batch,)``, with mean 1 over the whole training set (not the batch, so that
            the gradient stays unbiased); `None` weighs all alike.
    """

    def mean(values: Tensor) -> Tensor:
        return values.mean() if weights is None else (weights * values).mean()

    d = passage.z.shape[1]
    nll = -mean(passage.log_prob) / d
    if penalties.convention == "paper":
        loss, E, n = regularised(nll, passage, penalties, weights)
        return Objective(loss, nll.detach(), E, n, mean(passage.total("H")).detach() / d)
    lambda_K, lambda_J, lambda_D = penalties.weights
    per_block = [
        mean(lambda_K * 0.5 * block.E + lambda_J * block.n + lambda_D * block.D) / block.z[0].numel()
        for block in passage.blocks
    ]
    if penalties.hjb:
        per_block += [penalties.hjb * mean(block.H) / block.z[0].numel() for block in passage.blocks]
    loss = nll / math.log(2) + torch.stack(per_block).sum()
    E, n, H = (mean(passage.total(name)).detach() / d for name in ("E", "n", "H"))
    return Objective(loss, nll.detach(), E, n, H)


def regularised(
    loss: Tensor, passage: Passage, penalties: PenaltyConfig, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A loss plus the paper's penalties, ``λ_K E + λ_J n`` (and those of the total derivative and of H) per dimension.

    Args:
        loss: What the penalties are added to: nats per dimension of a density (eq. 17), or any other loss.
        passage: The pass through the blocks.
        penalties: The weights; the convention is the paper's.
        weights: As in `objective`.

    Returns:
        The sum, and E and n, detached: means over the batch, summed over the blocks, per dimension.
    """
    d = passage.z.shape[1]

    def mean(values: Tensor) -> Tensor:
        return (values.mean() if weights is None else (weights * values).mean()) / d

    E, n = mean(passage.total("E")), mean(passage.total("n"))
    lambda_K, lambda_J, lambda_D = penalties.weights
    for weight, value in ((lambda_K, E), (lambda_J, n)):
        if weight:
            loss = loss + weight * value
    if lambda_D:
        loss = loss + lambda_D * mean(passage.total("D"))
    if penalties.hjb:
        loss = loss + penalties.hjb * mean(passage.total("H"))
    return loss, E.detach(), n.detach()
