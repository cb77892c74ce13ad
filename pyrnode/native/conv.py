"""3×3 convolutions of float32 images in channels-last layout on the CPU, by the Winograd kernel of ``conv.c``.

A convolution takes 2.25 times fewer multiplications than the direct sum; its rounding errors are of the same size.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_long, c_void_p

import torch
from torch import Tensor

from pyrnode import native
from pyrnode.native.threads import parallel

# U = G g Gᵀ for one 3×3 kernel g, as one matrix on the kernel's nine numbers.
_G = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
_GG = torch.kron(_G, _G)  # (16, 9)


def winograd(weight: Tensor) -> Winograd | None:
    """The kernel for a weight ``(out, in, 3, 3)``; `None` where there is none for it on this machine."""
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or weight.shape[2:] != (3, 3):
        return None
    library = native.library("conv")
    if library is None or any(channels % library.lanes() for channels in weight.shape[:2]):
        return None
    return Winograd(library, weight)


class Winograd:
    """A same-size convolution and its transpose, bound to a weight, and the accumulated gradient of the weight.

    Images are float32 on the CPU, contiguous in channels-last layout (``torch.channels_last``); autograd sees nothing.

    Args:
        library: The compiled ``conv.c``.
        weight: ``(out, in, 3, 3)``, float32, of channels that are multiples of the library's ``lanes()``.
    """

    def __init__(self, library: ctypes.CDLL, weight: Tensor) -> None:
        self._library = library
        self._outputs, self._inputs = weight.shape[:2]
        self._forward = _transformed(weight)
        self._backward = _transformed(weight.flip(2, 3).transpose(0, 1))
        self._gradient: Tensor | None = None  # (16, in rounded up, out), of the transformed weight

    def __call__(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """W x (+ shift): ``(batch, in, H, W)`` to ``(batch, out, H, W)``, which `shift` broadcasts to."""
        return self._convolve(self._forward, x, shift)

    def transpose(self, y: Tensor) -> Tensor:
        """Wᵀ y: ``(batch, out, H, W)`` to ``(batch, in, H, W)``."""
        return self._convolve(self._backward, y, None)

    def _convolve(self, weight: Tensor, x: Tensor, shift: Tensor | None) -> Tensor:
        batch, inputs, height, width = _checked(x).shape
        outputs = weight.shape[2]
        y = torch.empty(batch, height, width, outputs).permute(0, 3, 1, 2)
        strides = None
        if shift is not None:
            shift = shift.expand(y.shape)
            if shift.stride(1) != 1:
                shift = shift.contiguous(memory_format=torch.channels_last)
            strides = (c_long * 3)(shift.stride(0), *shift.stride()[2:])

        def work(start: int, stop: int) -> None:
            failed = self._library.convolve(
                _pointer(x),
                _pointer(weight),
                None if shift is None else _pointer(shift),
                strides,
                _pointer(y),
                *map(c_long, (height, width, inputs, outputs, start, stop)),
            )
            _check(failed)

        parallel(work, _tiles(x))
        return y

    def accumulate(self, x: Tensor, y: Tensor, alpha: float) -> None:
        """Adds ``alpha Σ y xᵀ`` to the gradient, of ``(batch, in, H, W)`` and ``(batch, out, H, W)``."""
        _, _, height, width = _checked(x).shape
        _checked(y)
        inputs, outputs, lanes, rows = self._inputs, self._outputs, self._library.lanes(), self._library.block_rows()
        if self._gradient is None:
            self._gradient = torch.zeros(16, -(-inputs // rows) * rows, outputs)
        gradient = self._gradient
        # Every number is summed up by one thread, in one order: 4 rows of the tiles, and more than 4 threads share
        # the outputs of a row.
        parts = min(outputs // lanes, -(-torch.get_num_threads() // 4))
        bounds = [outputs // lanes * i // parts * lanes for i in range(parts + 1)]

        def work(start: int, stop: int) -> None:
            for part in range(start // 4, -(-stop // 4)):
                failed = self._library.accumulate(
                    _pointer(x),
                    _pointer(y),
                    c_float(alpha),
                    _pointer(gradient),
                    *map(c_long, (height, width, inputs, outputs, _tiles(x))),
                    *map(c_int, (max(start - 4 * part, 0), min(stop - 4 * part, 4))),
                    *map(c_long, bounds[part : part + 2]),
                )
                _check(failed)

        parallel(work, 4 * parts)

    def gradient(self) -> Tensor:
        """The accumulated gradient of the weight, ``(out, in, 3, 3)``."""
        if self._gradient is None:
            return torch.zeros(self._outputs, self._inputs, 3, 3)
        transformed = self._gradient[:, : self._inputs].double().flatten(1)
        kernels = (_GG.T @ transformed).view(3, 3, self._inputs, self._outputs)
        return kernels.permute(3, 2, 0, 1).to(torch.float32)


def _transformed(weight: Tensor) -> Tensor:
    """U ``(16, in, out)`` of a weight ``(out, in, 3, 3)``."""
    outputs, inputs = weight.shape[:2]
    kernels = weight.permute(2, 3, 1, 0).reshape(9, -1).double()
    return (_GG @ kernels).view(16, inputs, outputs).to(torch.float32)


def _tiles(x: Tensor) -> int:
    """Number of the tiles of 2×2 pixels that cover the images."""
    batch, _, height, width = x.shape
    return batch * ((height + 1) // 2) * ((width + 1) // 2)


def _checked(x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or x.device.type != "cpu" or not x.is_contiguous(memory_format=torch.channels_last):
        raise TypeError(f"expected float32 images on the CPU in channels-last layout, got {x.dtype} on {x.device}")
    return x


def _pointer(x: Tensor) -> c_void_p:
    return c_void_p(x.data_ptr())


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the buffers of a convolution")
