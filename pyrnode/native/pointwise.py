"""Shift, activation and slope in one pass over a layer's numbers on a GPU, and their pullback in another, by Triton.

As torch's operations they are three launches each, and read and write twice as much (docs/gpu.md). For softplus, tanh
and silu, of float32 and bfloat16 without gaps in memory: vectors, and images with their channels last. Triton comes
with torch on Linux; without it, and with ``PYRNODE_NATIVE=0``, the same is done by torch's operations.

None of it has run on a GPU. It is tested in Triton's interpreter, and compared with torch's operations when a process
first uses it: a kernel that cannot be compiled, or is wrong, is not used, and that is said.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrnode import native
from pyrnode.errors import ConfigError

EXACT: dict[str, Callable[[Tensor], Tensor]] = {"softplus": F.softplus, "tanh": torch.tanh, "silu": F.silu}

NUMBERS = {"softplus": 0, "tanh": 1, "silu": 2}
"""The activations that there are kernels for, by their number in `triton_kernels`."""

DEVICES = ("cuda",)
"""Where they are used."""

_BLOCK = 1024
"""Numbers that one program goes through."""

_MOST = 2**31 - 2 * _BLOCK
"""Numbers that 32 bits count."""


def status() -> native.Status:
    """Whether there are kernels for GPUs here, and for what; nothing is compiled."""
    try:
        if not native.enabled():
            return native.Status(False, f"{native.VARIABLE} turns them off")
    except ConfigError as error:
        return native.Status(False, str(error))
    if importlib.util.find_spec("triton") is None:
        return native.Status(False, "Triton is not installed; torch brings it along on Linux", "pip install triton")
    return native.Status(True, f"Triton, for {', '.join(NUMBERS)}; whole solves of small perceptrons")


def kernels(activation: str, device: torch.device) -> Kernels | None:
    """Those of an activation on a device; `None` where there are none."""
    if device.type not in DEVICES or activation not in NUMBERS or not status().available:
        return None
    return _checked(activation, device)


@functools.cache
def _checked(activation: str, device: torch.device) -> Kernels | None:
    found = Kernels(activation)
    without = f"{activation} on {device} is computed without kernels of Triton"
    return found if agree(lambda: _wrong(found, device), without) else None


def agree(compare: Callable[[], str | None], without: str) -> bool:
    """Whether kernels that this machine has just compiled compute what they should; if not, that is said.

    Args:
        compare: Says how they differ from torch's operations, if they do.
        without: What is the case if they are not used.
    """
    try:
        wrong = compare()
    except Exception as error:  # whatever a compiler that has never been tried raises
        wrong = f"{type(error).__name__}: {error}"
    if not wrong:
        return True
    warnings.warn(f"{without}, slower: {wrong.strip().splitlines()[0]}", stacklevel=3)
    return False


@torch.inference_mode(False)  # in which no gradient could be compared with
def _wrong(found: Kernels, device: torch.device) -> str | None:
    """How kernels differ from torch's operations in double precision, if they do."""
    u = torch.linspace(-20, 20, 1000, dtype=torch.float32, device=device).reshape(50, 20)
    bar, shift = u.flip(0).contiguous(), torch.linspace(-1, 1, 20, dtype=torch.float32, device=device)
    entered = found.activate(u.clone(), None, shift, kept=True, sloped=True)
    assert entered is not None
    a, h, slope = entered
    assert slope is not None
    exact = (u.double() + shift).requires_grad_()
    with torch.enable_grad():
        value = EXACT[found.activation](exact)
        (first,) = torch.autograd.grad(value.sum(), exact, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), exact)
    g = slope if found.activation != "silu" else torch.ones_like(slope)  # of r = 1
    pulled = found.pull(bar.clone()[None], slope, a if found.activation == "silu" else h, g[None])
    again = found.slope(a if found.activation == "silu" else h)
    assert pulled is not None
    assert again is not None
    pairs = (
        (a, exact),
        (h, value),
        (slope, first),
        (again, first),
        (pulled[0][0], second * bar),
        (pulled[1][0], first * bar),
    )
    for name, (x, y) in zip(("shift", "value", "slope", "slope", "bend", "product"), pairs, strict=True):
        if not bool(((x.double() - y).abs() <= 1e-4 * (1 + y.abs())).all()):
            return f"its {name} is not that of torch's operations"
    return None


class Kernels:
    """The kernels of one activation; each gives `None` where its tensors are not of its kind."""

    def __init__(self, activation: str) -> None:
        self.activation, self._number = activation, NUMBERS[activation]
        self._module: Any = importlib.import_module("pyrnode.native.triton_kernels")

    def activate(
        self, u: Tensor, scale: Tensor | None, shift: Tensor, *, kept: bool, sloped: bool
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """``a = scale ⊙ u + shift``, φ(a), and φ'(a) where it is asked for; may overwrite `u` where there is no scale.

        Args:
            u: ``(batch, channels)``, or ``(batch, channels, H, W)`` with its channels last.
            scale: What broadcasts to it, in float32; `None` for 1.
            shift: Likewise.
            kept: Whether anybody reads a; else u, or what stands there, is given in its place.
            sloped: Whether the slope is asked for.
        """
        strides = [_strides(x, u) for x in (shift if scale is None else scale, shift)]
        if not _usable(u) or None in strides:
            return None
        own = u if scale is None else torch.empty_like(u)
        a, h = (own, torch.empty_like(u)) if kept else (u, own)
        slope = torch.empty_like(u) if sloped else None
        at = [number for found in strides for number in found or ()]
        self._launch(
            "activate", u, u, shift if scale is None else scale, shift, a, h, u if slope is None else slope,
            u.numel(), u.shape[1:].numel(), u.shape[1], *at,
            SCALED=scale is not None, KEPT=kept, SLOPED=sloped,
        )  # fmt: skip
        return a, h, slope

    def slope(self, x: Tensor) -> Tensor | None:
        """φ'(a), of ``h = φ(a)``; for silu of a itself."""
        if not _usable(x):
            return None
        slope = torch.empty_like(x)
        self._launch("find_slope", x, x, slope, x.numel())
        return slope

    def pull(self, bar: Tensor, slope: Tensor, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor] | None:
        """``φ'' r ⊙ ḡ`` and ``φ' ⊙ ḡ``; may overwrite ḡ.

        Args:
            bar: ḡ, ``(probes, batch, ...)``.
            slope: φ', ``(batch, ...)``.
            x: h, for silu a, ``(batch, ...)``.
            g: φ' r, for silu r, ``(probes, batch, ...)``.
        """
        alike = bar.shape == g.shape and slope.shape == x.shape == bar.shape[1:]
        flat = bar.flatten(0, 1), g.flatten(0, 1)
        if not alike or not all(_usable(v) for v in (slope, x, *flat)) or flat[0].data_ptr() != bar.data_ptr():
            return None
        bend = torch.empty_like(flat[0])
        self._launch("pull", bar, flat[0], slope, x, flat[1], bend, flat[0], bar.numel(), slope.numel())
        return bend.unflatten(0, bar.shape[:2]), bar

    def _launch(self, name: str, like: Tensor, *args: Any, **settings: Any) -> None:
        count = like.numel()
        if not count:
            return
        here: AbstractContextManager[Any] = torch.cuda.device(like.device) if like.is_cuda else nullcontext()
        with here:
            kernel = getattr(self._module, name)
            kernel[(-(-count // _BLOCK),)](*args, ACTIVATION=self._number, BLOCK=_BLOCK, **settings)


def _usable(x: Tensor) -> bool:
    layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    return (
        x.dtype in (torch.float32, torch.bfloat16)
        and x.ndim in (2, 4)
        and x.numel() < _MOST
        and x.is_contiguous(memory_format=layout)
    )


def _strides(x: Tensor, u: Tensor) -> tuple[int, int, int] | None:
    """Of `x`, as it broadcasts to `u`, by sample, pixel and channel; `None` where pixels are not in a row."""
    if x.dtype != torch.float32:
        return None
    x = x.expand(u.shape)
    n, c, *sides = x.stride()
    if not sides:
        return n, 0, c
    (height, width), (down, right) = u.shape[2:], sides
    if height > 1 and width > 1 and down != width * right:
        return None
    return n, right if width > 1 else down, c
