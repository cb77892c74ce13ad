"""Threads for kernels: those of torch's own OpenMP runtime, and Python's own where there is none to be found.

After an operation of torch its threads spin for milliseconds, waiting for the next, and any other threads would have to
share the processors with them. They are entered in C (``threads.c``): a callback would have to wait for Python's lock
in each of them, for longer than many a kernel takes.

Whole solves of images (`apart`) have threads that are made for them: they take longer than that by far, and threads
that sleep, where others would spin, leave the processor to whoever has work.
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
    team = _team() if parts > 1 else None
    if team is None:
        _by_python(work, job, count, parts)
        return
    library, runtime = team
    _check(library.share(runtime, work, ctypes.addressof(job), count, parts))


def apart(work: Any, job: ctypes.Structure, count: int) -> None:
    """As `ranges`, by threads that are made for this call and sleep where they wait.

    Args:
        work: A `WORK` in C.
        job: What it reads.
        count: Number of units.

    Raises:
        MemoryError: There was no memory for a thread's intermediates.
    """
    parts = max(1, min(torch.get_num_threads(), count))
    library = native.library("threads") if parts > 1 else None
    if library is None:
        _by_python(work, job, count, parts)
        return
    library.apart.argtypes = [WORK, c_void_p, c_long, c_long]
    _check(library.apart(work, ctypes.addressof(job), count, parts))


def _by_python(work: Any, job: ctypes.Structure, count: int, parts: int) -> None:
    """The same by Python's threads."""
    address = ctypes.addressof(job)
    bounds = [count * i // parts for i in range(parts + 1)]
    others = [_pool(parts - 1).submit(work, address, *bounds[i : i + 2]) for i in range(1, parts)]
    failed = work(address, *bounds[:2])
    _check(any([other.result() for other in others]) or failed)


def _check(failed: int) -> None:
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
