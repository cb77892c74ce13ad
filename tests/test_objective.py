"""What training minimises, against formulas written out by hand on a solution with known numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pyrnode.config import Config, PenaltyConfig
from pyrnode.engines import Solution
from pyrnode.flow import Flow, FlowSolution, base_log_prob
from pyrnode.objective import objective

BATCH, D = 5, 12


@pytest.fixture
def solution() -> FlowSolution:
    """Two blocks: one on all 12 dimensions, one on the 6 that are left after factoring out."""
    blocks = []
    for shape in ((3, 2, 2), (6,)):
        l, E, n, D_ = torch.rand(4, BATCH, dtype=torch.float64).requires_grad_().unbind(0)
        blocks.append(Solution(torch.randn(BATCH, *shape, dtype=torch.float64), l, E, n, D_))
    z = torch.randn(BATCH, D, dtype=torch.float64, requires_grad=True)
    return FlowSolution(z, blocks[0].l + blocks[1].l, blocks)


@pytest.fixture
def log_det() -> Tensor:
    return torch.randn(BATCH, dtype=torch.float64)


def nll_by_hand(solution: FlowSolution, log_det: Tensor) -> float:
    total = 0.0
    for i, z in enumerate(solution.z.tolist()):
        normal = sum(-0.5 * v**2 - 0.5 * math.log(2 * math.pi) for v in z)
        total -= normal + sum(block.l.tolist()[i] for block in solution.blocks) + log_det.tolist()[i]
    return total / BATCH / D


@pytest.mark.parametrize("weights", [(0.0, 0.0, 0.0), (0.3, 0.0, 0.0), (0.0, 0.7, 0.0), (0.3, 0.7, 0.2)])
def test_the_papers_convention(solution: FlowSolution, log_det: Tensor, weights: tuple[float, float, float]) -> None:
    K, J, total = weights
    result = objective(solution, log_det, PenaltyConfig(kinetic=K, jacobian=J, total_derivative=total))
    expected = nll_by_hand(solution, log_det)
    for i in range(BATCH):
        for block in solution.blocks:
            penalty = K * block.E[i] + J * block.n[i] + total * block.D[i]
            expected += penalty.item() / (BATCH * D)
    assert float(result.loss.detach()) == pytest.approx(expected, rel=1e-12)


def test_the_reference_codes_convention(solution: FlowSolution, log_det: Tensor) -> None:
    penalties = PenaltyConfig(kinetic=0.3, jacobian=0.7, total_derivative=0.2, convention="ffjord-rnode")
    expected = nll_by_hand(solution, log_det) / math.log(2)
    for block, dimensions in zip(solution.blocks, (12, 6), strict=True):
        for i in range(BATCH):
            penalty = 0.3 * 0.5 * block.E[i] + 0.7 * block.n[i] + 0.2 * block.D[i]
            expected += penalty.item() / dimensions / BATCH
    result = objective(solution, log_det, penalties)
    assert float(result.loss.detach()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("convention", ["paper", "ffjord-rnode"])
def test_the_parts_are_means_per_dimension_whatever_the_convention(
    solution: FlowSolution, log_det: Tensor, convention: Any
) -> None:
    result = objective(solution, log_det, PenaltyConfig(convention=convention))
    assert float(result.nll) == pytest.approx(nll_by_hand(solution, log_det), rel=1e-12)
    assert result.bits == pytest.approx(nll_by_hand(solution, log_det) / math.log(2), rel=1e-12)
    assert float(result.E) == pytest.approx(sum(b.E.sum().item() for b in solution.blocks) / BATCH / D, rel=1e-12)
    assert float(result.n) == pytest.approx(sum(b.n.sum().item() for b in solution.blocks) / BATCH / D, rel=1e-12)
    assert not any(part.requires_grad for part in (result.nll, result.E, result.n))


@pytest.mark.parametrize(("convention", "factor"), [("paper", 1.0), ("ffjord-rnode", 0.5)])
def test_gradients_of_the_penalties(solution: FlowSolution, log_det: Tensor, convention: Any, factor: float) -> None:
    loss = objective(solution, log_det, PenaltyConfig(kinetic=0.3, jacobian=0.7, convention=convention)).loss
    first, second = solution.blocks
    grads = torch.autograd.grad(loss, [first.E, second.E, first.n, second.n, solution.z])
    dimensions = (12, 12) if convention == "paper" else (12, 6)
    for grad, weight, d in zip(grads[:4], (0.3 * factor, 0.3 * factor, 0.7, 0.7), dimensions * 2, strict=True):
        torch.testing.assert_close(grad, torch.full_like(grad, weight / d / BATCH))
    unit = 1 if convention == "paper" else math.log(2)
    torch.testing.assert_close(grads[4], solution.z.detach() / (BATCH * D * unit))


def test_an_unweighted_penalty_is_not_in_the_graph(solution: FlowSolution, log_det: Tensor) -> None:
    loss = objective(solution, log_det, PenaltyConfig(kinetic=0.0, jacobian=0.7)).loss
    (grad,) = torch.autograd.grad(loss, [solution.blocks[0].E], allow_unused=True)
    assert grad is None


def test_without_penalties_the_loss_is_the_negative_log_likelihood_of_the_flow() -> None:
    config = Config().override({"hidden": [6], "dtype": "float64", "flow.blocks": 2})
    flow = Flow.build(config, (2,), sample=torch.randn(40, 2))
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(7, 2, dtype=torch.float64)
    with torch.no_grad():
        y, log_det = flow.transform(x)
        solution = flow.solve(y, flow.draw("exact", generator=torch.Generator()))
        result = objective(solution, log_det, PenaltyConfig(kinetic=0, jacobian=0))
        expected = -float(flow.log_prob(x, divergence="exact").mean()) / 2
    assert float(result.loss) == pytest.approx(expected, rel=1e-12)
    assert float(base_log_prob(torch.zeros(1, 3))) == pytest.approx(-1.5 * math.log(2 * math.pi))
