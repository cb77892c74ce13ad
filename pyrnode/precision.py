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
                stack.enter_context(_FLOAT32.by(exact=True))
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


class _Float32:
    """Torch's switches are the whole process's, and threads may want them otherwise at the same time.

    What a thread wants is what it has asked for last. IEEE's rules are kept as long as any thread wants them: a score
    beside a training step in TF32 stays what it is, and that step's products become finer for a moment, never coarser.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wishes: dict[int, list[bool]] = {}  # of each thread, the last one counts; true is IEEE's rules
        self._before: list[Any] = []
        self._exact: bool | None = None

    @contextmanager
    def by(self, exact: bool) -> Iterator[None]:
        """Float32 by IEEE's rules, or in TF32 where nobody wants those."""
        thread = threading.get_ident()
        with self._lock:
            if not self._wishes:
                self._before = [getattr(owner, name) for owner, name, _ in switches()]
            self._wishes.setdefault(thread, []).append(exact)
            self._set()
        try:
            yield
        finally:
            with self._lock:
                self._wishes[thread].pop()
                if not self._wishes[thread]:
                    del self._wishes[thread]
                self._set()

    def _set(self) -> None:
        exact = any(wishes[-1] for wishes in self._wishes.values()) if self._wishes else None
        if exact == self._exact:
            return
        self._exact = exact
        for (owner, name, ieee), before in zip(switches(), self._before, strict=True):
            coarse = "tf32" if ieee == "ieee" else True
            setattr(owner, name, before if exact is None else ieee if exact else coarse)


_FLOAT32 = _Float32()


def has_tf32(device: torch.device) -> bool:
    """Whether products of float32 there can be in TF32; elsewhere its rounding is imitated."""
    return device.type == "cuda"


def gains(device: torch.device) -> bool:
    """Whether coarser products are faster there: a GPU with tensor cores for TF32 and bfloat16."""
    return has_tf32(device) and torch.cuda.get_device_capability(device) >= (8, 0)


@contextmanager
def coarse_products() -> Iterator[None]:
    """Products and convolutions on a GPU in TF32, while no thread wants IEEE's."""
    with _FLOAT32.by(exact=False):
        yield


_DROPPED = 13
"""Bits of a float32's significand that TF32 does not have."""


def tf32(x: Tensor) -> Tensor:
    """`x`, of float32, rounded to TF32's 10 bits: to the nearest, and to the even one of two that are as near."""
    bits = x.view(torch.int32)
    half = bits.bitwise_right_shift(_DROPPED).bitwise_and_(1).add_((1 << (_DROPPED - 1)) - 1)
    rounded = half.add_(bits).bitwise_and_(-(1 << _DROPPED)).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x)
