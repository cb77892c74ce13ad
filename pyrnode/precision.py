"""In which numbers a flow is computed: those of its tensors, whatever the program around it has chosen for itself.

A program may let torch compute in coarser ones: `torch.autocast` in halves, and TF32, which cuDNN's convolutions take
on a GPU unless they are told otherwise, in 10 bits of a float32's 23. A score, an error or an adaptive step made of
such numbers is not what it says it is. So both are off for the time of a solve and of its pullback, and then again as
they were.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from pyrnode.tracing import recording

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def own_precision(like: Tensor) -> Iterator[None]:
    """Computes in the types of the tensors, which are on the device of `like`."""
    kind = like.device.type
    with ExitStack() as stack:
        if not recording():
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
            if kind != "cpu":
                stack.enter_context(_IEEE.on())
        yield


def in_own_precision(method: Callable[P, R]) -> Callable[P, R]:
    """A method whose first argument is a tensor, computed in `own_precision`."""

    @wraps(method)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        like = next(arg for arg in args if isinstance(arg, Tensor))
        with own_precision(like):
            return method(*args, **kwargs)

    return wrapped


def switches() -> list[tuple[Any, str, Any]]:
    """Torch's switches for float32 on GPUs: owner, name, and the value that means IEEE.

    Since torch 2.9 there is one for each kind of operation, and the older ones refuse to be read beside them.
    """
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):
        owners = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
        return [(owner, "fp32_precision", "ieee") for owner in owners]
    return [(backends.cuda.matmul, "allow_tf32", False), (backends.cudnn, "allow_tf32", False)]


class _Ieee:
    """Torch's switches are the whole process's: the first that comes sets them, the last that goes puts them back."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._before: list[Any] = []

    @contextmanager
    def on(self) -> Iterator[None]:
        """Float32 by IEEE's rules."""
        with self._lock:
            if not self._inside:
                self._before = [getattr(owner, name) for owner, name, _ in switches()]
                for owner, name, exact in switches():
                    setattr(owner, name, exact)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    for (owner, name, _), value in zip(switches(), self._before, strict=True):
                        setattr(owner, name, value)


_IEEE = _Ieee()
