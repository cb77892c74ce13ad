"""What all tests share: fixed seeds, at most two threads, no display, and the folder of real data."""

from __future__ import annotations

import os
import random
from pathlib import Path

# Before torch and matplotlib are imported anywhere: OpenMP reads its variable once.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Seeds the global generators, so that no test depends on the tests before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets (`PYRNODE_DATA`); the test is skipped where there is none."""
    name = os.environ.get("PYRNODE_DATA")
    if not name:
        pytest.skip("PYRNODE_DATA is not set: it names the folder that holds MNIST/raw and cifar10-jpeg")
    path = Path(name)
    if not path.is_dir():
        pytest.fail(f"PYRNODE_DATA = {name!r} is not a folder")
    return path
