"""Scores a table with Ray Data: an exported flow, mapped over batches by an actor that has loaded it once.

    python examples/score_with_ray.py [--quick] [--out DIR]

The program that is exported needs torch alone, so that workers need not have pyrnode; a cluster's address takes the
place of the local one. Prints how far the scores are from those of one process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from exported_flow import compare


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


if __name__ == "__main__":
    compare(score, "score_with_ray", __doc__)
