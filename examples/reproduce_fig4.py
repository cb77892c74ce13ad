"""Figure 4 of the paper: what each of the two penalties does, with a fixed-step solver.

    python examples/reproduce_fig4.py [--quick] [--scale cpu] [--out DIR]

Prints kinetic energy and Jacobian norm at the end of training for none, either and both of the penalties.
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
    (finding,) = pyrnode.reproduce("fig4", scale=scale, out=args.out, progress=False)
    for method, label in (("none", "neither"), ("kinetic", "kinetic"), ("jacobian", "Jacobian"), ("rnode", "both")):
        E, n = (finding.numbers[f"{key} {method}"] for key in ("E", "n"))
        print(f"{label:<10} E {E:.3g}, n {n:.3g} per dimension")
    return finding.numbers


if __name__ == "__main__":
    main()
