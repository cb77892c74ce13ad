"""Threads for kernels: those of torch's own OpenMP runtime, and Python's own where there is none to be found.

After an operation of torch its threads spin for milliseconds, waiting for the next, and any other threads would have to
share the processors with them. They are entered in C (``threads.c``): a callback would have to wait for Python's lock
in each of them, for longer than many a kernel takes.
"""

from __future__ import annotations

import ctypes
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int, c_long, c_void_p
from typing import Any

import torch

from pyrnode import native

WORK = ctypes.CFUNCTYPE(c_int, c_void_p, c_long, c_long)
"""A kernel's function: its job, and the range of units to be done; gives 1 where memory is short, else 0."""


def ranges(work: Any, job: ctypes.Structure, count: int) -> None:
    """Calls ``work(job, start, stop)`` for ranges that make up ``range(count)``, in as many threads as torch uses.

    Args:
        work: A `WORK`; of a library in C it is its `function`.
        job: What it reads.
        count: Number of units.

    Raises:
        MemoryError: There was no memory for a thread's intermediates.
    """
    parts = max(1, min(torch.get_num_threads(), count))
    address = ctypes.addressof(job)
    team = _team() if parts > 1 else None
    if team is not None:
        library, runtime = team
        failed = library.share(runtime, work, address, count, parts)
    else:
        bounds = [count * i // parts for i in range(parts + 1)]
        others = [_pool(parts - 1).submit(work, address, *bounds[i : i + 2]) for i in range(1, parts)]
        failed = work(address, *bounds[:2])
        failed = any([other.result() for other in others]) or failed
    if failed:
        raise MemoryError("no memory for a kernel's intermediates")


@functools.cache
def function(library: ctypes.CDLL, name: str) -> Any:
    """The function of a library, as `ranges` takes it."""
    return WORK((name, library))


class _Runtime(ctypes.Structure):
    _fields_ = (("parallel", c_void_p), ("number", c_void_p), ("threads", c_void_p))


_PROCESS = os.getpid()


@functools.cache
def _team() -> tuple[ctypes.CDLL, _Runtime] | None:
    """`threads.c`, and the process's OpenMP runtime: GNU's, or another that has its entry points (Intel's, LLVM's)."""
    if os.getpid() != _PROCESS or not torch.backends.openmp.is_available():  # neither kind survives a fork
        return None
    library = native.library("threads")
    try:
        process = ctypes.CDLL(None)
        entries = process.GOMP_parallel, process.omp_get_thread_num, process.omp_get_num_threads
    except (AttributeError, OSError, TypeError):
        return None
    if library is None:
        return None
    library.share.argtypes = [_Runtime, WORK, c_void_p, c_long, c_long]
    return library, _Runtime(*(ctypes.cast(entry, c_void_p) for entry in entries))


@functools.cache
def _pool(size: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(size, thread_name_prefix="pyrnode")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
    os.register_at_fork(after_in_child=_team.cache_clear)
