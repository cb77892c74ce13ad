"""Scores a table with Spark: an exported flow in mapInPandas, which gives each worker its batches of rows.

    python examples/score_with_spark.py [--quick] [--out DIR]

The program that is exported needs torch alone, so that workers need not have pyrnode; a cluster's master takes the
place of the two local threads. Prints how far the scores are from those of one process.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch

import pyrnode
from pyrnode import export


def scored(frames: Iterator[pd.DataFrame], path: str) -> Iterator[pd.DataFrame]:
    """Frames with a column of log-densities, nats."""
    program = torch.export.load(path).module()  # once for each part of the table
    for frame in frames:
        x = torch.tensor(frame[["x", "y"]].to_numpy(), dtype=torch.float32)
        yield frame.assign(log_prob=program(x)[2].detach().numpy())


def score(data: Path, flow: Path) -> pd.DataFrame:
    """The scores of a Parquet file, in its order."""
    from pyspark.sql import SparkSession

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
    try:
        table = spark.read.parquet(str(data.resolve()))
        path = str(flow.resolve())
        schema = f"{table._jdf.schema().toDDL()}, log_prob float"
        return table.mapInPandas(lambda frames: scored(frames, path), schema).toPandas()
    finally:
        spark.stop()


def main() -> dict[str, float]:
    """Trains, exports, scores; returns the largest difference to one process, in nats, and the number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps and rows only")
    parser.add_argument("--out", type=Path, default=Path("runs/score_with_spark"), help="folder of the files")
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
