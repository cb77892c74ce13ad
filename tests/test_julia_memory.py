"""What the Julia engine leaves behind: nothing that grows."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from pyrnode import julia_setup
from pyrnode.config import SolverConfig
from tests.test_dynamics import make
from tests.test_julia_engine import solve

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.needs_julia

_MALLOC = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _Malloc(ctypes.Structure):
    """What glibc says of its memory (`mallinfo2`)."""

    _fields_ = [(name, ctypes.c_size_t) for name in _MALLOC.split()]


def in_use() -> int:
    """Bytes that are in use after both collectors have run: Julia's objects, and what malloc gave to anybody.

    Resident memory has beside them what is held in reserve: hundreds of megabytes of Julia's, whose collector goes by
    the clock, on a machine that does something else.
    """
    from pyrnode.engines.julia import _bridge

    for _ in range(3):  # what one collector lets go of, the other has held
        gc.collect()
        live = int(_bridge().live_bytes())
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Malloc
    found = mallinfo()
    return live + int(found.uordblks) + int(found.hblkhd)


def rounds() -> list[int]:
    """Bytes in use after 600 solves with their gradients, and after each of three thousands more."""
    from pyrnode.engines.julia import JuliaEngine

    engine, dynamics = JuliaEngine(), make("mlp")
    solvers = [SolverConfig(step_size=0.5, sensealg=name) for name in ("Backprop", "InterpolatingAdjoint")]

    def work(count: int) -> int:
        for number in range(count):
            solve(engine, dynamics, solvers[number % 2], batch=128)
        return in_use()

    return [work(count) for count in (600, 1_000, 1_000, 1_000)]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc what is in use")
def test_memory_is_flat_over_three_thousand_solves() -> None:
    """What a solve keeps is some 200 kB here, so a leak of it would be 200 MB in each round.

    In a process of its own: one in which other tests ran is still tidying up after them.
    """
    status = julia_setup.status()
    named = {"PYTHON_JULIACALL_EXE": str(status.executable), "PYTHON_JULIACALL_PROJECT": str(status.project)}
    code = "import tests.test_julia_memory as memory; print(*memory.rounds())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | named, cwd=ROOT, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr
    found = [int(word) for word in done.stdout.splitlines()[-1].split()]
    assert len(found) == 4
    assert max(after - before for before, after in pairwise(found)) < 20e6, found
