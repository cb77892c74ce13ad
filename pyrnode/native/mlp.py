"""The compiled solves of a multilayer perceptron (mlp.c): along a grid; adaptive ones are in adaptive.py."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrnode import native
from pyrnode.native.threads import function, ranges

ACTIVATIONS = ("softplus", "tanh", "silu", "gelu", "elu")
"""Names of the activations, in the order of the C source."""

SUFFIX = {torch.float32: "f32", torch.float64: "f64"}
ROW_BYTES = 256  # of one feature of a block of samples
PADDING_BYTES = 128  # a row of a weight's gradient has a multiple of this, and so has all that a thread gathers

_MOST_PARTS, _FEWEST_PARTS = 64, 16
_PARTS_BYTES = 2**26  # of the gradients of all parts, where there are more than the fewest

INTEGERS = ctypes.POINTER(ctypes.c_int64)
DOUBLES = ctypes.POINTER(ctypes.c_double)
ARRAYS = ctypes.POINTER(ctypes.c_void_p)


class Shared(ctypes.Structure):
    """What the threads of one call write to: the next unit, whether a sample is stuck, and the memory of the steps."""

    _fields_ = (("next", ctypes.c_int64), ("failed", ctypes.c_int64), ("chunks", ctypes.c_void_p))


class _Job(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "layers", "activation", "stages", "probes")),
        ("weight", ctypes.c_double),
        ("widths", INTEGERS),
        *((name, DOUBLES) for name in ("a", "b", "c")),
        *((name, ARRAYS) for name in ("w", "wt")),
        *((name, ctypes.c_void_p) for name in ("z0", "eps", "context", "z1", "q", "z1_bar", "q_bar")),
        *((name, ctypes.c_void_p) for name in ("z0_bar", "context_bar")),
        ("bars", ARRAYS),
        *((name, ctypes.c_int64) for name in ("parts", "steps")),
        ("h", DOUBLES),
        *((name, ctypes.c_void_p) for name in ("shift", "scale", "record")),
        ("terms", ctypes.c_int64),
        ("entries", ctypes.c_void_p),
        *((name, DOUBLES) for name in ("e", "e3")),
        *((name, ctypes.c_double) for name in ("t0", "t1", "rtol", "atol", "order")),
        *((name, ctypes.c_int64) for name in ("controlled", "most")),
        *((name, ctypes.c_void_p) for name in ("first", "rate", "q_rate", "counts", "ends", "ranking")),
        ("shared", ctypes.POINTER(Shared)),
    )


def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels, if there are some for numbers of this type on this machine."""
    return native.library("mlp") if dtype in SUFFIX else None


class Directions(NamedTuple):
    """In which directions the Jacobian is probed.

    Attributes:
        eps: Probes ``(number, batch, d)``; `None` for the unit vectors.
        number: How many there are.
        weight: Weight of each in the sums.
    """

    eps: Tensor | None
    number: int
    weight: float


class Network:
    """A multilayer perceptron with one set of parameters, and its gradients; all tensors are of one type.

    Args:
        library: `library` of that type.
        weights: ``(out, in)`` of every layer.
        activation: One of `ACTIVATIONS`.
        a, b: The Runge-Kutta method's tableau.
        context: What is added in every layer for each sample, ``(batch, Σ out)``; `None` for nothing.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        weights: list[Tensor],
        activation: str,
        a: Sequence[Sequence[float]],
        b: Sequence[float],
        context: Tensor | None = None,
    ) -> None:
        self.library, self.context = library, None if context is None else context.contiguous()
        self.weights = [weight.contiguous() for weight in weights]
        self.transposed = [weight.t().contiguous() for weight in weights]
        self.activation, self.a, self.b = ACTIVATIONS.index(activation), a, b

    def pull(
        self, name: str, z1_bar: Tensor, directions: Directions | None, entries: int, fields: dict[str, Any]
    ) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """Calls a C function that pulls cotangents back: gives those of weights, that many entries, and context."""
        unit = PADDING_BYTES // z1_bar.element_size()
        columns = [-(-weight.shape[1] // unit) * unit for weight in self.weights]
        sizes = [len(weight) * n for weight, n in zip(self.weights, columns, strict=True)]
        kinds = [sum(sizes), entries]
        kinds.append(-sum(kinds) % unit)  # so that each part's begins at a whole vector, which is how it is written
        parts = parts_of(blocks(z1_bar), sum(kinds) * z1_bar.element_size())
        bars = z1_bar.new_zeros(parts, sum(kinds))
        rows = (ctypes.c_void_p * parts)(*(bar.data_ptr() for bar in bars))
        context_bar = None if self.context is None else torch.empty_like(self.context)
        fields = fields | {"bars": rows, "parts": parts, "context_bar": context_bar}
        self._run(name, z1_bar, directions, parts, fields)
        w_bar, entry_bar, _ = total(bars).split(kinds)
        w_bars = [
            bar.view(len(weight), -1)[:, : weight.shape[1]]
            for bar, weight in zip(w_bar.split(sizes), self.weights, strict=True)
        ]
        return w_bars, entry_bar, context_bar

    def _run(self, name: str, z: Tensor, directions: Directions | None, units: int, fields: dict[str, Any]) -> None:
        """Calls a C function for its units of work; `fields` are those of the job that not all functions have."""
        stages, layers = len(self.b), len(self.weights)
        count, weight = (0, 1.0) if directions is None else (directions.number, directions.weight)
        eps = None if directions is None or directions.eps is None else directions.eps.contiguous()
        job = _Job(
            batch=len(z),
            layers=layers,
            activation=self.activation,
            stages=stages,
            probes=count,
            weight=weight,
            widths=(ctypes.c_int64 * (layers + 1))(z.shape[1], *(len(weight) for weight in self.weights)),
            a=doubles([row[j] if j < len(row) else 0.0 for row in self.a for j in range(stages)]),
            b=doubles(self.b),
            w=(ctypes.c_void_p * layers)(*(weight.data_ptr() for weight in self.weights)),
            wt=(ctypes.c_void_p * layers)(*(weight.data_ptr() for weight in self.transposed)),
            eps=pointer(eps),
            context=pointer(self.context),
            **{key: pointer(field) if isinstance(field, Tensor) else field for key, field in fields.items()},
        )
        ranges(function(self.library, f"{name}_{SUFFIX[z.dtype]}"), job, units)


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


class Solve(Network):
    """Forward and reverse solves along a grid.

    Args:
        library, weights, activation: As of a `Network`.
        shift: What is added in every layer, at every stage: ``(stages, Σ out)``.
        scale: What W h is multiplied by first, of the same shape; `None` for 1.
        grid: Method and steps.
        context: As of a `Network`.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        weights: list[Tensor],
        shift: Tensor,
        scale: Tensor | None,
        activation: str,
        grid: Grid,
        context: Tensor | None = None,
    ) -> None:
        super().__init__(library, weights, activation, grid.a, grid.b, context)
        self.shift = shift.contiguous()
        self.scale = None if scale is None else scale.contiguous()
        self.grid = grid
        self.record: Tensor | None = None

    def forward(self, z0: Tensor, directions: Directions | None, *, record: bool) -> tuple[Tensor, Tensor]:
        """The state at the end time ``(batch, d)``, and l, E, n and 0 ``(batch, 4)`` (no columns without probes).

        Args:
            z0: State at the start, ``(batch, d)``.
            directions: Probes.
            record: Keep the stages' states, which `backward` starts from.
        """
        z0 = z0.contiguous()
        z1, q = torch.empty_like(z0), z0.new_zeros(len(z0), 4 if directions else 0)
        if record:
            lanes = ROW_BYTES // z0.element_size()
            self.record = z0.new_empty(blocks(z0), self.grid.stages, z0.shape[1], lanes)
        self._run("forward", z0, directions, blocks(z0), self._fields | {"z0": z0, "z1": z1, "q": q})
        return z1, q

    def backward(
        self, z1_bar: Tensor, q_bar: Tensor, directions: Directions | None
    ) -> tuple[Tensor, list[Tensor], Tensor, Tensor | None, Tensor | None]:
        """Cotangents of start state, weights, shifts, scales and context, given those of `forward`'s results."""
        z1_bar, q_bar = z1_bar.contiguous(), q_bar.contiguous()
        z0_bar = torch.empty_like(z1_bar)
        sizes = [self.shift.numel(), 0 if self.scale is None else self.scale.numel()]
        fields = self._fields | {"z1_bar": z1_bar, "q_bar": q_bar, "z0_bar": z0_bar}
        w_bars, bars, context_bar = self.pull("backward", z1_bar, directions, sum(sizes), fields)
        b_bar, s_bar = bars.split(sizes)
        scale_bar = None if self.scale is None else s_bar.view_as(self.scale)
        return z0_bar, w_bars, b_bar.view_as(self.shift), scale_bar, context_bar

    @property
    def _fields(self) -> dict[str, Any]:
        h = self.grid.h
        tables = {"shift": self.shift, "scale": self.scale, "record": self.record}
        return {"steps": len(h), "h": doubles(h), **tables}


def blocks(z: Tensor) -> int:
    """Number of the blocks of samples that go through a solve side by side."""
    lanes = ROW_BYTES // z.element_size()
    return -(-len(z) // lanes)


def parts_of(blocks: int, size: int) -> int:
    """Into how many parts the blocks are divided, whose gradients of so many bytes are summed apart.

    Threads share the parts out among themselves. Their number does not depend on that of the threads, nor do the sums:
    it is large enough to keep many threads busy, and bounded, because every part has gradients of its own.
    """
    return max(1, min(blocks, _MOST_PARTS, max(_FEWEST_PARTS, _PARTS_BYTES // size)))


def total(bars: Tensor) -> Tensor:
    """The sum of the rows, pair by pair: always in the same order, which torch's own sum leaves to its threads."""
    while len(bars) > 1:
        half = len(bars) // 2
        bars[:half] += bars[-half:]
        bars = bars[:-half]
    return bars[0]


def doubles(values: Sequence[float]) -> ctypes.Array[ctypes.c_double]:
    """Numbers as C has them."""
    return (ctypes.c_double * len(values))(*values)


def pointer(array: Tensor | None) -> int | None:
    """Where a tensor's numbers are; `None` of none."""
    return None if array is None else array.data_ptr()
