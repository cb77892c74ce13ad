"""Threads for kernels: Python's own, since a call of C leaves the interpreter to others.

A second OpenMP runtime beside torch's would make the two wait for each other.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def parallel(function: Callable[[int], None], count: int) -> None:
    """Calls ``function(0) ... function(count - 1)``, side by side; raises what one raises, once all have ended."""
    others = [_pool(count - 1).submit(function, i) for i in range(1, count)]
    try:
        function(0)
    finally:
        errors = [other.exception() for other in others]
    for error in errors:
        if error is not None:
            raise error


def ranges(function: Callable[[int, int], None], count: int) -> None:
    """Calls ``function(start, stop)`` for ranges that make up ``range(count)``, in as many threads as torch uses."""
    threads = max(1, min(torch.get_num_threads(), count))
    bounds = [count * i // threads for i in range(threads + 1)]
    parallel(lambda i: function(bounds[i], bounds[i + 1]), threads)


@functools.cache
def _pool(size: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(size, thread_name_prefix="pyrnode")


if hasattr(os, "register_at_fork"):  # the threads do not survive a fork
    os.register_at_fork(after_in_child=_pool.cache_clear)
