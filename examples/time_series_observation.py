"""A posterior given a time series: a recurrent network makes a vector of it, and is trained with the flow.

    python examples/time_series_observation.py [--quick] [--out DIR]

A series of 40 values follows ``x_t = φ x_{t−1} + σ ε_t``, from 0 on. The flow learns p(φ, σ | series) from simulations,
with ``pyrnode.train(theta, context=series, embedding=...)``; all later calls take series. Printed: how far it is from
the exact posterior at five series, in nats (Kullback-Leibler), and how far the prior is; and that the saved model, for
which the network's class has to be named, gives the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from embeddings import Recurrent, exact_posterior, gaps
from torch import Tensor

import pyrnode

LENGTH = 40
LOW, HIGH = torch.tensor([-1.0, 0.5]), torch.tensor([1.0, 2.0])


def simulate(theta: Tensor) -> Tensor:
    """Series ``(n, 40, 1)`` of φ and σ, ``(n, 2)``."""
    values = [torch.zeros(len(theta))]
    for _ in range(LENGTH):
        values.append(theta[:, 0] * values[-1] + theta[:, 1] * torch.randn(len(theta)))
    return torch.stack(values[1:], 1)[..., None]


def prior(n: int) -> Tensor:
    return LOW + (HIGH - LOW) * torch.rand(n, 2)


def posterior(series: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Exact samples for a series ``(40, 1)``, and their log-densities."""
    now = series[:, 0]
    before = torch.cat([torch.zeros(1), now[:-1]])

    def log_likelihood(theta: Tensor) -> Tensor:
        noise = (now - theta[:, :1] * before) / theta[:, 1:]
        return -0.5 * noise.square().sum(1) - LENGTH * theta[:, 1].log()

    return exact_posterior(log_likelihood, LOW, HIGH, 300, n)


def main() -> dict[str, float]:
    """Returns the divergences of flow and prior, and how far the loaded flow is from the trained one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few simulations and steps")
    parser.add_argument("--out", type=Path, default=Path("runs/series"), help="folder of the run")
    args = parser.parse_args()
    torch.manual_seed(0)
    theta = prior(2000 if args.quick else 10_000)
    series = simulate(theta)
    result = pyrnode.train(
        theta,
        context=series,
        embedding=Recurrent,
        bounds={i: (float(a), float(b)) for i, (a, b) in enumerate(zip(LOW, HIGH, strict=True))},
        preset="table",
        max_steps=120 if args.quick else 1500,
        validate_every=40 if args.quick else 150,
        evaluate=False,
        progress=False,
        out=args.out,
        resume=True,
    )
    flow = result.flow

    observed = simulate(prior(5))
    values = gaps(flow, observed, [posterior(each, 400) for each in observed], LOW, HIGH)
    print(f"from the exact posterior, nats: the prior {values['prior']:.2f}, the flow {values['flow']:.2f}")

    samples = flow.sample(1000, observed, seed=0)
    print(f"1,000 samples for each of five series: {tuple(samples.shape)}")
    loaded = pyrnode.load(args.out, embedding=Recurrent)  # or embedding="embeddings:Recurrent"
    with torch.no_grad():
        one, other = (density.log_prob(theta[:50], series[:50]) for density in (flow, loaded))
    values["loaded"] = float((one - other).abs().max())
    print(f"the saved model differs by {values['loaded']:.1g}")
    return values


if __name__ == "__main__":
    main()
