"""Softplus and its slope in one pass, and their transpose in another, by ``softplus.c``; float32 on the CPU.

As torch's operations, each of which reads and writes all of its operands, the two take nine and three passes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_long, c_void_p

import torch
from torch import Tensor

from pyrnode import native
from pyrnode.native.threads import ranges

_BLOCK = 1024
"""Numbers that stay with one thread: whole vectors, whatever the number of threads."""


def activate(a: Tensor) -> Tensor | None:
    """Puts log(1 + eᵃ) in the place of `a` and gives the slope; `None`, with `a` untouched, where it cannot."""
    library = _library(a)
    if library is None:
        return None
    slope = torch.empty_like(a)
    _each(library.activate, a, slope)
    return slope


def pull(bar: Tensor, slope: Tensor, g: Tensor) -> Tensor | None:
    """Of g = φ' r and the cotangent `bar` of g: puts φ' bar in the place of `bar` and gives φ'' r bar.

    `None`, with `bar` untouched, where it cannot.
    """
    library = _library(bar, slope, g)
    if library is None:
        return None
    bend = torch.empty_like(bar)
    _each(library.pull, bar, slope, g, bend)
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
    library = native.library("softplus")
    if library is not None:
        library.activate.argtypes = [c_void_p] * 2 + [c_long]
        library.pull.argtypes = [c_void_p] * 4 + [c_long]
    return library


def _each(function: Callable[..., None], *tensors: Tensor) -> None:
    count, addresses = tensors[0].numel(), [x.data_ptr() for x in tensors]

    def work(start: int, stop: int) -> None:
        first, last = start * _BLOCK, min(stop * _BLOCK, count)
        function(*(address + 4 * first for address in addresses), last - first)

    ranges(work, -(-count // _BLOCK))
