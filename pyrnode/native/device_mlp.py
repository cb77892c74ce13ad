"""Whole solves of small perceptrons in one launch on a GPU, and their pullback in another, by Triton.

As torch's operations such a solve is hundreds of launches, each of a few microseconds, for products that are done in
tens (docs/gpu.md has the arithmetic). For softplus, tanh and silu, layers of at most `WIDEST` units, float32, explicit
methods on a grid, time that enters as an input or not at all, no context; what is not that goes on as it is.

**Never run on a GPU.** It is tested in Triton's interpreter, and compared with torch's operations in double precision
when a process first uses it, as `native.pointwise` is.
"""

from __future__ import annotations

import functools
import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pyrnode.devices import constants
from pyrnode.native import pointwise
from pyrnode.native.mlp import Directions, Grid, total

DEVICES = ("cuda",)
"""Where they are used."""

WIDEST = 64
"""Units of the widest layer: a program holds a few matrices of batch × width, and reads weights of width × width."""

_SAMPLES = 16
"""Samples of a program; the least that a product of tiles takes."""

_MOST_SAMPLES = 2**16
"""Samples of a batch: each sixteen have gradients of their own, and with more the launches are not the time."""

_MOST_PROBES = 64
"""Directions, of exact traces too, that a program goes through one after the other."""


def usable(activation: str, weights: list[Tensor], z: Tensor, probes: int) -> bool:
    """Whether there are kernels for such a network at states ``(batch, d)`` like `z`, which are compared first."""
    widths = [z.shape[1], *(len(weight) for weight in weights)]
    return (
        z.device.type in DEVICES
        and activation in pointwise.NUMBERS
        and {z.dtype, *(weight.dtype for weight in weights)} == {torch.float32}
        and len(weights) > 1
        and max(widths) <= WIDEST
        and probes <= _MOST_PROBES
        and 0 < len(z) <= _MOST_SAMPLES
        and pointwise.status().available
        and _checked(activation, z.device)
    )


@functools.cache
def _checked(activation: str, device: torch.device) -> bool:
    without = f"small networks of {activation} on {device} are solved step by step"
    return pointwise.agree(lambda: _wrong(activation, device), without)


@torch.no_grad()
@torch.inference_mode(False)
def _wrong(activation: str, device: torch.device) -> str | None:
    """How a solve and its pullback differ from autograd's through torch's operations in double precision."""
    source = torch.Generator("cpu").manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64, device="cpu")

    weights, shift, z0, eps = [drawn(5, 3) / 2, drawn(3, 5) / 2], drawn(4, 8), drawn(20, 3), drawn(1, 20, 3)
    grid = Grid(((), (0.5,)), (0.0, 1.0), (0.5, 0.5))
    inputs = [x.requires_grad_() for x in (z0, shift, *weights)]
    bars = drawn(20, 3), drawn(20, 4)
    with torch.enable_grad():
        expected = _plainly(activation, weights, shift, grid, z0, eps)
        wanted = torch.autograd.grad(expected, inputs, bars)
    there = [x.detach().to(device, torch.float32) for x in (*weights, shift, z0, eps, *bars)]
    solve = Solve(there[:2], there[2], activation, grid)
    directions = Directions(there[4], 1, 1.0)
    found = solve.forward(there[3], directions, record=True)
    z0_bar, w_bars, shift_bar, _, _ = solve.backward(there[5], there[6], directions)
    for name, x, y in zip(
        ("state", "integrals", "start", "shifts", "weights", "weights"),
        (*found, z0_bar, shift_bar, *w_bars),
        (*expected, *wanted),
        strict=True,
    ):
        if not bool(((x.cpu().double() - y).abs() <= 1e-3 * (1 + y.abs())).all()):
            return f"their {name} are not those of torch's operations"
    return None


def _plainly(
    activation: str, weights: list[Tensor], shift: Tensor, grid: Grid, z: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """The same solve of two layers with one probe, in autograd's graph."""
    widths = [len(weight) for weight in weights]
    q, at = z.new_zeros(len(z), 4), 0
    for h in grid.h:
        rates: list[Tensor] = []
        for row, b in zip(grid.a, grid.b, strict=True):
            y = z
            for coefficient, rate in zip(row, rates, strict=False):
                y = y + h * coefficient * rate
            y = y if y.requires_grad else y.requires_grad_()
            first, last = shift[at].split(widths)
            f = pointwise.EXACT[activation](y @ weights[0].t() + first) @ weights[1].t() + last
            (w,) = torch.autograd.grad(f, y, eps[0], create_graph=True)
            zero = torch.zeros(len(y), dtype=y.dtype, device=y.device)
            integrands = torch.stack([(eps[0] * w).sum(1), f.square().sum(1), w.square().sum(1), zero], 1)
            q, at = q + h * b * integrands, at + 1
            rates.append(f)
        for b, rate in zip(grid.b, rates, strict=True):
            z = z + h * b * rate
    return z, q


class Solve:
    """Forward and reverse solves along a grid, as `native.mlp.Solve` has them.

    Args:
        weights: ``(out, in)`` of every layer, on the device.
        shift: What is added in every layer, at every stage: ``(stages, Σ out)``.
        activation: One of `pointwise.NUMBERS`.
        grid: Method and steps.
    """

    def __init__(self, weights: list[Tensor], shift: Tensor, activation: str, grid: Grid) -> None:
        self._module: Any = importlib.import_module("pyrnode.native.triton_mlp")
        self._activation, self._grid = pointwise.NUMBERS[activation], grid
        self._shapes = [tuple(weight.shape) for weight in weights]
        widest = max(max(shape) for shape in self._shapes)
        self._width = width = max(16, 1 << (widest - 1).bit_length())
        self._weights = shift.new_zeros(len(weights), width, width)
        self._shift = shift.new_zeros(len(shift), len(weights), width)
        for i, (weight, part) in enumerate(zip(weights, shift.split([out for out, _ in self._shapes], 1), strict=True)):
            self._weights[i, : weight.shape[0], : weight.shape[1]] = weight
            self._shift[:, i, : part.shape[1]] = part
        rows = [[*row, *[0.0] * (len(grid.b) - len(row))] for row in grid.a]
        numbers = [*(x for row in rows for x in row), *grid.b, *grid.h]
        self._table = constants(tuple(numbers), torch.float32, shift.device)
        self.record: Tensor | None = None

    def forward(self, z0: Tensor, directions: Directions | None, *, record: bool) -> tuple[Tensor, Tensor]:
        """As `native.mlp.Solve.forward`."""
        z0 = z0.contiguous()
        z1, q = torch.empty_like(z0), z0.new_zeros(len(z0), 4 if directions else 0)
        self.record = z0.new_empty(self._grid.stages, *z0.shape) if record else None
        layers = len(self._shapes)
        size = (len(self._grid.b) + 3 * layers) * _SAMPLES * self._width
        given = (z0, self._probes(directions, z0), self._weights, self._shift, *self._tables)
        kept = z0 if self.record is None else self.record
        self._launch("forward", z0, size, directions, (*given, z1, q, kept), RECORD=record)
        return z1, q

    def backward(
        self, z1_bar: Tensor, q_bar: Tensor, directions: Directions | None
    ) -> tuple[Tensor, list[Tensor], Tensor, None, None]:
        """Cotangents of start state, weights and shifts (none of scales and contexts), given those of the results."""
        assert self.record is not None
        z1_bar, q_bar = z1_bar.contiguous(), q_bar.contiguous()
        z0_bar, layers, stages = torch.empty_like(z1_bar), len(self._shapes), self._grid.stages
        programs = -(-len(z1_bar) // _SAMPLES)
        w_bar = z1_bar.new_zeros(programs, layers, self._width, self._width)
        shift_bar = z1_bar.new_empty(programs, stages, layers, self._width)
        size = (len(self._grid.b) + 6 * layers) * _SAMPLES * self._width
        probes = self._probes(directions, z1_bar)
        given = (z1_bar, q_bar if directions else z1_bar, probes, self._weights, self._shift, *self._tables)
        self._launch("backward", z1_bar, size, directions, (*given, self.record, z0_bar, w_bar, shift_bar))
        w_sum, shift_sum = total(w_bar), total(shift_bar)
        w_bars = [w_sum[i, :out, :into] for i, (out, into) in enumerate(self._shapes)]
        return (
            z0_bar,
            w_bars,
            torch.cat([shift_sum[:, i, :out] for i, (out, _) in enumerate(self._shapes)], 1),
            None,
            None,
        )

    @property
    def _tables(self) -> tuple[Tensor, Tensor, Tensor]:
        stages = len(self._grid.b)
        return (
            self._table[: stages * stages],
            self._table[stages * stages :][:stages],
            self._table[stages * (stages + 1) :],
        )

    def _probes(self, directions: Directions | None, like: Tensor) -> Tensor:
        return like if directions is None or directions.eps is None else directions.eps.contiguous()

    def _launch(
        self, name: str, z: Tensor, size: int, directions: Directions | None, given: tuple[Tensor, ...], **more: bool
    ) -> None:
        programs = -(-len(z) // _SAMPLES)
        scratch = z.new_empty(programs * size)
        number, weight = (0, 1.0) if directions is None else (directions.number, directions.weight)
        here: AbstractContextManager[Any] = torch.cuda.device(z.device) if z.is_cuda else nullcontext()
        with here:
            getattr(self._module, name)[(programs,)](
                *given, scratch, size, len(z), z.shape[1], weight, number, len(self._grid.h),
                STAGES=len(self._grid.b), LAYERS=len(self._shapes), P=self._width, B=_SAMPLES,
                ACTIVATION=self._activation, EXACT=directions is not None and directions.eps is None, **more,
            )  # fmt: skip
