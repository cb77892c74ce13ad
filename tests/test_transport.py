"""The optimal map between two Gaussians: as a potential in closed form, and as one that is learned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.transport import MODELS, Gaussian, learn, measure
from pyrnode import Config, PotentialDynamics, SolverConfig
from pyrnode.flow import Flow
from pyrnode.probes import Probes


class Geodesic(nn.Module):
    """``Φ = ½ (z − m_t)ᵀ M_t (z − m_t) + mᵀz + ½ t |m|²``.

    With ``B_t = (1 − t) I + t S⁻¹``, ``M_t = (I − S⁻¹) B_t⁻¹`` and ``m_t = (1 − t) m`` its paths are the straight lines
    to the optimal map, and it solves the Hamilton-Jacobi equation: ``M' = M²``.
    """

    def __init__(self, gaussian: Gaussian) -> None:
        super().__init__()
        self.m, self.inverse = nn.Parameter(gaussian.m), nn.Parameter(torch.linalg.inv(gaussian.S))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        eye = torch.eye(len(self.m), dtype=torch.double)
        t = t[:, None, None]
        M = torch.linalg.solve((1 - t) * eye + t * self.inverse, (eye - self.inverse).expand(len(z), -1, -1))
        y = z - (1 - t[:, :, 0]) * self.m
        quadratic = 0.5 * (y[:, None, :] @ M @ y[:, :, None])[:, 0, 0]
        return quadratic + z @ self.m + 0.5 * t[:, 0, 0] * self.m.square().sum()


@pytest.mark.parametrize("d", [2, 10])
def test_the_geodesic_is_optimal_and_solves_the_equation(d: int) -> None:
    gaussian = Gaussian.drawn(d)
    config = Config().override({"dtype": "float64", "engine": "torch", "standardize": "none"})
    flow = Flow.build(config, (d,), dynamics=lambda shape: PotentialDynamics(Geodesic(gaussian), shape))
    x = gaussian.sample(50, torch.Generator().manual_seed(0))
    tight = SolverConfig(name="DP8", rtol=1e-11, atol=1e-11, error_control="all")
    with torch.no_grad():
        passage = flow.solve(x, Probes.exact, tight, hjb=True)
    optimal = gaussian.optimal(x)
    torch.testing.assert_close(passage.z, optimal, rtol=0, atol=1e-8)
    torch.testing.assert_close(passage.log_prob, gaussian.log_prob(x), rtol=0, atol=1e-8)
    torch.testing.assert_close(passage.total("E"), (optimal - x).square().sum(1), rtol=1e-8, atol=1e-8)
    assert float(passage.total("H").max()) < 1e-8
    found = measure(flow, gaussian, n=200)
    assert max(found.map, abs(found.cost), abs(found.energy), abs(found.nats)) < 1e-3


def test_the_cost_is_that_of_the_map() -> None:
    gaussian = Gaussian.drawn(3)
    x = gaussian.sample(200_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(x.T.cov(), gaussian.S @ gaussian.S, rtol=0.02, atol=0.02)
    assert float((gaussian.optimal(x) - x).square().sum(1).mean()) == pytest.approx(gaussian.cost, rel=0.01)


def test_a_potential_learns_the_optimal_map() -> None:
    gaussian = Gaussian.drawn(2)
    flow, _ = learn(gaussian, MODELS["potential"], steps=150, batch=128, width=32, step_size=0.5)
    found = measure(flow, gaussian, n=2000)
    assert found.map < 0.2
    assert abs(found.cost) < 0.15
