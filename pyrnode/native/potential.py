"""The compiled solves of a potential flow (potential.c) along a grid, with the exact trace."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrnode import native
from pyrnode.native.mlp import (
    ARRAYS,
    DOUBLES,
    PADDING_BYTES,
    ROW_BYTES,
    SUFFIX,
    Grid,
    blocks,
    doubles,
    parts_of,
    pointer,
    total,
)
from pyrnode.native.threads import function, ranges

CURVES = ("logcosh", "softplus", "tanh")
"""Names of the activations, in the order of the C source."""


class _Job(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "d", "inputs", "width", "layers", "rank", "curve", "stages", "steps")
        ),
        ("integrals", ctypes.c_int64),
        ("normed", ctypes.c_int64),
        *((name, DOUBLES) for name in ("a", "b", "h", "times")),
        *((name, ARRAYS) for name in ("w", "wt", "bias")),
        *((name, ctypes.c_void_p) for name in ("last", "A", "At", "linear", "columns", "pairs", "gram", "context")),
        *((name, ctypes.c_void_p) for name in ("z0", "z1", "q", "record", "z1_bar", "q_bar", "z0_bar", "context_bar")),
        ("bars", ARRAYS),
        ("parts", ctypes.c_int64),
    )


def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels, if there are some for numbers of this type on this machine."""
    return native.library("potential") if dtype in SUFFIX else None


class Parameters(NamedTuple):
    """Those of Φ, or their gradients, as scalar.py names them; all of one type."""

    weights: list[Tensor]  # W_0 (m, s), then W_i (m, m)
    biases: list[Tensor]  # (m,) each
    w: Tensor  # (m,)
    A: Tensor  # (rank, s)
    b: Tensor  # (s,)


class Pulled(NamedTuple):
    """Cotangents of the start state ``(batch, d)``, of the context, where there is one, and of the parameters."""

    z0: Tensor
    context: Tensor | None
    parameters: Parameters


class PotentialSolve:
    """Forward and reverse solves along a grid.

    Args:
        library: `library` of the parameters' type.
        parameters: Those of Φ.
        curve: One of `CURVES`.
        d: Dimension of the state: s has it, or one number more, the time.
        grid: Method and steps.
        times: Time of every stage of every step.
        integrals: Columns of the integrals: 0, or 4 for l, E, n and 0, or 5 for H too.
        context: What is added to a_0 and to b, ``(batch, m + s)``; `None` for nothing.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        parameters: Parameters,
        curve: str,
        d: int,
        grid: Grid,
        times: list[float],
        integrals: int,
        context: Tensor | None,
    ) -> None:
        self.library, self.curve, self.d, self.grid, self.times = library, CURVES.index(curve), d, grid, times
        self.integrals = integrals
        self.context = None if context is None else context.contiguous()
        weights, biases, w, A, b = parameters
        self.given = Parameters(
            [W.contiguous() for W in weights], [x.contiguous() for x in biases], w.contiguous(), A.contiguous(), b
        )
        self.transposed = [W.t().contiguous() for W in weights]
        self.At = A.t().contiguous()
        self.columns = self.transposed[0][:d]
        p, q = torch.triu_indices(d, d, device=w.device)
        self._p, self._q = p, q
        self.pairs = self.columns[p] * self.columns[q]
        self.gram = (A[:, p] * A[:, q]).sum(0)
        self.record: Tensor | None = None

    def forward(self, z0: Tensor, *, record: bool) -> tuple[Tensor, Tensor]:
        """The state at the end time ``(batch, d)``, and the integrals ``(batch, integrals)``.

        Args:
            z0: State at the start, ``(batch, d)``.
            record: Keep the stages' states, which `backward` starts from.
        """
        z0 = z0.contiguous()
        z1, q = torch.empty_like(z0), z0.new_zeros(len(z0), self.integrals)
        if record:
            lanes = ROW_BYTES // z0.element_size()
            self.record = z0.new_empty(blocks(z0), self.grid.stages, self.d, lanes)
        self._run("forward", z0, blocks(z0), {"z0": z0, "z1": z1, "q": q})
        return z1, q

    def backward(self, z1_bar: Tensor, q_bar: Tensor) -> Pulled:
        """The cotangents of what `forward` started from, given those of its results."""
        z1_bar, q_bar = z1_bar.contiguous(), q_bar.contiguous()
        z0_bar = torch.empty_like(z1_bar)
        context_bar = None if self.context is None else torch.empty_like(self.context)
        unit, given = PADDING_BYTES // z1_bar.element_size(), self.given
        rows = [*given.weights, given.A]
        columns = [-(-matrix.shape[1] // unit) * unit for matrix in rows]
        sizes = [len(matrix) * n for matrix, n in zip(rows, columns, strict=True)]
        sizes += [x.numel() for x in (*given.biases, given.w, given.b, self.gram)]
        sizes.append(-sum(sizes) % unit)  # so that each part's begins at a whole vector, which is how it is written
        parts = parts_of(blocks(z1_bar), sum(sizes) * z1_bar.element_size())
        bars = z1_bar.new_zeros(parts, sum(sizes))
        fields = {
            "z1_bar": z1_bar,
            "q_bar": q_bar,
            "z0_bar": z0_bar,
            "context_bar": context_bar,
            "bars": (ctypes.c_void_p * parts)(*(bar.data_ptr() for bar in bars)),
            "parts": parts,
            "normed": int(self.integrals > 0 and bool(q_bar[:, 2].any())),
        }
        self._run("backward", z1_bar, parts, fields)
        found = list(total(bars).split(sizes))
        matrices = [bar.view(len(matrix), -1)[:, : matrix.shape[1]] for bar, matrix in zip(found, rows, strict=False)]
        *biases, w, b, M, _ = found[len(rows) :]
        A_bar = matrices.pop()
        A_bar[:, : self.d] += 2 * given.A[:, : self.d] @ self._symmetric(M)
        return Pulled(z0_bar, context_bar, Parameters(matrices, biases, w, A_bar, b))

    def _symmetric(self, pairs: Tensor) -> Tensor:
        """The symmetric matrix of its pairs p <= q."""
        matrix = pairs.new_zeros(self.d, self.d)
        matrix[self._p, self._q] = pairs
        matrix[self._q, self._p] = pairs
        return matrix

    def _run(self, name: str, z: Tensor, units: int, fields: dict[str, Any]) -> None:
        """Calls a C function for its units of work; `fields` are those of the job that not both functions have."""
        given, grid, layers = self.given, self.grid, len(self.given.weights)
        stages = len(grid.b)
        tensors = {"last": given.w, "A": given.A, "At": self.At, "linear": given.b, "columns": self.columns}
        tensors |= {"pairs": self.pairs, "gram": self.gram}
        fields = {**tensors, "context": self.context, "record": self.record, **fields}
        job = _Job(
            batch=len(z),
            d=self.d,
            inputs=len(given.b),
            width=len(given.w),
            layers=layers,
            rank=len(given.A),
            curve=self.curve,
            stages=stages,
            steps=len(grid.h),
            integrals=self.integrals,
            a=doubles([row[j] if j < len(row) else 0.0 for row in grid.a for j in range(stages)]),
            b=doubles(grid.b),
            h=doubles(grid.h),
            times=doubles(self.times),
            w=(ctypes.c_void_p * layers)(*(W.data_ptr() for W in given.weights)),
            wt=(ctypes.c_void_p * layers)(*(W.data_ptr() for W in self.transposed)),
            bias=(ctypes.c_void_p * layers)(*(x.data_ptr() for x in given.biases)),
            **{key: pointer(field) if isinstance(field, Tensor) else field for key, field in fields.items()},
        )
        ranges(function(self.library, f"{name}_{SUFFIX[z.dtype]}"), job, units)
