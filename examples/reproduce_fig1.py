"""Figure 1 of the paper: a regularised flow moves its particles straight and at constant speed.

    python examples/reproduce_fig1.py [--quick] [--scale cpu] [--out DIR]

Prints the mean squared change of speed along the paths of both flows, and how well each fits the density.
"""

from __future__ import annotations

import argparse

import pyrnode


def main() -> dict[str, float]:
    """Runs the experiment; returns its headline numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tiny scale: a look, in seconds")
    parser.add_argument("--scale", default="cpu", help="cpu (default) or paper")
    parser.add_argument("--out", default="runs/reproduce", help="folder, shared by all experiments")
    args = parser.parse_args()
    scale = "tiny" if args.quick else args.scale
    (finding,) = pyrnode.reproduce("fig1", scale=scale, out=args.out, progress=False)
    for flow in ("regularised", "unregularised"):
        change, nats = (finding.numbers[f"{key} {flow}"] for key in ("squared change of speed", "nats"))
        print(f"{flow:<14} squared change of speed {change:.3g}, {nats:.4f} nats")
    return finding.numbers


if __name__ == "__main__":
    main()
