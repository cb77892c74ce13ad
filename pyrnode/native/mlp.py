"""The compiled solves of a multilayer perceptron (mlp.c) for tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrnode import native
from pyrnode.native.threads import function, ranges

ACTIVATIONS = ("softplus", "tanh", "silu", "gelu", "elu")
"""Names of the activations, in the order of the C source."""

_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}
_ROW_BYTES = 256  # of one feature of a block of samples
_PADDING_BYTES = 128  # a row of a weight's gradient has a multiple of this, and so has all that a thread gathers

_MOST_PARTS, _FEWEST_PARTS = 64, 16
_PARTS_BYTES = 2**26  # of the gradients of all parts, where there are more than the fewest

_INTEGERS = ctypes.POINTER(ctypes.c_int64)
_DOUBLES = ctypes.POINTER(ctypes.c_double)
_ARRAYS = ctypes.POINTER(ctypes.c_void_p)


class _Job(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "layers", "activation", "stages", "steps", "probes")),
        ("weight", ctypes.c_double),
        ("widths", _INTEGERS),
        *((name, _DOUBLES) for name in ("a", "b", "h")),
        *((name, _ARRAYS) for name in ("w", "wt")),
        *((name, ctypes.c_void_p) for name in ("shift", "scale", "z0", "eps")),
        *((name, ctypes.c_void_p) for name in ("z1", "q", "record", "z1_bar", "q_bar", "z0_bar")),
        ("bars", _ARRAYS),
        ("parts", ctypes.c_int64),
    )


def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels, if there are some for numbers of this type on this machine."""
    return native.library("mlp") if dtype in _SUFFIX else None


@dataclass(frozen=True)
class Grid:
    """A fixed-step Runge-Kutta method on a grid: the tableau, and the lengths of the steps."""

    a: Sequence[Sequence[float]]
    b: Sequence[float]
    h: Sequence[float]

    @property
    def stages(self) -> int:
        """Evaluations of the whole solve."""
        return len(self.b) * len(self.h)


class Solve:
    """Forward and reverse solves of the augmented system, over one set of parameters; all tensors are of one type.

    Args:
        library: `library` of that type.
        weights: ``(out, in)`` of every layer.
        shift: What is added in every layer, at every stage: ``(stages, Σ out)``.
        scale: What W h is multiplied by first, of the same shape; `None` for 1.
        activation: One of `ACTIVATIONS`.
        grid: Method and steps.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        weights: list[Tensor],
        shift: Tensor,
        scale: Tensor | None,
        activation: str,
        grid: Grid,
    ) -> None:
        self._library = library
        self.weights = [weight.contiguous() for weight in weights]
        self.transposed = [weight.t().contiguous() for weight in weights]
        self.shift = shift.contiguous()
        self.scale = None if scale is None else scale.contiguous()
        self.activation, self.grid = ACTIVATIONS.index(activation), grid
        self.record: Tensor | None = None

    def forward(self, z0: Tensor, eps: Tensor | None, weight: float, *, record: bool) -> tuple[Tensor, Tensor]:
        """The state at the end time ``(batch, d)``, and l, E, n and 0 ``(batch, 4)`` (no columns without probes).

        Args:
            z0: State at the start, ``(batch, d)``.
            eps: Probes, ``(k, batch, d)``.
            weight: Weight of each probe in the sums.
            record: Keep the stages' states, which `backward` starts from.
        """
        z0 = z0.contiguous()
        z1, q = torch.empty_like(z0), z0.new_zeros(len(z0), 0 if eps is None else 4)
        if record:
            lanes = _ROW_BYTES // z0.element_size()
            self.record = z0.new_empty(_blocks(z0), self.grid.stages, z0.shape[1], lanes)
        self._run("forward", z0, eps, weight, {"z0": z0, "z1": z1, "q": q, "record": self.record}, _blocks(z0))
        return z1, q

    def backward(
        self, z1_bar: Tensor, q_bar: Tensor, eps: Tensor | None, weight: float
    ) -> tuple[Tensor, list[Tensor], Tensor, Tensor | None]:
        """Cotangents of the start state, the weights, the shifts and the scales, given those of `forward`'s results."""
        z1_bar, q_bar = z1_bar.contiguous(), q_bar.contiguous()
        z0_bar = torch.empty_like(z1_bar)
        unit = _PADDING_BYTES // z0_bar.element_size()
        columns = [-(-weight.shape[1] // unit) * unit for weight in self.weights]
        sizes = [len(weight) * n for weight, n in zip(self.weights, columns, strict=True)]
        kinds = [sum(sizes), self.shift.numel(), 0 if self.scale is None else self.scale.numel()]
        kinds.append(-sum(kinds) % unit)  # so that each part's begins at a whole vector, which is how it is written
        parts = _parts(_blocks(z1_bar), sum(kinds) * z0_bar.element_size())
        bars = self.shift.new_zeros(parts, sum(kinds))
        arrays = {"record": self.record, "z1_bar": z1_bar, "q_bar": q_bar, "z0_bar": z0_bar}
        self._run("backward", z1_bar, eps, weight, arrays, parts, bars)
        w_bar, b_bar, s_bar, _ = _total(bars).split(kinds)
        w_bars = [
            bar.view(len(weight), -1)[:, : weight.shape[1]]
            for bar, weight in zip(w_bar.split(sizes), self.weights, strict=True)
        ]
        scale_bar = None if self.scale is None else s_bar.view_as(self.scale)
        return z0_bar, w_bars, b_bar.view_as(self.shift), scale_bar

    def _run(
        self,
        name: str,
        z: Tensor,
        eps: Tensor | None,
        weight: float,
        arrays: dict[str, Tensor | None],
        units: int,
        bars: Tensor | None = None,
    ) -> None:
        """Calls the C function for its units of work; `bars` are gradients, a row for each part of the batch."""
        rows = [] if bars is None else [bar.data_ptr() for bar in bars]
        stages = len(self.grid.b)
        eps = None if eps is None else eps.contiguous()
        a = [row[j] if j < len(row) else 0.0 for row in self.grid.a for j in range(stages)]
        layers = len(self.weights)
        job = _Job(
            batch=len(z),
            layers=layers,
            activation=self.activation,
            stages=stages,
            steps=len(self.grid.h),
            probes=0 if eps is None else len(eps),
            weight=weight,
            widths=(ctypes.c_int64 * (layers + 1))(z.shape[1], *(len(weight) for weight in self.weights)),
            a=(ctypes.c_double * len(a))(*a),
            b=(ctypes.c_double * stages)(*self.grid.b),
            h=(ctypes.c_double * len(self.grid.h))(*self.grid.h),
            w=(ctypes.c_void_p * layers)(*(weight.data_ptr() for weight in self.weights)),
            wt=(ctypes.c_void_p * layers)(*(weight.data_ptr() for weight in self.transposed)),
            shift=self.shift.data_ptr(),
            scale=_pointer(self.scale),
            eps=_pointer(eps),
            bars=(ctypes.c_void_p * len(rows))(*rows),
            parts=len(rows),
            **{key: _pointer(array) for key, array in arrays.items()},
        )
        ranges(function(self._library, f"{name}_{_SUFFIX[z.dtype]}"), job, units)


def _blocks(z: Tensor) -> int:
    lanes = _ROW_BYTES // z.element_size()
    return -(-len(z) // lanes)


def _parts(blocks: int, size: int) -> int:
    """Into how many parts the blocks are divided, whose gradients of so many bytes are summed apart.

    Threads share the parts out among themselves. Their number does not depend on that of the threads, nor do the sums:
    it is large enough to keep many threads busy, and bounded, because every part has gradients of its own.
    """
    return max(1, min(blocks, _MOST_PARTS, max(_FEWEST_PARTS, _PARTS_BYTES // size)))


def _total(bars: Tensor) -> Tensor:
    """The sum of the rows, pair by pair: always in the same order, which torch's own sum leaves to its threads."""
    while len(bars) > 1:
        half = len(bars) // 2
        bars[:half] += bars[-half:]
        bars = bars[:-half]
    return bars[0]


def _pointer(array: Tensor | None) -> int | None:
    return None if array is None else array.data_ptr()
