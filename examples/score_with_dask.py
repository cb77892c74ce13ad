"""Scores a table with Dask: an exported flow, mapped over the partitions of a data frame.

    python examples/score_with_dask.py [--quick] [--out DIR]

The program that is exported needs torch alone, so that workers need not have pyrnode; a cluster's scheduler takes the
place of the two local processes. Prints how far the scores are from those of one process.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from exported_flow import compare


@lru_cache
def program(path: str) -> Any:
    """The exported flow, loaded once in each worker."""
    return torch.export.load(path).module()


def scored(frame: pd.DataFrame, path: str) -> pd.DataFrame:
    """The frame with a column of log-densities, nats."""
    x = torch.tensor(frame.to_numpy(), dtype=torch.float32)
    log_prob = program(path)(x)[2].detach().numpy() if len(x) else []
    return frame.assign(log_prob=log_prob)


def score(data: Path, flow: Path) -> pd.DataFrame:
    """The scores of a Parquet file, in its order."""
    import dask.dataframe as dd

    table = dd.read_parquet(data, split_row_groups=1)
    meta = table._meta.assign(log_prob=pd.Series(dtype="float32"))
    return table.map_partitions(scored, str(flow), meta=meta).compute(scheduler="processes", num_workers=2)


if __name__ == "__main__":
    compare(score, "score_with_dask", __doc__)
