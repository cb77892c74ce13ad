"""What the Julia engine leaves behind: nothing that grows."""

from __future__ import annotations

import ctypes
import gc
from itertools import pairwise

import pytest

from pyrnode.config import SolverConfig
from pyrnode.engines import Engine
from tests.test_dynamics import make
from tests.test_julia_engine import solve

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

    gc.collect()
    live = int(_bridge().live_bytes())
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Malloc
    found = mallinfo()
    return live + int(found.uordblks) + int(found.hblkhd)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc what is in use")
def test_memory_is_flat_over_three_thousand_solves(julia_engine: Engine) -> None:
    """What a solve keeps is some 200 kB here, so a leak of it would be 200 MB in each round.

    A leak grows in every round; what the collectors of a process that ran other tests hold on to for a while does not.
    """
    dynamics = make("mlp")
    solvers = [SolverConfig(step_size=0.5, sensealg=name) for name in ("Backprop", "InterpolatingAdjoint")]

    def work(count: int) -> int:
        for number in range(count):
            solve(julia_engine, dynamics, solvers[number % 2], batch=128)
        return in_use()

    work(600)
    rounds = [work(1_000) for _ in range(3)]
    assert min(after - before for before, after in pairwise(rounds)) < 20e6
