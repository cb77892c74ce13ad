"""A flow inside `sbi` (pip install sbi): neural posterior estimation with a conditional RNODE as its density estimator.

    python examples/inside_sbi.py [--quick]

`pyrnode.sbi.rnode` is what sbi's `NPE` takes: sbi trains the flow with its own loop, on the loss of eq. 17, and its
posterior samples from the flow. Printed: the log-density error E[log p(θ | x) − log q(θ | x)] of the posterior of a
linear Gaussian, KL(p ‖ q) in nats, before and after training, and how far the samples' mean and standard deviation are
from the exact ones. Then a prior on a box: none of its posterior's samples is outside, and none needs to be rejected.
"""

from __future__ import annotations

import argparse

import torch
from sbi.inference import NPE
from sbi.utils import BoxUniform
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

from pyrnode.sbi import rnode

SETTINGS = {"hidden": [32, 32], "kinetic": 1e-3, "jacobian": 1e-3, "standardize": "scale", "seed": 0}
MATRIX = torch.tensor([[1.0, 0.5], [-0.3, 0.8]])
OBSERVED = torch.tensor([0.5, -1.0])


def simulate(theta: Tensor) -> Tensor:
    return theta @ MATRIX.T + 0.5 * torch.randn_like(theta)


def main() -> dict[str, float]:
    """Returns the log-density error before and after, errors of mean and standard deviation, and the share outside."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few simulations and epochs")
    args = parser.parse_args()
    torch.manual_seed(0)
    count, training = (1000 if args.quick else 5000), {"training_batch_size": 200, "learning_rate": 5e-3}
    prior = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    theta = prior.sample((count,))
    x = simulate(theta)

    builder = rnode(prior, **SETTINGS)
    inference = NPE(prior, density_estimator=builder, show_progress_bars=False)
    estimator = inference.append_simulations(theta, x).train(max_num_epochs=12 if args.quick else 60, **training)
    posterior = inference.build_posterior(estimator)

    precision = torch.eye(2) + MATRIX.T @ MATRIX / 0.25
    exact = MultivariateNormal(torch.linalg.solve(precision, MATRIX.T @ OBSERVED / 0.25), precision_matrix=precision)
    truth = exact.sample((1000,))
    with torch.no_grad():
        untrained = builder(theta, x).log_prob(truth[:, None], OBSERVED[None])[:, 0]
        trained = posterior.log_prob(truth, x=OBSERVED)
    samples = posterior.sample((2000,), x=OBSERVED, show_progress_bars=False)

    box = BoxUniform(torch.tensor([0.0, -1.0]), torch.tensor([1.0, 0.0]))
    theta = box.sample((count,))
    inference = NPE(box, density_estimator=rnode(box, **SETTINGS), show_progress_bars=False)
    inside = inference.append_simulations(theta, simulate(theta)).train(
        max_num_epochs=6 if args.quick else 30, **training
    )
    drawn = inside.sample((2000,), OBSERVED[None])[:, 0]
    results = {
        "untrained": float((exact.log_prob(truth) - untrained).mean()),
        "trained": float((exact.log_prob(truth) - trained).mean()),
        "mean": float((samples.mean(0) - exact.mean).abs().max()),
        "std": float((samples.std(0) - exact.stddev).abs().max()),
        "outside": float((~box.support.check(drawn)).float().mean()),
    }
    print(f"log-density error: {results['untrained']:.3f} nats untrained, {results['trained']:.3f} nats trained by sbi")
    print(f"of the samples: mean off by {results['mean']:.3f}, standard deviation by {results['std']:.3f} at most")
    print(f"under a prior on a box: {results['outside']:.0%} of the samples outside")
    return results


if __name__ == "__main__":
    main()
