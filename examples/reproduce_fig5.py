"""Figure 5 of the paper: samples with and without regularisation, also from the same base points.

    python examples/reproduce_fig5.py [--quick] [--scale cpu] [--out DIR]

Writes the pictures, and prints how far apart the two flows' images of the same base points are.
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
    (finding,) = pyrnode.reproduce("fig5", scale=scale, out=args.out, progress=False)
    for key, value in finding.numbers.items():
        print(f"{key}: {value:.3g} grey levels; pictures in {args.out}/fig5")
    return finding.numbers


if __name__ == "__main__":
    main()
