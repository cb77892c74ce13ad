"""What all tests share: fixed seeds, at most two threads, no display, the folder of real data, and the Julia engine."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch and matplotlib are imported anywhere: OpenMP reads its variable once. Beside another process that
# computes, a second thread makes everything slower.
if "PYTEST_XDIST_WORKER" in os.environ:  # it has the environment of the first process, whose default is below
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MPLBACKEND", "Agg")
# What does not name its engine is tested with PyTorch's, whether Julia is there or not.
os.environ["PYRNODE_ENGINE"] = "torch"
# juliapkg installs whatever is missing when juliacall is imported; no test may download Julia.
os.environ.setdefault("PYTHON_JULIAPKG_OFFLINE", "yes")

import numpy as np
import pytest
import torch

from pyrnode import julia_setup

# A shell without job control starts what runs in the background with Ctrl-C ignored, which pyrnode respects.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--device``."""
    parser.addoption("--device", help="run test_device.py on this device, such as cuda, and not on the pretended one")


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


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what needs Julia where it is not ready: before any fixture, and in one place, so that one line says why."""
    wanted = item.get_closest_marker("needs_julia") or "julia_engine" in getattr(item, "fixturenames", ())
    if wanted and not julia_setup.status().ready:
        pytest.skip(f"the Julia engine is not ready: {julia_setup.status().detail} (see: pyrnode doctor)")


@pytest.fixture(scope="session")
def julia_engine() -> Any:
    """The Julia engine, started once; a test that takes it needs no marker."""
    from pyrnode.engines.julia import JuliaEngine

    return JuliaEngine()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
