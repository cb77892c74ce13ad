"""Threads for the kernels: Python's own, which run while a call into C has given up the interpreter's lock.

OpenMP in a kernel would be a second runtime beside torch's, and the threads of each would wait for the other's.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def parallel(work: Callable[[int, int], None], count: int) -> None:
    """Calls ``work(start, stop)`` for ranges that together are ``range(count)``, in as many threads as torch uses.

    Args:
        work: Does its range of the items; what it raises is raised here, once all have ended.
        count: Number of items.
    """
    threads = min(torch.get_num_threads(), count)
    if threads <= 1:
        work(0, count)
        return
    bounds = [count * i // threads for i in range(threads + 1)]
    others = [_pool(threads - 1).submit(work, *bounds[i : i + 2]) for i in range(1, threads)]
    try:
        work(*bounds[:2])
    finally:
        errors = [other.exception() for other in others]  # waits
    for error in errors:
        if error is not None:
            raise error


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="pyrnode-native")


if hasattr(os, "register_at_fork"):  # the threads do not survive a fork
    os.register_at_fork(after_in_child=_pool.cache_clear)
