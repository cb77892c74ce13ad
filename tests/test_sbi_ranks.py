"""Ranks of true parameters: uniform for the posterior itself, and not for what is too narrow, too wide, or moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from pyrnode.config import Config
from pyrnode.errors import ConfigError, DataError
from pyrnode.flow import Flow
from pyrnode.sbi import ranks

N, BAND = 1000, 0.0515  # with a probability of 99 % the largest distance of one column


class Posterior:
    """Of θ ~ N(0, I), x = θ + ε: N(x/2, I/2), and what is made wrong of it; as sbi's estimators are asked."""

    def __init__(self, scale: float = 1.0, shift: float = 0.0, turned: bool = False) -> None:
        self.scale, self.shift, self.turned = scale, shift, turned

    def _at(self, x: Tensor) -> Independent:
        mean = x / 2 + self.shift
        mean = mean.flip(-1) if self.turned else mean
        return Independent(Normal(mean, torch.full_like(mean, self.scale * 0.5**0.5)), 1)

    def sample(self, shape: torch.Size, x: Tensor) -> Tensor:
        return self._at(x).sample(shape)

    def log_prob(self, theta: Tensor, x: Tensor) -> Tensor:
        return self._at(x).log_prob(theta)


def simulations(n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(n, 2, generator=generator)
    return theta, theta + torch.randn(n, 2, generator=generator)


def test_those_of_the_posterior_are_uniform() -> None:
    found = ranks(Posterior(), *simulations(), names=["a", "b"])
    assert found.names == ("SBC a", "SBC b", "coverage", "TARP")
    assert found.values.shape == (N, 4)
    assert max(found.distances().values()) < BAND
    assert [found.coverage(level) for level in (0.5, 0.8)] == pytest.approx([0.5, 0.8], abs=0.05)
    theta, x = simulations()
    assert torch.equal(found.log_prob, Posterior().log_prob(theta, x))


@pytest.mark.parametrize(
    ("posterior", "seen"),
    [
        (Posterior(scale=0.6), {"SBC θ1", "SBC θ2", "coverage", "TARP"}),
        (Posterior(scale=1.6), {"SBC θ1", "SBC θ2", "coverage", "TARP"}),
        (Posterior(shift=0.4), {"SBC θ1", "SBC θ2", "coverage"}),
    ],
    ids=["too narrow", "too wide", "moved"],
)
def test_what_is_wrong_shows(posterior: Any, seen: set[str]) -> None:
    found = ranks(posterior, *simulations())
    assert {name for name, distance in found.distances().items() if distance > BAND} >= seen
    if posterior.scale != 1:
        assert (found.coverage(0.8) < 0.8) == (posterior.scale < 1)


def test_distances_are_those_of_a_curve_by_hand() -> None:
    found = ranks(Posterior(), *simulations(50))
    for column, distance in enumerate(found.distances().values()):
        u = torch.linspace(0, 1, 20_001, dtype=torch.float64)
        share = (found.values[:, column][:, None] <= u).double().mean(0)
        assert distance == pytest.approx(float((share - u).abs().max()), abs=2e-4)


def test_a_flows_are_those_of_its_own_samples() -> None:
    """Of an untrained flow, a normal whatever the context: right for parameters that are drawn from it."""
    flow = Flow.build(Config().override({"flow.standardize": "none"}), (2,), context_dim=2).eval()
    generator = torch.Generator().manual_seed(1)
    theta, x = (torch.randn(300, 2, generator=generator) for _ in range(2))
    found = ranks(flow, theta, x)
    assert max(found.distances().values()) < 0.095
    assert torch.equal(found.values, ranks(flow, theta, x).values)
    assert not torch.equal(found.values, ranks(flow, theta, x, seed=1).values)
    assert torch.allclose(found.log_prob, flow.log_prob(theta, x).detach())


def test_what_does_not_fit() -> None:
    theta, x = simulations(20)
    with pytest.raises(DataError, match=r"parameters of shape \(20, 2\), observations of \(19, 2\)"):
        ranks(Posterior(), theta, x[1:])
    with pytest.raises(ConfigError, match="1 names for 2 parameters"):
        ranks(Posterior(), theta, x, names=["a"])
    with pytest.raises(ConfigError, match="posterior = int: expected a conditional flow"):
        ranks(3, theta, x)
    with pytest.raises(ConfigError, match="draws"):
        ranks(Posterior(), theta, x, draws=0)
    with pytest.raises(DataError, match="samples of shape"):
        ranks(Posterior(), theta, x[:, None])
