"""The paper's step-size heuristic: which solver is the cheapest that is still right?

    python examples/reproduce_steps.py [--quick] [--scale cpu] [--out DIR]

Prints every solver's difference to an accurate one, and its evaluations, for a flow with penalties and one without.
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
    (finding,) = pyrnode.reproduce("steps", scale=scale, out=args.out, progress=False)
    for row in finding.tables["steps"]:
        print(f"{row['flow']:<16} {row['solver']:<24} off by {row['off by (bits/dim)']:.1e} bits/dim, nfe {row['nfe']}")
    return finding.numbers


if __name__ == "__main__":
    main()
