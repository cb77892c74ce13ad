"""Simulation-based inference: posteriors p(θ | x) from simulations alone, beside the exact ones.

    python examples/simulation_based_inference.py [--quick] [--out DIR]

A conditional flow learns p(θ | x) from pairs (θ, x) drawn from prior and simulator; the likelihood is never evaluated
(neural posterior estimation, Papamakarios & Murray 2016). Two simulators whose posteriors are known: a linear Gaussian,
and the two moons of the benchmark of Lueckmann et al. (2021), whose posterior has two narrow crescents. For each:

* the error of the log-density, E[log p(θ | x) − log q(θ | x)] over the exact posterior, which is KL(p ‖ q) in nats,
  beside that of the untrained flow, a normal as wide as the prior;
* C2ST, how often a classifier tells samples of p and q apart (0.5: not at all; 1: always), and the maximum mean
  discrepancy;
* simulation-based calibration (Talts et al. 2018): the ranks of true parameters among posterior samples must be
  uniform; the p-value of a test that they are, and a picture with the band that 99 % of the bars should be in.
"""

from __future__ import annotations

import argparse
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from scipy import stats
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.distributions import MultivariateNormal

import pyrnode
from pyrnode import plotting
from pyrnode.transforms import Chain, Standardize

BINS = 10


class Simulator(ABC):
    """A prior and a simulator whose posterior is known."""

    name: str
    observed: Tensor
    simulations: int
    steps: int

    @abstractmethod
    def prior(self, n: int) -> Tensor:
        """Parameters ``(n, d)``."""

    @abstractmethod
    def simulate(self, theta: Tensor) -> Tensor:
        """An observation ``(n, m)`` for each of them."""

    @abstractmethod
    def posterior(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """`n` exact samples ``(n, d)`` for an observation ``(m,)``, and their exact log-densities ``(n,)``."""


class LinearGaussian(Simulator):
    """θ ~ N(0, I), x = A θ + 0.5 ε: the posterior is a Gaussian with correlations."""

    name = "linear Gaussian"
    matrix = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -0.5], [0.3, 0.0, 0.7]])
    observed = torch.tensor([0.5, -1.0, 0.8])
    simulations, steps = 20_000, 400

    def prior(self, n: int) -> Tensor:
        return torch.randn(n, 3)

    def simulate(self, theta: Tensor) -> Tensor:
        return theta @ self.matrix.T + 0.5 * torch.randn(len(theta), 3)

    def posterior(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        precision = torch.eye(3) + self.matrix.T @ self.matrix / 0.25
        mean = torch.linalg.solve(precision, self.matrix.T @ x / 0.25)
        density = MultivariateNormal(mean, precision_matrix=precision)
        theta = density.sample((n,))
        return theta, density.log_prob(theta)


class TwoMoons(Simulator):
    """θ ~ U(−1, 1)², x = (r cos a + ¼ − |θ₁ + θ₂|/√2, r sin a + (θ₂ − θ₁)/√2), a ~ U(−π/2, π/2), r ~ N(0.1, 0.01²).

    (θ₁, θ₂) → (|θ₁ + θ₂|, θ₂ − θ₁)/√2 folds the plane at a line and turns it, so that the exact posterior comes from
    drawing (a, r), solving for θ with either sign, and leaving out what is not in the square.
    """

    name = "two moons"
    observed = torch.zeros(2)
    simulations, steps = 100_000, 2000

    def prior(self, n: int) -> Tensor:
        return 2 * torch.rand(n, 2) - 1

    def _noise(self, n: int) -> tuple[Tensor, Tensor]:
        """A point of the crescent ``(n, 2)`` and its log-density."""
        a, r = math.pi * (torch.rand(n) - 0.5), 0.1 + 0.01 * torch.randn(n)
        log_prob = -0.5 * ((r - 0.1) / 0.01) ** 2 - math.log(0.01 * math.sqrt(2 * math.pi)) - (math.pi * r).log()
        return torch.stack((r * a.cos() + 0.25, r * a.sin()), 1), log_prob

    def simulate(self, theta: Tensor) -> Tensor:
        total, difference = theta.sum(1).abs() / math.sqrt(2), (theta[:, 1] - theta[:, 0]) / math.sqrt(2)
        return self._noise(len(theta))[0] + torch.stack((-total, difference), 1)

    def posterior(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        point, log_prob = self._noise(4 * n)
        sign = torch.randint(0, 2, (4 * n,)) * 2 - 1
        total, difference = sign * (point[:, 0] - x[0]), x[1] - point[:, 1]
        theta = torch.stack((total - difference, total + difference), 1) / math.sqrt(2)
        inside = (theta.abs() < 1).all(1) & (point[:, 0] > x[0])
        share = float(inside.double().mean())  # of the two moons that is in the square
        return theta[inside][:n], (log_prob - math.log(2 * share))[inside][:n]


def c2st(p: Tensor, q: Tensor) -> float:
    """Cross-validated accuracy of a classifier between two equally large sets of samples.

    By nearest neighbours: the benchmark's neural network does not find a jitter of two moons as wide as they are thick.
    """
    samples = StandardScaler().fit_transform(torch.cat((p, q)).numpy())
    label = np.repeat([0, 1], len(p))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return float(cross_val_score(KNeighborsClassifier(math.isqrt(len(label))), samples, label, cv=folds).mean())


def mmd(p: Tensor, q: Tensor) -> float:
    """Squared maximum mean discrepancy (unbiased), with a Gaussian kernel as wide as the median distance."""
    p, q = p[:1000], q[:1000]
    width = torch.pdist(p).median()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-0.5 * (torch.cdist(a, b) / width) ** 2)

    n = len(p)
    within = ((kernel(s, s).sum() - n) / (n * (n - 1)) for s in (p, q))
    return float(sum(within) - 2 * kernel(p, q).mean())


def train(theta: Tensor, x: Tensor, steps: int) -> pyrnode.Flow:
    """A conditional flow q(θ | x)."""
    settings = {"flow.network.hidden": [64, 64, 64], "flow.network.activation": "tanh", "penalties.divergence": "exact"}
    settings |= {
        "max_steps": steps,
        "schedule": "cosine",
        "validate_every": max(20, steps // 10),
        "validation_limit": 2000,
    }
    return pyrnode.train(
        theta,
        context=x,
        kinetic=1e-4,
        jacobian=1e-4,
        epochs=steps,  # max_steps ends it
        batch_size=500,
        learning_rate=5e-3,
        evaluate=False,
        progress=False,
        **settings,
    ).flow


def ranks(flow: pyrnode.Flow, simulator: Simulator, runs: int, draws: int) -> np.ndarray:
    """Ranks ``(runs, d)`` of true parameters among `draws` posterior samples each, from 0 to `draws`."""
    theta = simulator.prior(runs)
    samples = flow.sample(draws, simulator.simulate(theta), seed=1)
    return (samples < theta[:, None]).sum(1).numpy()


def uniformity(rank: np.ndarray, draws: int) -> float:
    """The smallest p-value of a χ² test over the parameters, times their number (Bonferroni)."""
    p = [stats.chisquare(np.histogram(r, BINS, (-0.5, draws + 0.5))[0]).pvalue for r in rank.T]
    return float(min(1.0, min(p) * len(p)))


def draw(axes: Any, exact: Tensor, ours: Tensor, rank: np.ndarray, draws: int, name: str) -> None:
    """A row of pictures: samples of the exact posterior, ours, and the ranks."""
    for ax, samples, title in zip(axes, (exact, ours), ("exact posterior", "conditional RNODE"), strict=False):
        ax.scatter(*samples[:2000, :2].T, s=2, alpha=0.4, linewidths=0)
        ax.set(title=f"{name}: {title}", xlabel="θ₁", ylabel="θ₂", aspect="equal")
        ax.set(xlim=axes[0].get_xlim(), ylim=axes[0].get_ylim())
    low, high = stats.binom.ppf([0.005, 0.995], len(rank), 1 / BINS)
    axes[2].axhspan(low, high, color="0.85", label="99 % of the bars, if calibrated")
    edges = np.linspace(-0.5, draws + 0.5, BINS + 1)
    for i, values in enumerate(rank.T):
        axes[2].stairs(np.histogram(values, edges)[0], edges, label=f"θ{'₁₂₃'[i]}")
    axes[2].set(title=f"{name}: ranks", xlabel=f"rank among {draws} posterior samples", ylabel="simulations", ylim=0)
    axes[2].legend(loc="lower center", fontsize="small")


def main() -> dict[str, dict[str, float]]:
    """Returns the numbers for each simulator."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few simulations and steps")
    parser.add_argument("--out", type=Path, default=Path("runs/sbi"), help="folder of the picture")
    args = parser.parse_args()
    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs, draws, samples = (100, 49, 500) if args.quick else (500, 99, 2000)
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 8), layout="constrained")
    results = {}
    for simulator, row in zip((LinearGaussian(), TwoMoons()), axes, strict=True):
        torch.manual_seed(0)
        theta = simulator.prior(2000 if args.quick else simulator.simulations)
        x = simulator.simulate(theta)
        flow = train(theta, x, 150 if args.quick else simulator.steps)
        untrained = pyrnode.Flow.build(
            flow.config,
            flow.event_shape,
            transform=Chain([Standardize.fit(theta.double())]),
            context_dim=flow.context_dim,
            context_transform=Chain([Standardize.fit(x.double())]),
        )
        exact, log_prob = simulator.posterior(simulator.observed, samples)
        with torch.no_grad():
            errors = [float((log_prob - f.log_prob(exact, simulator.observed)).mean()) for f in (flow, untrained)]
        ours = flow.sample(samples, simulator.observed, seed=0)
        rank = ranks(flow, simulator, runs, draws)
        results[simulator.name] = {
            "log-density error": errors[0],
            "untrained": errors[1],
            "C2ST": c2st(exact, ours),
            "MMD²": mmd(exact, ours),
            "calibration p": uniformity(rank, draws),
        }
        print(f"{simulator.name}: " + ", ".join(f"{k} {v:.3g}" for k, v in results[simulator.name].items()))
        draw(row, exact, ours, rank, draws, simulator.name)
    args.out.mkdir(parents=True, exist_ok=True)
    plotting.save(figure, args.out / "posteriors.png")
    print(f"picture in {args.out / 'posteriors.png'}")
    return results


if __name__ == "__main__":
    main()
