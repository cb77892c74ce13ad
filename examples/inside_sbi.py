"""A flow inside `sbi` (pip install sbi): neural posterior estimation with a conditional RNODE as its density estimator.

    python examples/inside_sbi.py [--quick]

sbi's `NPE` takes any callable that builds a `ConditionalDensityEstimator` from parameters and observations. `rnode` is
one: sbi trains the flow with its own loop, on the loss of eq. 17, and its posterior samples from the flow. Printed: the
log-density error E[log p(θ | x) − log q(θ | x)] of the posterior of a linear Gaussian, KL(p ‖ q) in nats, before
and after training, and how far the samples' mean and standard deviation are from the exact ones.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from sbi.inference import NPE
from sbi.neural_nets.estimators.base import ConditionalDensityEstimator
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

from pyrnode import Config, Flow, Probes
from pyrnode.transforms import Chain, Standardize

Builder = Callable[[Tensor, Tensor], ConditionalDensityEstimator]


class RNODEEstimator(ConditionalDensityEstimator):
    """A conditional flow by sbi's rules, where a condition has the shape ``(b, m)`` and an input ``(s, b, d)``."""

    def __init__(self, theta: Tensor, x: Tensor, config: Config) -> None:
        flow = Flow.build(
            config,
            theta.shape[1:],
            transform=Chain([Standardize.fit(theta)]),
            context_dim=x.shape[1],
            context_transform=Chain([Standardize.fit_context(x)]),
        )
        super().__init__(flow, theta.shape[1:], x.shape[1:])

    def log_prob(self, input: Tensor, condition: Tensor, **_: Any) -> Tensor:
        input = input if input.ndim == 3 else input[None]
        lead = torch.broadcast_shapes(input.shape[:-1], condition.shape[:-1])
        theta, x = (value.expand(*lead, -1).flatten(0, 1) for value in (input, condition))
        return self.net.log_prob(theta, x).unflatten(0, lead)

    def sample(self, sample_shape: torch.Size, condition: Tensor, **_: Any) -> Tensor:
        theta = self.net.sample(math.prod(sample_shape), condition)
        return theta.transpose(0, 1).reshape(*sample_shape, *condition.shape[:-1], *self.input_shape)

    def loss(self, input: Tensor, condition: Tensor, **_: Any) -> Tensor:
        """−log q(θ | x) and the penalties, with the training solver, which is cheaper than the accurate one."""
        flow, config = self.net, self.net.config
        theta, context = flow.admit(input, condition)
        passage = flow.solve(theta, Probes.exact, config.solver, context=context)
        penalty = config.penalties.kinetic * passage.total("E") + config.penalties.jacobian * passage.total("n")
        return penalty - passage.log_prob


def rnode(config: Config) -> Builder:
    """What ``NPE(density_estimator=...)`` takes."""
    return lambda theta, x: RNODEEstimator(theta, x, config)


def main() -> dict[str, float]:
    """Returns the log-density error before and after, and the errors of the mean and the standard deviation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few simulations and epochs")
    args = parser.parse_args()
    torch.manual_seed(0)
    matrix = torch.tensor([[1.0, 0.5], [-0.3, 0.8]])
    prior = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    theta = prior.sample((1000 if args.quick else 5000,))
    x = theta @ matrix.T + 0.5 * torch.randn_like(theta)

    settings = {"flow.network.hidden": [32, 32], "flow.network.activation": "tanh"}
    settings |= {"penalties.kinetic": 1e-3, "penalties.jacobian": 1e-3, "step_size": 0.25}
    builder = rnode(Config().override(settings))
    inference = NPE(prior, density_estimator=builder, show_progress_bars=False)
    estimator = inference.append_simulations(theta, x).train(
        training_batch_size=200, learning_rate=5e-3, max_num_epochs=12 if args.quick else 60
    )
    posterior = inference.build_posterior(estimator)

    observed = torch.tensor([0.5, -1.0])
    precision = torch.eye(2) + matrix.T @ matrix / 0.25
    exact = MultivariateNormal(torch.linalg.solve(precision, matrix.T @ observed / 0.25), precision_matrix=precision)
    truth = exact.sample((1000,))
    with torch.no_grad():
        untrained = builder(theta, x).log_prob(truth[:, None], observed[None])[:, 0]
        trained = posterior.log_prob(truth, x=observed)
    samples = posterior.sample((2000,), x=observed, show_progress_bars=False)
    results = {
        "untrained": float((exact.log_prob(truth) - untrained).mean()),
        "trained": float((exact.log_prob(truth) - trained).mean()),
        "mean": float((samples.mean(0) - exact.mean).abs().max()),
        "std": float((samples.std(0) - exact.stddev).abs().max()),
    }
    print(f"log-density error: {results['untrained']:.3f} nats untrained, {results['trained']:.3f} nats trained by sbi")
    print(f"of the samples: mean off by {results['mean']:.3f}, standard deviation by {results['std']:.3f} at most")
    return results


if __name__ == "__main__":
    main()
