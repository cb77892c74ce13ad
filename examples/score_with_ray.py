"""Scores a table with Ray Data: an exported flow, mapped over batches by two actors that have loaded it once.

    python examples/score_with_ray.py [--quick] [--out DIR]

The program that is exported needs torch alone, so that workers need not have pyrnode; a cluster's address takes the
place of the local one. Prints how far the scores are from those of one process.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import pyrnode
from pyrnode import export


class Scorer:
    """Adds log-densities, nats, to batches of columns."""

    def __init__(self, path: str) -> None:
        self.program = torch.export.load(path).module()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        x = torch.tensor(np.stack([batch["x"], batch["y"]], 1), dtype=torch.float32)
        return {**batch, "log_prob": self.program(x)[2].detach().numpy()}


def score(data: Path, flow: Path) -> pd.DataFrame:
    """The scores of a Parquet file, in its order."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        table = ray.data.read_parquet(str(data.resolve()))
        actors = {"batch_size": 200, "fn_constructor_args": [str(flow.resolve())], "concurrency": 1}
        return table.map_batches(Scorer, **actors).to_pandas()
    finally:
        ray.shutdown()


def main() -> dict[str, float]:
    """Trains, exports, scores; returns the largest difference to one process, in nats, and the number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps and rows only")
    parser.add_argument("--out", type=Path, default=Path("runs/score_with_ray"), help="folder of the files")
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


if __name__ == "__main__":
    main()
