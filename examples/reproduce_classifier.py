"""The paper's outlook: the same penalties on a classifier, an ODE block before a linear head.

    python examples/reproduce_classifier.py [--quick] [--scale cpu] [--out DIR]

Prints accuracy, evaluations and training time with and without penalties.
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
    (finding,) = pyrnode.reproduce("classifier", scale=scale, out=args.out, progress=False)
    for row in finding.tables["classifier"]:
        cost = f"{row['nfe']:.1f} evaluations, {row['seconds']:.0f} s of training"
        print(f"{row['data']:<8} {row['classifier']:<16} seed {row['seed']}: accuracy {row['accuracy']:.1%}, {cost}")
    return finding.numbers


if __name__ == "__main__":
    main()
