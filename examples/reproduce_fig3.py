"""Figure 3 of the paper: an adaptive solver's evaluations grow with the Jacobian's norm during training.

    python examples/reproduce_fig3.py [--quick] [--scale cpu] [--out DIR]

Prints Spearman's correlation of the two along unregularised runs, and the evaluations at the end of either kind.
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
    (finding,) = pyrnode.reproduce("fig3", scale=scale, out=args.out, progress=False)
    value, low, high = (finding.numbers[key] for key in ("spearman", "low", "high"))
    print(f"Spearman's correlation {value:.2f} (95 % interval {low:.2f} to {high:.2f})")
    plain, regularised = (finding.numbers[f"nfe {method}"] for method in ("ffjord", "rnode"))
    print(f"evaluations at the end: {plain:.0f}, regularised {regularised:.0f}")
    return finding.numbers


if __name__ == "__main__":
    main()
