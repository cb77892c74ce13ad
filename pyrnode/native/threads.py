"""Threads for kernels: Python's own, since a call of C leaves the interpreter to others.

A second OpenMP runtime beside torch's would make the two wait for each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def parallel(function: Callable[[int], None], count: int) -> None:
    """Calls ``function(0) ... function(count - 1)``, side by side; raises what one of them raises."""
    others = [_pool(count - 1).submit(function, i) for i in range(1, count)]
    function(0)
    for other in others:
        other.result()


@functools.cache
def _pool(size: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(size, thread_name_prefix="pyrnode")
