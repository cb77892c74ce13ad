"""A density with dynamics of your own: any ``nn.Module`` called as ``f(t, z)``, differentiated by nested autograd.

    python examples/own_dynamics.py [--quick]

Shows that a hand-written module and the built-in network with its explicit product learn the same density, and what
the nested differentiation costs.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import pyrnode


class Field(nn.Module):
    """Two tanh layers with time as one more input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim + 1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, dim))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.net(torch.cat((z, t[:, None]), 1))


def main() -> dict[str, float]:
    """Trains both; returns the gap to the true entropy of each, in nats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps only")
    quick = parser.parse_args().quick
    overrides = {"max_steps": 30, "data.samples": 1000} if quick else {"max_steps": 600}
    gaps = {}
    for name, dynamics in (("built in", None), ("own module", lambda shape: Field(*shape))):
        settings = {"flow": {"network": {"hidden": [64, 64], "activation": "tanh"}}, **overrides}
        result = pyrnode.train("8gaussians", dynamics=dynamics, progress=False, **settings)
        seconds = next(r["seconds"] for r in reversed(result.history) if "seconds" in r)
        gaps[name] = result.report.gap
        print(f"{name:<12} gap to the true entropy {gaps[name]:.3f} nats, {seconds:.1f} s of training")
    return gaps


if __name__ == "__main__":
    main()
