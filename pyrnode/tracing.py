"""Where operations are recorded rather than done (`torch.export`), or done for many inputs at once (`torch.vmap`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor


def recording() -> bool:
    """Whether operations are being recorded, so that no value is known."""
    return torch.compiler.is_compiling()


P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def own_precision(like: Tensor) -> Iterator[None]:
    """Computes in the types of the tensors, whatever `torch.autocast` there is around it."""
    if recording() or not torch.is_autocast_enabled(like.device.type):
        yield
        return
    with torch.autocast(like.device.type, enabled=False):
        yield


def in_own_precision(method: Callable[P, R]) -> Callable[P, R]:
    """A method whose first argument is a tensor, computed in `own_precision`."""

    @wraps(method)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        like = next(arg for arg in args if isinstance(arg, Tensor))
        with own_precision(like):
            return method(*args, **kwargs)

    return wrapped


def holds(condition: Tensor) -> bool:
    """A condition on values, true where none are known: while recording, and under `torch.vmap`."""
    if recording():
        return True
    try:
        return bool(condition)
    except RuntimeError as error:
        if "vmap" in str(error):
            return True
        raise
