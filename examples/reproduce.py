"""A figure, the table or a claim of the paper, repeated, with its headline numbers.

    python examples/reproduce.py fig1 [--quick] [--scale cpu] [--out DIR]

What `pyrnode.reproduce` gives back is a `Finding`: claims with their verdicts, numbers, tables and figures. Here each
experiment prints what its own numbers say.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pyrnode
from pyrnode.paper import Finding


def fig1(found: Finding) -> None:
    """A regularised flow moves its particles straight and at constant speed."""
    for flow in ("regularised", "unregularised"):
        change, nats = (found.numbers[f"{key} {flow}"] for key in ("squared change of speed", "nats"))
        print(f"{flow:<14} squared change of speed {change:.3g}, {nats:.4f} nats")


def fig2(found: Finding) -> None:
    """Bits per dimension against training time, vanilla FFJORD beside RNODE: how many times faster, over seeds."""
    ratio, low, high, target = (found.numbers[key] for key in ("ratio", "low", "high", "target"))
    print(f"to {target:.3f} bits/dim: {ratio:.2f} times faster (95 % interval {low:.2f} to {high:.2f}); the paper: 2.8")


def fig3(found: Finding) -> None:
    """An adaptive solver's evaluations grow with the Jacobian's norm (along unregularised runs)."""
    value, low, high = (found.numbers[key] for key in ("spearman", "low", "high"))
    print(f"Spearman's correlation {value:.2f} (95 % interval {low:.2f} to {high:.2f})")
    plain, regularised = (found.numbers[f"nfe {method}"] for method in ("ffjord", "rnode"))
    print(f"evaluations at the end: {plain:.0f}, regularised {regularised:.0f}")


def fig4(found: Finding) -> None:
    """What each of the two penalties does, with a fixed-step solver: both integrals at the end of training."""
    for method, label in (("none", "neither"), ("kinetic", "kinetic"), ("jacobian", "Jacobian"), ("rnode", "both")):
        E, n = (found.numbers[f"{key} {method}"] for key in ("E", "n"))
        print(f"{label:<10} E {E:.3g}, n {n:.3g} per dimension")


def fig5(found: Finding) -> None:
    """Samples with and without regularisation, also from the same base points: how far apart those are."""
    for key, value in found.numbers.items():
        print(f"{key}: {value:.3g} grey levels")


def table1(found: Finding) -> None:
    """Bits per dimension and training time beside the published rows; dequantised and bin-centre scores differ."""
    for row in found.tables["table1"]:
        print("  ".join(f"{value:<24}" for value in row.values()).rstrip())


def steps(found: Finding) -> None:
    """The paper's step-size heuristic: every solver's difference to an accurate one, with penalties and without."""
    for row in found.tables["steps"]:
        print(f"{row['flow']:<16} {row['solver']:<24} off by {row['off by (bits/dim)']:.1e} bits/dim, nfe {row['nfe']}")


def classifier(found: Finding) -> None:
    """The paper's outlook: the same penalties on a classifier, an ODE block before a linear head."""
    for row in found.tables["classifier"]:
        cost = f"{row['nfe']:.1f} evaluations, {row['seconds']:.0f} s of training"
        print(f"{row['data']:<8} {row['classifier']:<16} seed {row['seed']}: accuracy {row['accuracy']:.1%}, {cost}")


def potential(found: Finding) -> None:
    """The flows along the gradient of a potential, which the paper leaves out: cost, and how straight they go."""
    for row in found.tables["potential"]:
        cost = f"{row['weights']} weights, {row['evaluations']:.0f} evaluations, {1000 * row['seconds a step']:.3g} ms"
        straight = f"length / distance {row['length / distance']:.3f}"
        print(f"{row['data']:<10} {row['flow']:<17} {row['nats']:.3f} nats, {straight}, {cost} a step")


HEADLINES: dict[str, Callable[[Finding], None]] = {
    tell.__name__: tell for tell in (fig1, fig2, fig3, fig4, fig5, table1, steps, classifier, potential)
}


def main() -> dict[str, float]:
    """Runs the experiment; returns its headline numbers."""
    listing = "\n".join(f"{name:<12}{tell.__doc__}" for name, tell in HEADLINES.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=listing, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=HEADLINES, metavar="NAME", help="one of those below")
    parser.add_argument("--quick", action="store_true", help="the tiny scale: a look, in seconds")
    parser.add_argument("--scale", default="cpu", help="cpu (default) or paper")
    parser.add_argument("--out", default="runs/reproduce", help="folder, shared by all experiments")
    args = parser.parse_args()
    scale = "tiny" if args.quick else args.scale
    (finding,) = pyrnode.reproduce(args.name, scale=scale, out=args.out, progress=False)
    HEADLINES[args.name](finding)
    print(f"report and pictures in {args.out}/{args.name}")
    return finding.numbers


if __name__ == "__main__":
    main()
