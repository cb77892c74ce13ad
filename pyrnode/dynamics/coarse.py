"""Networks whose products read, and whose hidden layers keep, coarser numbers: `solver.precision` of training.

The scheme is that of Celledoni, Owren, Ruthotto and Yang (arXiv 2510.23498). What has the shape of the state (z, f, w
and their cotangents), of the integrals, or of the parameters (their gradients' sums) stays in float32, and so does the
solve. In between there are

* ``"tf32"``: products of operands that are rounded to 10 bits, summed in float32; everything is kept in float32;
* ``"bf16"``: products of operands in bfloat16, summed in float32 and rounded again; what has the shape of a hidden
  layer is kept in bfloat16, and computed there in float32, number by number.

A GPU does both in its tensor cores. On any other device the operands are rounded and the products are IEEE's: slower
than without, but the numbers are those of the scheme.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from pyrnode.config import Precision
from pyrnode.dynamics.activations import Activation
from pyrnode.dynamics.base import BoundDynamics
from pyrnode.dynamics.gpu import Kernelled
from pyrnode.dynamics.layered import BoundLayers
from pyrnode.dynamics.layers import Conv, Dense, Linear
from pyrnode.errors import ConfigError
from pyrnode.precision import coarse_products, has_tf32, tf32

HALF = torch.bfloat16


def coarsened(bound: BoundDynamics, precision: Precision) -> BoundDynamics:
    """Bound dynamics that compute in a precision from here on.

    Raises:
        ConfigError: They have no products that could be coarser, or their parameters are not float32.
    """
    if precision == "ieee":
        return bound
    if not isinstance(bound, BoundLayers):
        raise ConfigError(
            f"solver.precision = {precision!r}: for the networks that pyrnode knows (MLP, ConvNet) without "
            "penalties.total_derivative, not for potentials and modules of your own; set it to 'ieee'"
        )
    if wrong := {layer.linear.weight.dtype for layer in bound.layers} - {torch.float32}:
        raise ConfigError(f"solver.precision = {precision!r} for parameters of {wrong.pop()}; set it to 'ieee'")
    last = len(bound.layers) - 1
    for i, layer in enumerate(bound.layers):
        if precision == "tf32":
            layer.linear = Tf32(layer.linear)
        else:
            layer.linear = Bf16(layer.linear, first=i == 0, last=i == last)
    if precision == "bf16":
        bound.hidden, bound.phi = HALF, _widened(bound.phi)
    return bound


def _widened(phi: Activation) -> Activation:
    """On bfloat16; kernels take it as it is."""
    return Kernelled(Widened(phi.exact), phi.kernels) if isinstance(phi, Kernelled) else Widened(phi)


def _like(linear: Linear, weight: Tensor) -> Linear:
    """The same operator of another weight, in torch's operations."""
    return Conv(weight, linear.size) if isinstance(linear, Conv) else Dense(weight)


class _Coarse(Linear):
    """A linear map by products of rounded operands; how time enters is not of them, and stays as it was."""

    def __init__(self, exact: Linear, weight: Tensor) -> None:
        super().__init__(exact.weight)
        self._exact, self._rounded = exact, _like(exact, weight)

    def constant(self, weight: Tensor) -> Tensor:
        return self._exact.constant(weight)

    def constant_gradient(self, bar: Tensor, weight: Tensor) -> Tensor:
        return self._exact.constant_gradient(bar, weight)

    def spread(self, channels: Tensor) -> Tensor:
        return self._exact.spread(channels)

    def gather(self, x: Tensor) -> Tensor:
        return self._exact.gather(x)


class Tf32(_Coarse):
    """Products of operands in TF32, which a GPU rounds as it reads them."""

    def __init__(self, exact: Linear) -> None:
        self._there = has_tf32(exact.weight.device)
        super().__init__(exact, self._operand(exact.weight))

    def _operand(self, x: Tensor) -> Tensor:
        return x if self._there else tf32(x)

    def _products(self) -> AbstractContextManager[None]:
        return coarse_products() if self._there else nullcontext()

    def __call__(self, h: Tensor, shift: Tensor | None = None) -> Tensor:
        with self._products():
            return self._rounded(self._operand(h), shift)

    def transpose(self, g: Tensor) -> Tensor:
        with self._products():
            return self._rounded.transpose(self._operand(g))

    def accumulate(self, h: Tensor, g: Tensor) -> None:
        with self._products():
            self._rounded.accumulate(self._operand(h), self._operand(g))

    def weight_gradient(self) -> Tensor:
        return self._rounded.weight_gradient()


class Bf16(_Coarse):
    """Products of operands in bfloat16.

    Args:
        exact: The map in float32.
        first: Whether its input has the shape of the state, and is float32.
        last: Whether its output has.
    """

    def __init__(self, exact: Linear, *, first: bool, last: bool) -> None:
        self._there = exact.weight.device.type == "cuda"
        self._input, self._output = (torch.float32 if edge else HALF for edge in (first, last))
        super().__init__(exact, self._operand(exact.weight))

    def _operand(self, x: Tensor) -> Tensor:
        rounded = x.to(HALF)
        return rounded if self._there else rounded.float()

    def __call__(self, h: Tensor, shift: Tensor | None = None) -> Tensor:
        a = self._rounded(self._operand(h)).to(HALF).to(self._output)
        return a if shift is None else a.add_(shift)

    def transpose(self, g: Tensor) -> Tensor:
        return self._rounded.transpose(self._operand(g)).to(HALF).to(self._input)

    def accumulate(self, h: Tensor, g: Tensor) -> None:
        self._rounded.accumulate(self._operand(h), self._operand(g))
        found = self._rounded.weight_gradient().to(HALF)
        self._rounded.gradient = None
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.weight)
        self.gradient.add_(found)


class Widened(Activation):
    """An activation on bfloat16, computed in float32 and rounded once."""

    def __init__(self, exact: Activation) -> None:
        self._exact = exact
        self.keeps_input, self.keeps_r = exact.keeps_input, exact.keeps_r

    def value(self, a: Tensor) -> Tensor:
        return self._exact.value(a.float()).to(a.dtype)

    def slope(self, a: Tensor, h: Tensor) -> Tensor:
        return self._exact.slope(a.float(), h.float()).to(h.dtype)

    def bend(self, a: Tensor, h: Tensor, slope: Tensor, g: Tensor, r: Tensor) -> Tensor:
        return self._exact.bend(*(x.float() for x in (a, h, slope, g, r))).to(g.dtype)

    def activate(self, a: Tensor) -> tuple[Tensor, Tensor]:
        h, slope = self._exact.activate(a.float())
        return h.to(a.dtype), slope.to(a.dtype)

    def pull(self, a: Tensor, h: Tensor, slope: Tensor, g: Tensor, r: Tensor, g_bar: Tensor) -> tuple[Tensor, Tensor]:
        bend, p = self._exact.pull(*(x.float() for x in (a, h, slope, g, r, g_bar)))
        return bend.to(g.dtype), p.to(g.dtype)
