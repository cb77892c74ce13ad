"""A posterior given an image: a convolutional network makes a vector of it, and is trained with the flow.

    python examples/image_observation.py [--quick] [--out DIR]

A spot of light lies somewhere in an image of 12×12 pixels with noise: where is it, and how bright? The flow learns
p(row, column, brightness | image) from simulations, with ``pyrnode.train(theta, context=images, embedding=...)``; all
later calls take images. Printed: how far it is from the exact posterior at five images, in nats (Kullback-Leibler), and
how far the prior is; and that the saved model, for which the network's function has to be named, gives the same.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from embeddings import convolutional, exact_posterior, gaps
from torch import Tensor

import pyrnode

SIDE, NOISE, WIDTH = 12, 0.5, 0.15
LOW, HIGH = torch.tensor([0.0, 0.0, 0.5]), torch.tensor([1.0, 1.0, 2.0])


def spot(theta: Tensor) -> Tensor:
    """Images ``(n, 1, 12, 12)`` without noise of row, column and brightness, ``(n, 3)``."""
    pixels = (torch.arange(SIDE) + 0.5) / SIDE
    rows, columns = (torch.exp(-0.5 * ((pixels - theta[:, i, None]) / WIDTH) ** 2) for i in (0, 1))
    return theta[:, 2, None, None, None] * (rows[:, :, None] * columns[:, None, :])[:, None]


def simulate(theta: Tensor) -> Tensor:
    image = spot(theta)
    return image + NOISE * torch.randn_like(image)


def prior(n: int) -> Tensor:
    return LOW + (HIGH - LOW) * torch.rand(n, 3)


def posterior(image: Tensor, n: int, cells: int) -> tuple[Tensor, Tensor]:
    """Exact samples for an image ``(1, 12, 12)``, and their log-densities."""

    def log_likelihood(theta: Tensor) -> Tensor:
        pieces = theta.split(20_000)
        return torch.cat([-0.5 * ((image - spot(piece)) / NOISE).square().sum((1, 2, 3)) for piece in pieces])

    return exact_posterior(log_likelihood, LOW, HIGH, cells, n)


def main() -> dict[str, float]:
    """Returns the divergences of flow and prior, and how far the loaded flow is from the trained one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few simulations and steps")
    parser.add_argument("--out", type=Path, default=Path("runs/image"), help="folder of the run")
    args = parser.parse_args()
    torch.manual_seed(0)
    theta = prior(2000 if args.quick else 10_000)
    images = simulate(theta)
    result = pyrnode.train(
        theta,
        context=images,
        embedding=partial(convolutional, channels=8 if args.quick else 16),
        bounds={i: (float(a), float(b)) for i, (a, b) in enumerate(zip(LOW, HIGH, strict=True))},
        preset="table",
        max_steps=150 if args.quick else 2000,
        validate_every=50 if args.quick else 200,
        evaluate=False,
        progress=False,
        out=args.out,
        resume=True,
    )
    flow = result.flow

    observed = simulate(prior(5))
    exact = [posterior(image, 400, 40 if args.quick else 60) for image in observed]
    values = gaps(flow, observed, exact, LOW, HIGH)
    print(f"from the exact posterior, nats: the prior {values['prior']:.2f}, the flow {values['flow']:.2f}")

    samples = flow.sample(1000, observed[0], seed=0)
    inside = bool(((samples > LOW) & (samples < HIGH)).all())
    print(f"1,000 samples for one image: {tuple(samples.shape)}, all within the prior's box: {inside}")
    loaded = pyrnode.load(args.out, embedding=convolutional)  # or embedding="embeddings:convolutional"
    with torch.no_grad():
        one, other = (density.log_prob(theta[:50], images[:50]) for density in (flow, loaded))
    values["loaded"] = float((one - other).abs().max())
    print(f"the saved model differs by {values['loaded']:.1g}")
    return values


if __name__ == "__main__":
    main()
