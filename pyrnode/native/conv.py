"""3×3 convolutions of float32 images in channels-last layout on the CPU, by the kernels of ``conv.c``.

Between many channels and many, `Winograd` takes four times fewer multiplications than the direct sum, with about twice
its rounding errors; between few channels and many, `Direct` does as many, faster than torch.
"""

from __future__ import annotations

import ctypes
import functools
import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from pyrnode import native
from pyrnode.native.threads import function, ranges

FEW = 8
"""Up to how many channels on one side a convolution is summed up directly."""


class _Job(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "shift", "y", "gradient")),
        ("strides", ctypes.c_long * 3),
        *((name, ctypes.c_long) for name in ("height", "width", "inputs", "outputs", "columns", "count", "parts")),
        ("alpha", ctypes.c_double),
    )


_SIDE, _OUT = 6, 4
"""Of a tile of the input, and of its outputs, in conv.c."""

# U = G g Gᵀ for one 3×3 filter g, as one matrix on the filter's nine numbers: (36, 9).
_POINTS = (0, 0.625, -0.625, 1.5, -1.5)
_G = torch.tensor(
    [[p**j / math.prod(p - q for q in _POINTS if q != p) for j in range(3)] for p in _POINTS] + [[0, 0, 1]],
    dtype=torch.float64,
    device="cpu",
)
_GG = torch.kron(_G, _G)


def kernel(weight: Tensor) -> Convolution | None:
    """The convolution with a weight ``(out, in, 3, 3)``; `None` where there is no kernel for it on this machine."""
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or weight.shape[2:] != (3, 3):
        return None
    library = native.library("conv")
    if library is None:
        return None
    outputs, inputs = weight.shape[:2]
    lanes = library.lanes()
    if inputs <= FEW and outputs % lanes == 0:
        return Direct(library, weight)
    if outputs <= FEW and inputs % lanes == 0:
        return Reversed(Direct(library, reversed_filters(weight)))
    return Winograd(library, weight) if inputs % lanes == 0 and outputs % lanes == 0 else None


class Convolution(ABC):
    """A same-size convolution and its transpose, bound to a weight, and the accumulated gradient of the weight.

    Images are float32 on the CPU, contiguous in channels-last layout (``torch.channels_last``); autograd sees nothing.
    """

    @abstractmethod
    def __call__(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """W x (+ shift): ``(batch, in, H, W)`` to ``(batch, out, H, W)``, which `shift` broadcasts to."""

    @abstractmethod
    def transpose(self, y: Tensor, shift: Tensor | None = None) -> Tensor:
        """Wᵀ y (+ shift): ``(batch, out, H, W)`` to ``(batch, in, H, W)``."""

    @abstractmethod
    def accumulate(self, x: Tensor, y: Tensor, alpha: float) -> None:
        """Adds ``alpha Σ y xᵀ`` to the gradient, of ``(batch, in, H, W)`` and ``(batch, out, H, W)``."""

    @abstractmethod
    def gradient(self) -> Tensor:
        """The accumulated gradient of the weight, ``(out, in, 3, 3)``."""


class Winograd(Convolution):
    """From many channels to many, multiples of the library's ``lanes()``.

    Args:
        library: The compiled ``conv.c``.
        weight: ``(out, in, 3, 3)``, float32.
    """

    def __init__(self, library: ctypes.CDLL, weight: Tensor) -> None:
        self._library = library
        self._weight = weight
        self._outputs, self._inputs = weight.shape[:2]

    @functools.cached_property
    def _forward(self) -> Tensor:
        return _transformed(self._weight)

    @functools.cached_property
    def _backward(self) -> Tensor:
        return _transformed(reversed_filters(self._weight))

    @functools.cached_property
    def _gradient(self) -> Tensor:
        return _zeros(len(_GG), self._inputs, self._outputs)  # of the transformed weight

    def __call__(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return self._convolve(self._forward, x, shift)

    def transpose(self, y: Tensor, shift: Tensor | None = None) -> Tensor:
        return self._convolve(self._backward, y, shift)

    def _convolve(self, weight: Tensor, x: Tensor, shift: Tensor | None) -> Tensor:
        inputs, outputs = weight.shape[1:]
        return _convolved(function(self._library, "convolve"), x, weight, shift, (inputs, outputs), _tiles(x))

    def accumulate(self, x: Tensor, y: Tensor, alpha: float) -> None:
        parts = min(-(-torch.get_num_threads() // _SIDE), self._outputs // self._library.lanes())
        job = _job(
            x,
            y,
            (self._inputs, self._outputs),
            gradient=self._gradient.data_ptr(),
            alpha=alpha,
            count=_tiles(x),
            parts=parts,
        )
        ranges(function(self._library, "accumulate"), job, _SIDE * parts)

    def gradient(self) -> Tensor:
        return _filters_of(self._gradient)


class Direct(Convolution):
    """From few channels, up to `FEW`, to many, a multiple of the library's ``lanes()``.

    Args:
        library: The compiled ``conv.c``.
        weight: ``(out, in, 3, 3)``, float32.
    """

    def __init__(self, library: ctypes.CDLL, weight: Tensor) -> None:
        self._library, self._weight = library, weight
        self._many, self._few = weight.shape[:2]

    @functools.cached_property
    def _forward(self) -> Tensor:
        return self._weight.permute(2, 3, 1, 0).reshape(9 * self._few, self._many).contiguous()

    @functools.cached_property
    def _backward(self) -> Tensor:
        length, lanes = 9 * self._few, self._library.lanes()
        weight = _zeros(self._many, -(-length // lanes) * lanes)
        weight[:, :length] = self._weight.flip(2, 3).permute(0, 2, 3, 1).reshape(self._many, length)
        return weight

    @functools.cached_property
    def _gradient(self) -> Tensor:
        return _zeros(9 * self._few, self._many)

    def __call__(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        batch, _, height, width = x.shape
        count, channels = batch * height * width, (self._few, self._many)
        return _convolved(function(self._library, "widen"), x, self._forward, shift, channels, count)

    def transpose(self, y: Tensor, shift: Tensor | None = None) -> Tensor:
        return _convolved(function(self._library, "narrow"), y, self._backward, shift, (self._many, self._few), len(y))

    def accumulate(self, x: Tensor, y: Tensor, alpha: float) -> None:
        parts = min(torch.get_num_threads(), self._many // self._library.lanes())
        batch, _, height, width = x.shape
        job = _job(
            x,
            y,
            (self._few, self._many),
            gradient=self._gradient.data_ptr(),
            alpha=alpha,
            count=batch * height * width,
            parts=parts,
        )
        ranges(function(self._library, "accumulate_patches"), job, parts)

    def gradient(self) -> Tensor:
        filters = self._gradient.view(3, 3, self._few, self._many)
        return filters.permute(3, 2, 0, 1).contiguous()


class Reversed(Convolution):
    """A convolution as the transpose of another."""

    def __init__(self, other: Convolution) -> None:
        self._other = other

    def __call__(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return self._other.transpose(x, shift)

    def transpose(self, y: Tensor, shift: Tensor | None = None) -> Tensor:
        return self._other(y, shift)

    def accumulate(self, x: Tensor, y: Tensor, alpha: float) -> None:
        self._other.accumulate(y, x, alpha)

    def gradient(self) -> Tensor:
        return reversed_filters(self._other.gradient())


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


def reversed_filters(weight: Tensor) -> Tensor:
    """The weight ``(in, out, 3, 3)`` of the transpose of the convolution with a weight ``(out, in, 3, 3)``."""
    return weight.flip(2, 3).transpose(0, 1)


def _transformed(weight: Tensor) -> Tensor:
    """U ``(36, in, out)`` of a weight ``(out, in, 3, 3)``."""
    outputs, inputs = weight.shape[:2]
    filters = weight.permute(2, 3, 1, 0).reshape(9, -1).double()
    return (_GG @ filters).view(-1, inputs, outputs).to(torch.float32)


def _filters_of(gradient: Tensor) -> Tensor:
    """The gradient of a weight, ``(out, in, 3, 3)``, from that of its U, ``(36, in, out)``."""
    filters = (_GG.T @ gradient.double().flatten(1)).view(3, 3, *gradient.shape[1:])
    return filters.permute(3, 2, 0, 1).to(torch.float32)


def _tiles(x: Tensor) -> int:
    """Number of the tiles that cover the images."""
    batch, _, height, width = x.shape
    return batch * -(-height // _OUT) * -(-width // _OUT)


def _convolved(
    work: Any, x: Tensor, weight: Tensor, shift: Tensor | None, channels: tuple[int, int], count: int
) -> Tensor:
    """W x (+ shift) by a C function of `count` units of work."""
    batch, _, height, width = x.shape
    y = torch.empty(batch, height, width, channels[1], dtype=torch.float32, device="cpu").permute(0, 3, 1, 2)
    job = _job(x, y, channels, weight=weight.data_ptr(), columns=weight.shape[1])
    if shift is not None:
        shift = shift.expand(y.shape)
        if shift.stride(1) != 1:
            shift = shift.contiguous(memory_format=torch.channels_last)
        job.shift, job.strides[:] = shift.data_ptr(), (shift.stride(0), shift.stride(2), shift.stride(3))
    ranges(work, job, count)
    return y


def _job(x: Tensor, y: Tensor, channels: tuple[int, int], **fields: float) -> _Job:
    """A job between the images `x` and `y`, of so many channels each."""
    batch, _, height, width = x.shape
    for images, number in zip((x, y), channels, strict=True):
        shape = (batch, number, height, width)
        laid = images.is_contiguous(memory_format=torch.channels_last)
        if images.dtype != torch.float32 or images.device.type != "cpu" or not laid or images.shape != shape:
            expected = f"float32 images {shape} on the CPU in channels-last layout"
            layout = f"{tuple(images.shape)} with strides {images.stride()}"
            raise TypeError(f"expected {expected}, got {images.dtype}, {images.device}, {layout}")
    sizes = {"height": height, "width": width, "inputs": channels[0], "outputs": channels[1]}
    return _Job(x=x.data_ptr(), y=y.data_ptr(), **sizes, **fields)
