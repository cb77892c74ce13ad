"""What the examples of scoring by other engines share: a flow as a program, rows in a file, and the comparison."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pandas as pd

import pyrnode
from pyrnode import export


def compare(score: Callable[[Path, Path], pd.DataFrame], name: str, doc: str | None) -> dict[str, float]:
    """Trains, exports, scores; returns the largest difference to one process, in nats, and the number of rows.

    Args:
        score: Gives the rows of a Parquet file with the column ``log_prob``, in their order, by a flow in a file.
        name: Of the example; its files go to ``runs/NAME`` by default.
        doc: Text of its help.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps and rows only")
    parser.add_argument("--out", type=Path, default=Path("runs") / name, help="folder of the files")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    flow = pyrnode.train("moons", progress=False, evaluate=False, max_steps=30 if args.quick else 1000).flow
    module = flow.to_torch({"name": "RK4", "step_size": 0.1})
    export.save(module, args.out / "flow.pt2")
    x = flow.sample(500 if args.quick else 100_000, seed=0)
    pd.DataFrame(x.numpy(), columns=["x", "y"]).to_parquet(args.out / "x.parquet", row_group_size=len(x) // 4)

    found = score(args.out / "x.parquet", args.out / "flow.pt2")
    expected = module.log_prob(x).detach().numpy()
    difference = float(abs(found["log_prob"].to_numpy() - expected).max())
    print(f"{len(found)} rows, log_prob at most {difference:.1e} nats from those of one process")
    return {"difference": difference, "rows": len(found)}
