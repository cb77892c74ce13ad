"""Table 1 of the paper: bits per dimension and training time, next to the published rows.

    python examples/reproduce_table1.py [--quick] [--scale cpu] [--out DIR]

Prints the table. Dequantised and bin-centre scores are different quantities, each in a column of its own.
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
    (finding,) = pyrnode.reproduce("table1", scale=scale, out=args.out, progress=False)
    for row in finding.tables["table1"]:
        print("  ".join(f"{value:<24}" for value in row.values()).rstrip())
    return finding.numbers


if __name__ == "__main__":
    main()
