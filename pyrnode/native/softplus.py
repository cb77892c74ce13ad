"""Softplus and its slope in one pass, and their transpose in another, by ``softplus.c``; float32 on the CPU.

As torch's operations, each of which reads and writes all of its operands, the two take nine and three passes.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from pyrnode import native
from pyrnode.native.threads import function, ranges

_BLOCK = 1024
"""Numbers that stay with one thread, of which there are so many in softplus.c."""


class _Job(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_void_p) for name in ("values", "slope", "g", "bend")), ("count", ctypes.c_long))


def activate(a: Tensor) -> Tensor | None:
    """Puts log(1 + eᵃ) in the place of `a` and gives the slope; `None`, with `a` untouched, where it cannot."""
    library = _library(a)
    if library is None:
        return None
    slope = torch.empty_like(a)
    _each(function(library, "activate"), values=a, slope=slope)
    return slope


def pull(bar: Tensor, slope: Tensor, g: Tensor) -> Tensor | None:
    """Of g = φ' r and the cotangent `bar` of g: puts φ' bar in the place of `bar` and gives φ'' r bar.

    `None`, with `bar` untouched, where it cannot.
    """
    library = _library(bar, slope, g)
    if library is None:
        return None
    bend = torch.empty_like(bar)
    _each(function(library, "pull"), values=bar, slope=slope, g=g, bend=bend)
    return bend


def _library(*tensors: Tensor) -> ctypes.CDLL | None:
    """The kernels, if the tensors are alike, of their type, and without gaps in memory."""
    first = tensors[0]
    if first.dtype != torch.float32 or first.device.type != "cpu" or torch.is_grad_enabled():
        return None
    layout = torch.channels_last if first.ndim == 4 else torch.contiguous_format
    for x in tensors:
        if x.dtype != first.dtype or x.shape != first.shape or not x.is_contiguous(memory_format=layout):
            return None
    return native.library("softplus")


def _each(work: Any, **arrays: Tensor) -> None:
    count = arrays["values"].numel()
    job = _Job(**{name: x.data_ptr() for name, x in arrays.items()}, count=count)
    ranges(work, job, -(-count // _BLOCK))
