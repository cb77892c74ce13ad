"""Held-out nats of small tables: what `RNODEDensity` finds by itself, beside what it might have had instead.

    python -m benchmarks.small_tables [--tables iris wine]

The tables, the folds and the two peers, whose parameters are searched, are those of `examples/sklearn_pipeline.py`.
docs/training.md has the numbers.
"""

from __future__ import annotations

import argparse
from typing import Any

from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from examples.sklearn_pipeline import TABLES, held_out, models
from pyrnode.estimator import RNODEDensity

LIGHT: dict[str, Any] = {"kinetic": 0.01, "jacobian": 0.01}
VARIANTS: dict[str, dict[str, Any]] = {
    "λ = 0.01, scaled": {**LIGHT, "overrides": {"flow.standardize": "scale"}},
    "λ = 0.01, whitened": LIGHT,
    "λ = 5 d/n, scaled": {"overrides": {"flow.standardize": "scale"}},
    "silu, λ = 5 d/n, whitened": {"activation": "silu"},
}
"""What is not as it comes."""


def main() -> None:
    """Prints a line a table, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--quick", action="store_true", help="a few steps and two folds only")
    args = parser.parse_args()
    few: dict[str, Any] = {"max_steps": 10} if args.quick else {}
    candidates = models(args.quick) | {
        name: Pipeline([("scale", StandardScaler()), ("density", RNODEDensity(random_state=0, **settings, **few))])
        for name, settings in VARIANTS.items()
    }
    print("| table |", " | ".join(candidates), "|\n|---|" + "---|" * len(candidates))
    for table in args.tables:
        X = TABLES[table]()
        scores = (held_out(model, X, 2 if args.quick else 3) for model in candidates.values())
        cells = [f"{v.mean():.2f} ± {v.std(ddof=1) / len(v) ** 0.5:.2f}" for v in scores]
        print(f"| {table} {X.shape} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
