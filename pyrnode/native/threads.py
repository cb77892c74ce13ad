"""Threads for kernels: those of torch's own OpenMP runtime, and Python's own where there is none to be found.

After an operation of torch its threads spin for milliseconds, waiting for the next, and any other threads would have to
share the processors with them.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def parallel(function: Callable[[int], None], count: int) -> None:
    """Calls ``function(0) ... function(count - 1)``, side by side; raises what one raises, once all have ended."""
    errors: list[BaseException] = []

    def call(i: int) -> None:
        try:
            function(i)
        except BaseException as error:
            errors.append(error)

    openmp = _openmp() if count > 1 else None
    if openmp is not None:

        def member(_: int | None) -> None:
            for i in range(openmp.omp_get_thread_num(), count, openmp.omp_get_num_threads()):
                call(i)

        openmp.GOMP_parallel(_MEMBER(member), None, count, 0)
    else:
        others = [_pool(count - 1).submit(call, i) for i in range(1, count)]
        call(0)
        for other in others:
            other.result()
    if errors:
        raise errors[0]


def ranges(function: Callable[[int, int], None], count: int) -> None:
    """Calls ``function(start, stop)`` for ranges that make up ``range(count)``, in as many threads as torch uses."""
    threads = max(1, min(torch.get_num_threads(), count))
    bounds = [count * i // threads for i in range(threads + 1)]
    parallel(lambda i: function(bounds[i], bounds[i + 1]), threads)


_PROCESS = os.getpid()
_MEMBER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """The process's OpenMP runtime: GNU's, or another that has its entry points, as Intel's and LLVM's have."""
    if os.getpid() != _PROCESS or not torch.backends.openmp.is_available():  # neither kind survives a fork
        return None
    try:
        library = ctypes.CDLL(None)
        library.GOMP_parallel.argtypes = [_MEMBER, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
        _ = library.omp_get_thread_num, library.omp_get_num_threads
    except (AttributeError, OSError, TypeError):
        return None
    return library


@functools.cache
def _pool(size: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(size, thread_name_prefix="pyrnode")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
    os.register_at_fork(after_in_child=_openmp.cache_clear)
