"""The compiled solves of a convolutional network along a grid (convnet.c); float32 on the CPU.

Channels are those of memory: of hidden layers, and of images with more than `conv.FEW`, rounded up to whole vectors.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrnode import native
from pyrnode.native.conv import FEW, reversed_filters
from pyrnode.native.mlp import ACTIVATIONS, Directions, Grid, doubles
from pyrnode.native.threads import apart, function

BORDERS = 9
"""Kinds of pixels by the border that they lie on: first, middle and last rows by columns."""

_MANY, _FROM_FEW, _TO_FEW = range(3)
_ELEMENTS, _OUT = 36, 4  # of a tile of Winograd's, and its side

_TILES = 48  # in a group of samples that go through a solve side by side
_FEWEST_GROUPS = 4
_MOST_PARTS, _FEWEST_PARTS = 64, 8
_PARTS_BYTES = 2**25  # of the gradients of all parts, where there are more than the fewest


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "inputs", "outputs")),
        *((name, ctypes.c_void_p) for name in ("forward", "backward", "weight", "weight_bar", "bias", "time", "gate")),
        *((name, ctypes.c_int64) for name in ("context", "bars")),
    )


_SIZES = ("batch", "channels", "height", "width", "layers", "activation", "stages", "steps", "probes")
_DOUBLES = ctypes.POINTER(ctypes.c_double)


class _Job(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        ("weight", ctypes.c_double),
        ("layer", ctypes.POINTER(_Layer)),
        *((name, _DOUBLES) for name in ("a", "b", "times", "h")),
        *((name, ctypes.c_void_p) for name in ("z0", "eps", "context")),
        ("contexts", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("z1", "q", "record", "tape", "z1_bar", "q_bar", "z0_bar")),
        *((name, ctypes.c_void_p) for name in ("context_bar", "bars")),
        *((name, ctypes.c_int64) for name in ("size", "parts", "group")),
        ("next", ctypes.POINTER(ctypes.c_int64)),
    )


class LayerOf(NamedTuple):
    """A layer, ``a = s ⊙ W h + (bias ⊙ s + t time + c)``.

    Attributes:
        weight: ``(out, in, 3, 3)``.
        bias: ``(out,)``.
        time: ``(BORDERS, out)``; `None` for zero.
        gate: Of ``s = σ(t gate[0] + gate[1] + c')``, ``(2, out)``; `None` for a scale of 1.
    """

    weight: Tensor
    bias: Tensor
    time: Tensor | None
    gate: Tensor | None


class LayerBar(NamedTuple):
    """The cotangents of a `LayerOf`, of the same shapes."""

    weight: Tensor
    bias: Tensor
    time: Tensor
    gate: Tensor | None


class Cotangents(NamedTuple):
    """Those of the start state, the layers, and the embedded context, where there is one."""

    z0: Tensor
    layers: list[LayerBar]
    context: Tensor | None


def library(layers: list[Tensor], dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels, if there are some for a network of these weights, in numbers of this type, on this machine."""
    alike = all(w.dtype == dtype and w.device.type == "cpu" and w.shape[2:] == (3, 3) for w in layers)
    if dtype != torch.float32 or not alike or (len(layers) == 1 and layers[0].shape[1] <= FEW):
        return None
    return native.library("convnet")


class _Held(NamedTuple):
    """What a C function reads of the layers, and writes; the tensors are held as long as it runs."""

    layers: Any
    tensors: list[Tensor]
    weight_bars: list[Tensor | None]  # of those that are transformed
    units: int
    size: int
    contexts: int


class Solve:
    """Forward and reverse solves along a grid.

    Args:
        library: The compiled ``convnet.c``.
        layers: The network's.
        activation: One of `mlp.ACTIVATIONS`.
        size: ``(H, W)`` of the images.
        grid: Method and steps.
        times: Of every stage of every step.
        context: The samples' embedded context, ``(batch, s)``: of each layer c and, with a gate, c'; `None` for none.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        layers: list[LayerOf],
        activation: str,
        size: tuple[int, int],
        grid: Grid,
        times: list[float],
        context: Tensor | None,
    ) -> None:
        self.library, self.layers, self.activation, self.size = library, layers, ACTIVATIONS.index(activation), size
        self.grid, self.times, self.context = grid, times, context
        lanes = library.lanes()
        self._channels = layers[0].weight.shape[1]
        state = self._channels if self._channels <= FEW else _rounded(self._channels, lanes)
        self._widths = [state, *(_rounded(len(layer.weight), lanes) for layer in layers[:-1]), state]
        self._parts_of_context = [1 if layer.gate is None else 2 for layer in layers]
        self.record: Tensor | None = None
        self.tape: Tensor | None = None

    def forward(
        self, z0: Tensor, directions: Directions | None, *, record: bool, store: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The state at the end time ``(batch, C, H, W)``, and l, E, n and 0 ``(batch, 4)`` (no columns without probes).

        Args:
            z0: State at the start, ``(batch, C, H, W)``.
            directions: Probes ``(number, batch, C, H, W)``.
            record: Keep the stages' states, which `backward` starts from.
            store: Keep all that the next `backward` needs of the evaluations too.
        """
        laid = self._laid(z0)
        z1, q = torch.empty_like(laid), z0.new_zeros(len(z0), 4 if directions else 0)
        self.record = z0.new_empty(len(self.times), *laid.shape) if record else None
        self.tape = None
        fields, held = {"z0": laid, "z1": z1, "q": q}, self._hold()
        if record and store:
            job = self._job(len(z0), directions, fields, held)
            groups = -(-len(z0) // job.group)
            self.tape = z0.new_empty(groups * len(self.times) * self._numbers(job))
        self._run("forward", len(z0), directions, fields, held)
        return self._given(z1), q

    def backward(self, z1_bar: Tensor, q_bar: Tensor, directions: Directions | None) -> Cotangents:
        """The cotangents, given those of `forward`'s results."""
        laid, q_bar, batch = self._laid(z1_bar), q_bar.contiguous(), len(z1_bar)
        z0_bar = torch.empty_like(laid)
        fields: dict[str, Any] = {"z1_bar": laid, "q_bar": q_bar, "z0_bar": z0_bar}
        held = self._hold(back=True)
        groups = -(-batch // self._group(batch))
        parts = max(1, min(groups, _MOST_PARTS, max(_FEWEST_PARTS, _PARTS_BYTES // (4 * held.size))))
        bars = laid.new_empty(parts, held.size)
        context_bar = None if self.context is None else laid.new_zeros(batch, held.contexts)
        fields |= {"bars": bars, "parts": parts, "context_bar": context_bar}
        self._run("backward", batch, directions, fields, held)
        self.tape = None  # a second pass evaluates again
        bar = None if context_bar is None else self._context_back(context_bar)
        return Cotangents(self._given(z0_bar), self._layer_bars(bars[0], held.weight_bars), bar)

    def _run(self, name: str, batch: int, directions: Directions | None, fields: dict[str, Any], held: _Held) -> None:
        """Transforms the weights and calls a C function; `fields` are those of the job that not all functions have."""
        job = self._job(batch, directions, fields, held)
        function(self.library, "transform")(ctypes.addressof(job), 0, held.units)
        apart(function(self.library, name), job, fields.get("parts") or -(-batch // job.group))
        if "parts" in fields:
            apart(function(self.library, "gather"), job, held.units)

    def _job(self, batch: int, directions: Directions | None, fields: dict[str, Any], held: _Held) -> _Job:
        grid, stages = self.grid, len(self.grid.b)
        count, weight = (0, 1.0) if directions is None else (directions.number, directions.weight)
        eps = None if directions is None or directions.eps is None else self._laid(directions.eps)
        context = None if self.context is None else self._context_laid(self.context)
        tensors = {**fields, "eps": eps, "context": context, "record": self.record, "tape": self.tape}
        job = _Job(
            batch=batch,
            channels=self._channels,
            height=self.size[0],
            width=self.size[1],
            layers=len(self.layers),
            activation=self.activation,
            stages=stages,
            steps=len(grid.h),
            probes=count,
            weight=weight,
            layer=held.layers,
            a=doubles([row[j] if j < len(row) else 0.0 for row in grid.a for j in range(stages)]),
            b=doubles(grid.b),
            times=doubles(self.times),
            h=doubles(grid.h),
            contexts=held.contexts,
            size=held.size,
            group=self._group(batch),
            next=ctypes.pointer(ctypes.c_int64(0)),
            **{key: _pointer(x) if isinstance(x, Tensor) else x for key, x in tensors.items()},
        )
        job.held = held, eps, context  # as long as the job
        return job

    def _group(self, batch: int) -> int:
        """Samples that go side by side: enough for the products, few enough for many threads."""
        tiles = math.prod(-(-side // _OUT) for side in self.size)
        return max(1, min(_TILES // tiles, -(-batch // _FEWEST_GROUPS)))

    def _numbers(self, job: _Job) -> int:
        self.library.tape.restype, self.library.tape.argtypes = ctypes.c_long, [ctypes.c_void_p]
        count: int = self.library.tape(ctypes.addressof(job))
        if count < 0:
            raise MemoryError("no memory for a kernel's intermediates")
        return count

    def _hold(self, *, back: bool = False) -> _Held:
        """The layers as the kernels read them; for the way back with room for the gradients of their weights."""
        layers, tensors, bars, context = (_Layer * len(self.layers))(), list[Tensor](), 0, 0
        lanes, weight_bars, units = self.library.lanes(), list[Tensor | None](), 0
        for i, layer in enumerate(self.layers):
            inputs, outputs = self._widths[i : i + 2]
            kind = self._kind(i)
            weight = _padded(layer.weight, (outputs, inputs, 3, 3))
            weight_bars.append(torch.empty_like(weight) if back and kind == _MANY else None)
            time = weight.new_zeros(BORDERS, outputs) if layer.time is None else _padded(layer.time, (BORDERS, outputs))
            gate = None if layer.gate is None else _padded(layer.gate, (2, outputs))
            entries = [_padded(layer.bias, (outputs,)), time, gate]
            given = [*_weights(kind, weight, lanes), weight, weight_bars[-1], *entries]
            layers[i] = _Layer(kind, inputs, outputs, *map(_pointer, given), context, bars)
            tensors += (x for x in given if x is not None)
            units += -(-inputs // lanes)
            context += self._parts_of_context[i] * outputs
            bars += sum(self._bar_sizes(i))
            bars += -bars % 16  # so that each layer's begin at a cache line
        return _Held(layers, tensors, weight_bars, units, bars, context)

    def _kind(self, i: int) -> int:
        if self._channels > FEW:
            return _MANY
        return _FROM_FEW if i == 0 else _TO_FEW if i + 1 == len(self.layers) else _MANY

    def _bar_sizes(self, i: int) -> list[int]:
        """Numbers in the gradients of a layer: of its weight, of its transpose's, of bias, time and gate."""
        inputs, outputs = self._widths[i : i + 2]
        many = self._kind(i) == _MANY
        weight = inputs * outputs * (_ELEMENTS if many else 9)
        gate = 0 if self.layers[i].gate is None else 2 * outputs
        return [weight, weight if many else 0, outputs, BORDERS * outputs, gate]

    def _layer_bars(self, bars: Tensor, weight_bars: list[Tensor | None]) -> list[LayerBar]:
        found, start = [], 0
        for i, (layer, weight) in enumerate(zip(self.layers, weight_bars, strict=True)):
            sizes, (inputs, outputs) = self._bar_sizes(i), self._widths[i : i + 2]
            filters, _, bias, time, gate = bars[start : start + sum(sizes)].split(sizes)
            start += sum(sizes) + -sum(sizes) % 16
            if weight is None and self._kind(i) == _FROM_FEW:
                weight = filters.view(3, 3, inputs, outputs).permute(3, 2, 0, 1)
            elif weight is None:
                weight = reversed_filters(filters.view(3, 3, outputs, inputs).permute(3, 2, 0, 1))
            out, into = layer.weight.shape[:2]
            found.append(  # copies, since a view would hold the sums of all parts
                LayerBar(
                    weight[:out, :into].clone(memory_format=torch.contiguous_format),
                    bias[:out].clone(),
                    time.view(BORDERS, outputs)[:, :out].clone(),
                    None if layer.gate is None else gate.view(2, outputs)[:, :out].clone(),
                )
            )
        return found

    def _laid(self, x: Tensor) -> Tensor:
        """Images ``(..., C, H, W)`` as the kernels have them."""
        x = x.movedim(-3, -1)
        return F.pad(x, (0, self._widths[0] - x.shape[-1])).contiguous()

    def _given(self, x: Tensor) -> Tensor:
        """And back."""
        return x[..., : self._channels].contiguous().movedim(-1, -3)

    def _context_laid(self, context: Tensor) -> Tensor:
        parts = context.split([len(layer.weight) for layer in self._owners], 1)
        widths = [self._widths[i + 1] for i in self._owned]
        return torch.cat([F.pad(x, (0, n - x.shape[1])) for x, n in zip(parts, widths, strict=True)], 1)

    def _context_back(self, bar: Tensor) -> Tensor:
        parts = bar.split([self._widths[i + 1] for i in self._owned], 1)
        return torch.cat([x[:, : len(layer.weight)] for x, layer in zip(parts, self._owners, strict=True)], 1)

    @property
    def _owned(self) -> list[int]:
        """The layer of each part of the context."""
        return [i for i, count in enumerate(self._parts_of_context) for _ in range(count)]

    @property
    def _owners(self) -> list[LayerOf]:
        return [self.layers[i] for i in self._owned]


def _rounded(channels: int, lanes: int) -> int:
    return -(-channels // lanes) * lanes


def _padded(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`x` with zeros behind it along every axis."""
    if x.shape == shape:
        return x.contiguous()
    return F.pad(x, [n for a, b in zip(reversed(x.shape), reversed(shape), strict=True) for n in (0, b - a)])


def _weights(kind: int, weight: Tensor, lanes: int) -> list[Tensor]:
    """What a layer of the weight ``(out, in, 3, 3)`` and its transpose are summed up with."""
    if kind == _MANY:  # in C, from the weight
        return [weight.new_empty(_ELEMENTS, weight[:, :, 0, 0].numel()) for _ in range(2)]
    if kind == _FROM_FEW:
        return [_from_few(weight), _to_few(reversed_filters(weight), lanes)]
    return [_to_few(weight, lanes), _from_few(reversed_filters(weight))]


def _from_few(weight: Tensor) -> Tensor:
    """``(9 in, out)``."""
    return weight.permute(2, 3, 1, 0).flatten(0, 2).contiguous()


def _to_few(weight: Tensor, lanes: int) -> Tensor:
    """``(in, 9 out)``, filled up to whole vectors."""
    rows = weight.permute(1, 2, 3, 0).flatten(1)
    return _padded(rows, (len(rows), _rounded(rows.shape[1], lanes)))


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
