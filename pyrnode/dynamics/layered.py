"""Networks of layers with an explicit vector-Jacobian product: the hot path, without nested autograd.

With ``a_i = s_i ⊙ W_i h_{i-1} + β_i`` (s and β by time and context, layers.py), ``h_i = φ(a_i)``, ``h_0 = z`` and
``f = a_L``:

* product:  ``g_L = ε``, ``r_{i-1} = W_iᵀ (s_i ⊙ g_i)``, ``g_i = φ'(a_i) ⊙ r_i``, ``w = r_0 = εᵀ ∂f/∂z``;
* pullback of ``(f̄, w̄)``: first the product's transpose, which runs forward (``p_0 = w̄``,
  ``ḡ_i = s_i ⊙ W_i p_{i-1}``, ``p_i = φ'(a_i) ⊙ ḡ_i``), then the network's, which runs back
  (``ā_L = f̄``, ``ā_i = φ'(a_i) ⊙ h̄_i + φ''(a_i) ⊙ Σ_k r_i ⊙ ḡ_i``, ``h̄_{i-1} = W_iᵀ (s_i ⊙ ā_i)``).

Every layer is applied once in each of the four sweeps, and its weight gradient is ``Σ ā hᵀ + Σ g pᵀ``: six products
with W in all, which is the least that the gradient of a vector-Jacobian product takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyrnode.dynamics.activations import ACTIVATIONS
from pyrnode.dynamics.base import BoundDynamics, Dynamics, Linearization, SplitPullback
from pyrnode.dynamics.layers import TIME_ENTRIES, Layer, Time, TimeEntry, channels_last
from pyrnode.dynamics.nested import BoundModule


@dataclass
class _Tape:
    """What one evaluation leaves for its pullback: an entry for each layer (of g and r, the last layer's first)."""

    t: Time
    c: Tensor | None = None
    scale: list[Tensor | None] = field(default_factory=list)
    h: list[Tensor] = field(default_factory=list)  # input of the layer
    a: list[Tensor] = field(default_factory=list)  # input of the activation, if it reads it (else its output)
    y: list[Tensor | None] = field(default_factory=list)  # W h, where there is a scale to differentiate
    slope: list[Tensor] = field(default_factory=list)
    g: list[Tensor] = field(default_factory=list)  # scaled: s ⊙ g, what Wᵀ was applied to
    g_unscaled: list[Tensor] = field(default_factory=list)
    r: list[Tensor] = field(default_factory=list)  # if the activation reads it (else g)
    a_bar: list[Tensor] = field(default_factory=list)  # cotangents of the hidden a_i, complete after the pullback
    s_bar: list[Tensor] = field(default_factory=list)  # the product's share in the scales' cotangents, elementwise


class BoundLayers(BoundDynamics):
    """A `LayeredDynamics`, bound: every layer's operators, and what they gather."""

    def __init__(self, layers: list[TimeEntry], activation: str, names: list[list[str]], images: bool) -> None:
        self.layers = layers
        self.activation, self.phi = activation, ACTIVATIONS[activation]
        self.names = names
        self.images = images
        self.times: dict[float, list[tuple[Tensor | None, Tensor]]] = {}
        self.context_widths = [layer.linear.weight.shape[0] * layer.context_parts for layer in layers]

    def layout(self, z: Tensor) -> Tensor:
        if not self.images:
            return z.contiguous()
        if z.ndim == 5:
            laid: Tensor = channels_last(z.flatten(0, 1)).unflatten(0, z.shape[:2])
            return laid
        return channels_last(z)

    def tape_bytes(self, z: Tensor, probes: int) -> int:
        pixels = z[0, 0].numel() if self.images else 1
        hidden = sum(layer.linear.weight.shape[0] for layer in self.layers[:-1])
        kept = 3 + self.phi.keeps_input + probes * (1 + self.phi.keeps_r)  # h, slope, ā, perhaps a; g, perhaps r
        return z.element_size() * len(z) * pixels * hidden * kept

    def linearize(
        self, t: Time, z: Tensor, eps: Tensor | None, *, c: Tensor | None = None, tape: bool = False
    ) -> Linearization:
        record = _Tape(t, c)
        h, last = z, len(self.layers) - 1
        for i, (layer, (scale, shift)) in enumerate(zip(self.layers, self._entries(t, c), strict=True)):
            if scale is None:
                y, a = None, layer.linear(h, shift)
            else:
                y = layer.linear(h)
                a = torch.addcmul(shift, y, scale)
            record.scale.append(scale)
            record.h.append(h)
            record.y.append(y)
            if i < last:
                if eps is None:
                    h = self.phi.value(a)
                else:
                    h, slope = self.phi.activate(a)
                    record.slope.append(slope)
                record.a.append(a if self.phi.keeps_input else h)
        w = None if eps is None else self._product(record, eps)
        return Linearization(a, w, None, record if tape else None)

    def join(self, linearizations: list[Linearization], t: Tensor, eps: Tensor | None) -> Linearization:
        records: list[_Tape] = [linearization.tape for linearization in linearizations]
        batch = len(records[0].h[0])
        c = records[0].c
        joint = _Tape(t, None if c is None else c.repeat(len(records), 1))
        for i in range(len(self.layers)):
            joint.h.append(torch.cat([record.h[i] for record in records]))
            scales = [s for record in records if (s := record.scale[i]) is not None]
            ys = [y for record in records if (y := record.y[i]) is not None]
            if c is None:
                scales = [s.expand(batch, *s.shape) for s in scales]
            joint.scale.append(torch.cat(scales) if scales else None)
            joint.y.append(torch.cat(ys) if ys else None)
        for i in range(len(self.layers) - 1):
            joint.a.append(torch.cat([r.a[i] for r in records]) if self.phi.keeps_input else joint.h[i + 1])
        w = None if eps is None else self._product(joint, eps)
        return Linearization(torch.cat([linearization.f for linearization in linearizations]), w, None, joint)

    def _slopes(self, record: _Tape) -> None:
        if not record.slope:
            record.slope = [self.phi.slope(a, h) for a, h in zip(record.a, record.h[1:], strict=True)]

    def _entries(self, t: Time, c: Tensor | None) -> list[tuple[Tensor | None, Tensor]]:
        """Scale and shift of every layer at time `t`; a fixed grid asks for the same times again and again."""
        if c is not None:
            return [layer.at(t, part) for layer, part in zip(self.layers, self._parts(c), strict=True)]
        if isinstance(t, Tensor):
            return [layer.at(t) for layer in self.layers]
        if t not in self.times:
            self.times[t] = [layer.at(t) for layer in self.layers]
        return self.times[t]

    def _parts(self, c: Tensor | None) -> list[Tensor | None]:
        """Each layer's part of the embedded context."""
        return [None] * len(self.layers) if c is None else list(c.split(self.context_widths, 1))

    def _product(self, record: _Tape, eps: Tensor) -> Tensor:
        """``w = εᵀ ∂f/∂z``; leaves g and r, last layer first, on the record."""
        k, batch = eps.shape[:2]
        self._slopes(record)
        g = eps
        for i in reversed(range(len(self.layers))):
            record.g_unscaled.append(g)
            scale = record.scale[i]
            g = (g if scale is None else g * scale).flatten(0, 1)
            r: Tensor = self.layers[i].linear.transpose(g).unflatten(0, (k, batch))
            record.g.append(g)
            if i:
                g = r * record.slope[i - 1] if self.phi.keeps_r else r.mul_(record.slope[i - 1])
                record.r.append(r if self.phi.keeps_r else g)
        return r

    def pullback(
        self,
        linearization: Linearization,
        f_bar: Tensor,
        w_bar: Tensor | None,
        r_bar: Tensor | None,
        alpha: float | None,
    ) -> tuple[Tensor, Tensor | None]:
        if w_bar is not None:
            self.pull_product(linearization, w_bar, alpha)
        z_bar = self.pull_state(linearization, f_bar, slice(None))
        return z_bar, None if alpha is None else self.pull_parameters(linearization, f_bar, alpha)

    def split(self) -> SplitPullback:
        return self

    def pull_product(self, linearization: Linearization, w_bar: Tensor, alpha: float | None) -> None:
        record: _Tape = linearization.tape
        k, batch = w_bar.shape[:2]
        last = len(self.layers) - 1
        p = w_bar
        for i, layer in enumerate(self.layers):
            p, g_scaled, g = p.flatten(0, 1), record.g.pop(), record.g_unscaled.pop()
            if alpha is not None:
                layer.linear.accumulate(p, g_scaled, alpha)
            scale = record.scale[i]
            if i == last and scale is None:
                break  # ε is held constant: nothing is asked of the last product but its weight
            g_bar = layer.linear(p).unflatten(0, (k, batch))
            if scale is not None:
                record.s_bar.append((g_bar * g).sum(0))
                g_bar = g_bar * scale
            if i < last:
                bend, p = self.phi.pull(record.a[i], record.h[i + 1], record.slope[i], g, record.r.pop(), g_bar)
                record.a_bar.append(bend[0] if k == 1 else bend.sum(0))

    def pull_state(self, linearization: Linearization, f_bar: Tensor, rows: slice) -> Tensor:
        record: _Tape = linearization.tape
        self._slopes(record)
        if not record.a_bar:
            record.a_bar = [torch.zeros_like(slope) for slope in record.slope]
        a_bar = f_bar
        for i in reversed(range(len(self.layers))):
            scale = record.scale[i]
            if scale is not None:
                a_bar = a_bar * (scale[rows] if len(scale) == len(record.h[0]) else scale)
            h_bar = self.layers[i].linear.transpose(a_bar)
            if i:
                a_bar = record.a_bar[i - 1][rows].addcmul_(h_bar, record.slope[i - 1][rows])
        return h_bar

    def pull_parameters(self, linearization: Linearization, f_bar: Tensor, alpha: float) -> Tensor | None:
        record: _Tape = linearization.tape
        parts, c_bars = self._parts(record.c), list[Tensor]()
        for i, (layer, a_bar) in enumerate(zip(self.layers, [*record.a_bar, f_bar], strict=True)):
            scale, y, s_bar = record.scale[i], record.y[i], None
            if scale is not None and y is not None:
                s_bar = a_bar * y
                if record.s_bar:
                    s_bar += record.s_bar[i]
            c_bar = layer.accumulate(record.t, parts[i], a_bar, s_bar, alpha)
            if c_bar is not None:
                c_bars.append(c_bar)
            layer.linear.accumulate(record.h[i], a_bar if scale is None else a_bar * scale, alpha)
        return torch.cat(c_bars, 1) if c_bars else None

    def gradients(self) -> list[Tensor]:
        result = []
        for layer, names in zip(self.layers, self.names, strict=True):
            table = layer.gradients() | {"weight": layer.linear.weight_gradient()}
            result += [table[name] for name in names]
        return result


class LayeredDynamics(Dynamics):
    """A stack of layers with one activation between them; see `MLP` and `ConvNet`.

    A context joins every layer as time does: as further inputs that are the same all along (``"concat"`` and
    ``"none"``; on images the same for all pixels, border included), or in gate and shift (``"concatsquash"``).
    """

    def __init__(
        self, layers: list[Layer], activation: str, event_shape: tuple[int, ...], context_dim: int = 0
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.activation = activation
        self.event_shape, self.context_dim = event_shape, context_dim
        if context_dim:
            widths = [layer.weight.shape[0] * TIME_ENTRIES[layer.time].context_parts for layer in layers]
            self.context = nn.Linear(context_dim, sum(widths), bias=False)
            with torch.no_grad():
                for layer, rows in zip(layers, self.context.weight.split(widths), strict=True):
                    bound = 0.0 if layer.zero else 1 / math.sqrt(layer.fan_in + context_dim)
                    rows.uniform_(-bound, bound)

    def _bind(self, *, detach: bool) -> BoundLayers:
        layers: list[Any] = list(self.layers)
        names = [[name for name, _ in layer.named_parameters()] for layer in layers]
        bound = [layer.bind(detach=detach) for layer in layers]
        return BoundLayers(bound, self.activation, names, len(self.event_shape) == 3)

    def rate(self, t: Time, z: Tensor, c: Tensor | None) -> Tensor:
        return self._bind(detach=False).linearize(t, z, None, c=c).f

    def embed(self, context: Tensor) -> Tensor:
        embedded: Tensor = self.context(context)
        return embedded

    def solved_parameters(self) -> Iterable[nn.Parameter]:
        # As `self.layers.parameters()`, at a seventh of its time: engines ask at every solve.
        return [p for layer in self.layers for p in layer._parameters.values() if p is not None]

    def bind(self, *, total_derivative: bool = False) -> BoundDynamics:
        if total_derivative:
            return BoundModule(self, total_derivative=True)
        return self._bind(detach=True)

    def extra_repr(self) -> str:
        context = f", context_dim={self.context_dim}" if self.context_dim else ""
        return f"event_shape={self.event_shape}, activation={self.activation!r}{context}"


class MLP(LayeredDynamics):
    """A multilayer perceptron on vectors ``(batch, d)``.

    Args:
        dim: Dimension ``d`` of the state.
        hidden: Widths of the hidden layers.
        activation: ``"softplus"``, ``"tanh"``, ``"silu"``, ``"gelu"`` or ``"elu"``.
        time: How time enters each layer: ``"concat"``, ``"concatsquash"`` or ``"none"``.
        context_dim: Number of features of the context; 0 for none.
    """

    def __init__(
        self,
        dim: int,
        hidden: tuple[int, ...] = (64, 64, 64),
        *,
        activation: str = "softplus",
        time: str = "concat",
        context_dim: int = 0,
    ) -> None:
        widths = (dim, *hidden, dim)
        last = len(hidden)
        layers = [Layer(widths[i], widths[i + 1], time=time, zero=i == last) for i in range(last + 1)]
        super().__init__(layers, activation, (dim,), context_dim)


class ConvNet(LayeredDynamics):
    """The paper's convolutional network on images ``(batch, C, H, W)``: same-size convolutions, stride 1.

    Args:
        event_shape: ``(C, H, W)``.
        hidden: Channels of the hidden layers.
        activation: ``"softplus"``, ``"tanh"``, ``"silu"``, ``"gelu"`` or ``"elu"``.
        time: How time enters each layer: ``"concat"``, ``"concatsquash"`` or ``"none"``.
        kernel_size: Side of the filters; odd.
        context_dim: Number of features of the context; 0 for none.
    """

    def __init__(
        self,
        event_shape: tuple[int, int, int],
        hidden: tuple[int, ...] = (64, 64, 64),
        *,
        activation: str = "softplus",
        time: str = "concat",
        kernel_size: int = 3,
        context_dim: int = 0,
    ) -> None:
        channels, height, width = event_shape
        widths = (channels, *hidden, channels)
        last = len(hidden)
        size = (height, width)
        layers = [
            Layer(
                widths[i], widths[i + 1], time=time, kernel_size=(kernel_size, kernel_size), size=size, zero=i == last
            )
            for i in range(last + 1)
        ]
        super().__init__(layers, activation, event_shape, context_dim)
