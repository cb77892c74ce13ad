"""3×3 convolutions of float32 images in channels-last layout on the CPU, by the kernels of ``conv.c``.

Between many channels and many, `Winograd` takes 2.25 times fewer multiplications than the direct sum, with rounding
errors of the same size; between few channels and many, `Direct` does as many, faster than torch.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable
from ctypes import POINTER, c_float, c_int, c_long, c_void_p

import torch
from torch import Tensor

from pyrnode import native
from pyrnode.native.threads import ranges

FEW = 8
"""Up to how many channels on one side a convolution is summed up directly."""

_ARGUMENTS = {
    "convolve": [c_void_p, c_void_p, c_void_p, POINTER(c_long), c_void_p, *[c_long] * 6],
    "accumulate": [c_void_p, c_void_p, c_float, c_void_p, *[c_long] * 5, c_int, c_int, c_long, c_long],
    "widen": [c_void_p, c_void_p, c_void_p, POINTER(c_long), c_void_p, *[c_long] * 6],
    "narrow": [c_void_p, c_void_p, c_void_p, POINTER(c_long), c_void_p, *[c_long] * 7],
    "accumulate_patches": [c_void_p, c_void_p, c_float, c_void_p, *[c_long] * 7],
}

# U = G g Gᵀ for one 3×3 kernel g, as one matrix on the kernel's nine numbers.
_G = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
_GG = torch.kron(_G, _G)  # (16, 9)


def kernel(weight: Tensor) -> Convolution | None:
    """The convolution with a weight ``(out, in, 3, 3)``; `None` where there is no kernel for it on this machine."""
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or weight.shape[2:] != (3, 3):
        return None
    library = _library()
    if library is None:
        return None
    outputs, inputs = weight.shape[:2]
    lanes = library.lanes()
    if inputs <= FEW and outputs % lanes == 0:
        return Direct(library, weight)
    if outputs <= FEW and inputs % lanes == 0:
        return Reversed(Direct(library, _reversed(weight)))
    return Winograd(library, weight) if inputs % lanes == 0 and outputs % lanes == 0 else None


def _library() -> ctypes.CDLL | None:
    library = native.library("conv")
    if library is not None:
        for name, arguments in _ARGUMENTS.items():
            getattr(library, name).argtypes = arguments
    return library


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
        self._outputs, self._inputs = weight.shape[:2]
        self._forward, self._backward = _transformed(weight), _transformed(_reversed(weight))
        rows = library.block_rows()
        self._gradient = torch.zeros(16, -(-self._inputs // rows) * rows, self._outputs)  # of the transformed weight

    def __call__(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return self._convolve(self._forward, x, shift)

    def transpose(self, y: Tensor, shift: Tensor | None = None) -> Tensor:
        return self._convolve(self._backward, y, shift)

    def _convolve(self, weight: Tensor, x: Tensor, shift: Tensor | None) -> Tensor:
        inputs, outputs = weight.shape[1:]
        return _convolved(self._library.convolve, x, weight, shift, (inputs, outputs), _tiles(x))

    def accumulate(self, x: Tensor, y: Tensor, alpha: float) -> None:
        # Every number is summed up by one thread, in one order: the four rows of the tiles are shared out, and with
        # more than four threads the outputs.
        bounds = _shares(self._outputs, self._library.lanes(), -(-torch.get_num_threads() // 4))
        operands = *_images((x, self._inputs), (y, self._outputs)), alpha, self._gradient.data_ptr()
        sizes = (*x.shape[2:], self._inputs, self._outputs, _tiles(x))

        def work(start: int, stop: int) -> None:
            for part in range(start // 4, -(-stop // 4)):
                rows = max(start - 4 * part, 0), min(stop - 4 * part, 4)
                _check(self._library.accumulate(*operands, *sizes, *rows, *bounds[part : part + 2]))

        ranges(work, 4 * (len(bounds) - 1))

    def gradient(self) -> Tensor:
        transformed = self._gradient[:, : self._inputs].double().flatten(1)
        kernels = (_GG.T @ transformed).view(3, 3, self._inputs, self._outputs)
        return kernels.permute(3, 2, 0, 1).to(torch.float32)


class Direct(Convolution):
    """From few channels, up to `FEW`, to many, a multiple of the library's ``lanes()``.

    Args:
        library: The compiled ``conv.c``.
        weight: ``(out, in, 3, 3)``, float32.
    """

    def __init__(self, library: ctypes.CDLL, weight: Tensor) -> None:
        self._library = library
        self._many, self._few = weight.shape[:2]
        lanes, rows = library.lanes(), library.block_rows()
        length = 9 * self._few
        self._forward = weight.permute(2, 3, 1, 0).reshape(length, self._many).contiguous()
        self._backward = torch.zeros(self._many, -(-length // lanes) * lanes)
        self._backward[:, :length] = weight.flip(2, 3).permute(0, 2, 3, 1).reshape(self._many, length)
        self._gradient = torch.zeros(-(-length // rows) * rows, self._many)

    def __call__(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        batch, _, height, width = x.shape
        count, channels = batch * height * width, (self._few, self._many)
        return _convolved(self._library.widen, x, self._forward, shift, channels, count)

    def transpose(self, y: Tensor, shift: Tensor | None = None) -> Tensor:
        channels, columns = (self._many, self._few), self._backward.shape[1]
        return _convolved(self._library.narrow, y, self._backward, shift, channels, len(y), columns)

    def accumulate(self, x: Tensor, y: Tensor, alpha: float) -> None:
        bounds = _shares(self._many, self._library.lanes(), torch.get_num_threads())
        operands = *_images((x, self._few), (y, self._many)), alpha, self._gradient.data_ptr()
        batch, _, height, width = x.shape
        sizes = (height, width, self._few, self._many, batch * height * width)

        def work(start: int, stop: int) -> None:
            _check(self._library.accumulate_patches(*operands, *sizes, bounds[start], bounds[stop]))

        ranges(work, len(bounds) - 1)

    def gradient(self) -> Tensor:
        kernels = self._gradient[: 9 * self._few].view(3, 3, self._few, self._many)
        return kernels.permute(3, 2, 0, 1).contiguous()


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
        return _reversed(self._other.gradient())


def _reversed(weight: Tensor) -> Tensor:
    """The weight ``(in, out, 3, 3)`` of the transpose of the convolution with a weight ``(out, in, 3, 3)``."""
    return weight.flip(2, 3).transpose(0, 1)


def _transformed(weight: Tensor) -> Tensor:
    """U ``(16, in, out)`` of a weight ``(out, in, 3, 3)``."""
    outputs, inputs = weight.shape[:2]
    kernels = weight.permute(2, 3, 1, 0).reshape(9, -1).double()
    return (_GG @ kernels).view(16, inputs, outputs).to(torch.float32)


def _tiles(x: Tensor) -> int:
    """Number of the tiles of 2×2 pixels that cover the images."""
    batch, _, height, width = x.shape
    return batch * ((height + 1) // 2) * ((width + 1) // 2)


def _shares(channels: int, lanes: int, parts: int) -> list[int]:
    """Bounds of at most `parts` ranges of the channels, multiples of `lanes`."""
    vectors = channels // lanes
    parts = min(parts, vectors)
    return [vectors * i // parts * lanes for i in range(parts + 1)]


def _convolved(
    function: Callable[..., int],
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    channels: tuple[int, int],
    count: int,
    *sizes: int,
) -> Tensor:
    """W x (+ shift) by a C function over ranges of its `count` items; `sizes` are what it takes beyond the images'."""
    inputs, outputs = channels
    batch, _, height, width = x.shape
    y = torch.empty(batch, height, width, outputs).permute(0, 3, 1, 2)
    shift, address, strides = _shift(shift, y)  # kept until the function is done with its memory
    (images,) = _images((x, inputs))

    def work(start: int, stop: int) -> None:
        operands = images, weight.data_ptr(), address, strides, y.data_ptr()
        _check(function(*operands, height, width, inputs, outputs, *sizes, start, stop))

    ranges(work, count)
    return y


def _shift(shift: Tensor | None, y: Tensor) -> tuple[Tensor | None, int | None, ctypes.Array[c_long] | None]:
    """What is added to `y`, its channels side by side; its address, and its strides over images, rows and columns."""
    if shift is None:
        return None, None, None
    shift = shift.expand(y.shape)
    if shift.stride(1) != 1:
        shift = shift.contiguous(memory_format=torch.channels_last)
    return shift, shift.data_ptr(), (c_long * 3)(shift.stride(0), shift.stride(2), shift.stride(3))


def _images(*given: tuple[Tensor, int]) -> tuple[int, ...]:
    """Where images begin in memory, each given with its number of channels; all of one number and size."""
    batch, _, *size = given[0][0].shape
    for x, channels in given:
        laid = x.is_contiguous(memory_format=torch.channels_last)
        if x.dtype != torch.float32 or x.device.type != "cpu" or not laid or x.shape != (batch, channels, *size):
            expected = f"float32 images {(batch, channels, *size)} on the CPU in channels-last layout"
            layout = f"{tuple(x.shape)} with strides {x.stride()}"
            raise TypeError(f"expected {expected}, got {x.dtype}, {x.device}, {layout}")
    return tuple(x.data_ptr() for x, _ in given)


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the buffers of a convolution")
