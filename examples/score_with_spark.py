"""Scores a table with Spark: an exported flow in mapInPandas, which gives each worker its batches of rows.

    python examples/score_with_spark.py [--quick] [--out DIR]

The program that is exported needs torch alone, so that workers need not have pyrnode; a cluster's master takes the
place of the two local threads. Prints how far the scores are from those of one process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from exported_flow import compare


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


if __name__ == "__main__":
    compare(score, "score_with_spark", __doc__)
