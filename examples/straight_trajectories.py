"""Why regularise: the same density learned with and without penalties, and how straight its particles fly.

    python examples/straight_trajectories.py [--quick] [--out DIR]

Prints, for both flows, path length over distance (1: straight), the variation of speed along the path, and the
evaluations that an accurate adaptive solver needs; writes the two pictures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyrnode
from pyrnode import particles, plotting


def main() -> dict[str, float]:
    """Trains both; returns the evaluations per sample of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps only")
    parser.add_argument("--out", type=Path, default=Path("runs/straight"), help="folder of the pictures")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    overrides = {"max_steps": 60, "data.samples": 1000} if args.quick else {"max_steps": 1000}
    evaluations = {}
    for name, penalty in (("regularised", 0.05), ("unregularised", 0.0)):
        result = pyrnode.train("8gaussians", kinetic=penalty, jacobian=penalty, progress=False, **overrides)
        x = pyrnode.data.load("8gaussians").test.tensor()[:100]
        _, states = particles.particle_paths(result.flow, x, 33)
        straight, speed = particles.straightness(states), particles.speed_variation(states)
        evaluations[name] = result.report.nfe
        print(
            f"{name:<14} length/distance {straight:.3f}, speed varies {speed:.0%}, {evaluations[name]:.0f} evaluations"
        )
        plotting.save(particles.trajectories(result.flow, x), args.out / f"{name}.png")
    return evaluations


if __name__ == "__main__":
    main()
