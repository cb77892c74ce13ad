"""What training minimises, against formulas written out by hand on a solution with known numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pyrnode.composition import Passage, base_log_prob
from pyrnode.config import Config, PenaltyConfig
from pyrnode.engines import Solution
from pyrnode.flow import Flow
from pyrnode.objective import objective
from pyrnode.probes import Probes
from pyrnode.transforms import Chain, Standardize

BATCH, D = 5, 12


@pytest.fixture
def passage() -> Passage:
    """Two blocks: one on all 12 dimensions, one on the 6 that are left after factoring out."""
    blocks = []
    for shape in ((3, 2, 2), (6,)):
        l, E, n, D_, H = torch.rand(5, BATCH, dtype=torch.float64).requires_grad_().unbind(0)
        blocks.append(Solution(torch.randn(BATCH, *shape, dtype=torch.float64), l, E, n, D_, H))
    z = torch.randn(BATCH, D, dtype=torch.float64, requires_grad=True)
    log_det = torch.randn(BATCH, dtype=torch.float64)
    return Passage(torch.zeros_like(z), z, blocks[0].l + blocks[1].l, log_det, blocks)


def nll_by_hand(passage: Passage) -> float:
    total = 0.0
    for i, z in enumerate(passage.z.tolist()):
        normal = sum(-0.5 * v**2 - 0.5 * math.log(2 * math.pi) for v in z)
        total -= normal + sum(block.l.tolist()[i] for block in passage.blocks) + passage.transform_log_det.tolist()[i]
    return total / BATCH / D


@pytest.mark.parametrize("weights", [(0.0, 0.0, 0.0), (0.3, 0.0, 0.0), (0.0, 0.7, 0.0), (0.3, 0.7, 0.2)])
def test_the_papers_convention(passage: Passage, weights: tuple[float, float, float]) -> None:
    K, J, total = weights
    result = objective(passage, PenaltyConfig(kinetic=K, jacobian=J, total_derivative=total))
    expected = nll_by_hand(passage)
    for i in range(BATCH):
        for block in passage.blocks:
            penalty = K * block.E[i] + J * block.n[i] + total * block.D[i]
            expected += penalty.item() / (BATCH * D)
    assert float(result.loss.detach()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("convention", ["paper", "ffjord-rnode"])
def test_the_hamilton_jacobi_penalty(passage: Passage, convention: Any) -> None:
    """Summed over the blocks per dimension of the data, or each block's over its own; its mean is stated likewise."""
    without = objective(passage, PenaltyConfig(convention=convention))
    result = objective(passage, PenaltyConfig(convention=convention, hjb=0.4))
    sizes = (D, D) if convention == "paper" else (12, 6)
    extra = sum(0.4 * float(b.H.detach().sum()) / BATCH / d for b, d in zip(passage.blocks, sizes, strict=True))
    assert float(result.loss.detach()) == pytest.approx(float(without.loss.detach()) + extra, rel=1e-12)
    assert float(result.H) == pytest.approx(sum(b.H.sum().item() for b in passage.blocks) / BATCH / D, rel=1e-12)
    result.loss.backward()


def test_the_reference_codes_convention(passage: Passage) -> None:
    penalties = PenaltyConfig(kinetic=0.3, jacobian=0.7, total_derivative=0.2, convention="ffjord-rnode")
    expected = nll_by_hand(passage) / math.log(2)
    for block, dimensions in zip(passage.blocks, (12, 6), strict=True):
        for i in range(BATCH):
            penalty = 0.3 * 0.5 * block.E[i] + 0.7 * block.n[i] + 0.2 * block.D[i]
            expected += penalty.item() / dimensions / BATCH
    result = objective(passage, penalties)
    assert float(result.loss.detach()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("convention", ["paper", "ffjord-rnode"])
def test_the_parts_are_means_per_dimension_whatever_the_convention(passage: Passage, convention: Any) -> None:
    result = objective(passage, PenaltyConfig(convention=convention))
    assert float(result.nll) == pytest.approx(nll_by_hand(passage), rel=1e-12)
    assert result.bits == pytest.approx(nll_by_hand(passage) / math.log(2), rel=1e-12)
    assert float(result.E) == pytest.approx(sum(b.E.sum().item() for b in passage.blocks) / BATCH / D, rel=1e-12)
    assert float(result.n) == pytest.approx(sum(b.n.sum().item() for b in passage.blocks) / BATCH / D, rel=1e-12)
    assert not any(part.requires_grad for part in (result.nll, result.E, result.n))


@pytest.mark.parametrize(("convention", "factor"), [("paper", 1.0), ("ffjord-rnode", 0.5)])
def test_gradients_of_the_penalties(passage: Passage, convention: Any, factor: float) -> None:
    loss = objective(passage, PenaltyConfig(kinetic=0.3, jacobian=0.7, convention=convention)).loss
    first, second = passage.blocks
    grads = torch.autograd.grad(loss, [first.E, second.E, first.n, second.n, passage.z])
    dimensions = (12, 12) if convention == "paper" else (12, 6)
    for grad, weight, d in zip(grads[:4], (0.3 * factor, 0.3 * factor, 0.7, 0.7), dimensions * 2, strict=True):
        torch.testing.assert_close(grad, torch.full_like(grad, weight / d / BATCH))
    unit = 1 if convention == "paper" else math.log(2)
    torch.testing.assert_close(grads[4], passage.z.detach() / (BATCH * D * unit))


def test_an_unweighted_penalty_is_not_in_the_graph(passage: Passage) -> None:
    loss = objective(passage, PenaltyConfig(kinetic=0.0, jacobian=0.7)).loss
    (grad,) = torch.autograd.grad(loss, [passage.blocks[0].E], allow_unused=True)
    assert grad is None


def test_without_penalties_the_loss_is_the_negative_log_likelihood_of_the_flow() -> None:
    config = Config().override({"hidden": [6], "dtype": "float64", "flow.blocks": 2})
    flow = Flow.build(config, (2,), transform=Chain([Standardize.fit(torch.randn(40, 2).double())]))
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(7, 2, dtype=torch.float64)
    with torch.no_grad():
        result = objective(flow.solve(x, Probes.exact), PenaltyConfig(kinetic=0, jacobian=0))
        expected = -float(flow.log_prob(x, divergence="exact").mean()) / 2
    assert float(result.loss) == pytest.approx(expected, rel=1e-12)
    assert float(base_log_prob(torch.zeros(1, 3))) == pytest.approx(-1.5 * math.log(2 * math.pi))
