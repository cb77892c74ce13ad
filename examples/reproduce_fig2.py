"""Figure 2 of the paper: bits per dimension against training time, vanilla FFJORD beside RNODE.

    python examples/reproduce_fig2.py [--quick] [--scale cpu] [--out DIR]

Prints how many times faster RNODE reaches the same score, with an interval over seeds; the paper's ratio is 2.8.
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
    (finding,) = pyrnode.reproduce("fig2", scale=scale, out=args.out, progress=False)
    ratio, low, high, target = (finding.numbers[key] for key in ("ratio", "low", "high", "target"))
    print(f"to {target:.3f} bits/dim: {ratio:.2f} times faster (95 % interval {low:.2f} to {high:.2f}); the paper: 2.8")
    return finding.numbers


if __name__ == "__main__":
    main()
