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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyrnode.dynamics.activations import ACTIVATIONS
from pyrnode.dynamics.base import BoundDynamics, Cotangents, Dynamics, Linearization, SplitPullback
from pyrnode.dynamics.gpu import kernelled
from pyrnode.dynamics.layers import TIME_ENTRIES, Layer, Linear, Time, TimeEntry, channels_last
from pyrnode.dynamics.nested import BoundModule


class _Product(NamedTuple):
    """A layer in the product, which runs back through the layers: ``r = Wᵀ (s ⊙ g)`` of the layer after it, and g."""

    r: Tensor | None  # of hidden layers, where φ's second derivative reads it
    g: Tensor  # φ'(a) ⊙ r; of the last layer ε
    scaled: Tensor  # s ⊙ g, the probes side by side in one batch, as Wᵀ is applied to it


@dataclass(slots=True)
class _Layer:
    """What one evaluation leaves of one layer, ``a = s ⊙ (W h) + β``, for its pullback."""

    input: Tensor  # h
    scale: Tensor | None  # s; `None` where it is 1
    unscaled: Tensor | None  # W h, where there is a scale to differentiate
    output: Tensor  # φ(a), which is the next layer's input; of the last layer a
    a: Tensor | None = None  # of hidden layers, where φ's derivatives read it
    slope: Tensor | None = None  # φ'(a) of hidden layers, where it is known already
    product: _Product | None = None  # until it is pulled back
    a_bar: Tensor | None = None  # ā of hidden layers: the product's share, to which `pull_state` adds the rest
    scale_bar: Tensor | None = None  # the product's share in s̄, elementwise

    @property
    def phi(self) -> tuple[Tensor, Tensor]:
        """A and φ(a), which stands for an a that nobody reads."""
        return self.output if self.a is None else self.a, self.output


@dataclass(slots=True)
class _Tape:
    """What one evaluation leaves for its pullback."""

    t: Time
    c: Tensor | None
    layers: list[_Layer]


class BoundLayers(BoundDynamics):
    """A `LayeredDynamics`, bound: every layer's operators, and what they gather.

    Attributes:
        hidden: Type of what has the shape of a hidden layer; `None` for that of the state (`dynamics.coarse`).
    """

    hidden: torch.dtype | None = None

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
        return (self.hidden or z.dtype).itemsize * len(z) * pixels * hidden * kept

    def linearize(
        self, t: Time, z: Tensor, eps: Tensor | None, *, c: Tensor | None = None, tape: bool = False
    ) -> Linearization:
        layers: list[_Layer] = []
        h, last = z, len(self.layers) - 1
        for i, (layer, (scale, shift)) in enumerate(zip(self.layers, self._entries(t, c), strict=True)):
            unscaled: Tensor | None = None
            slope: Tensor | None = None
            if i < last and self.phi.fuses:
                u = layer.linear(h)
                a, output, slope = self.phi.enter(u, scale, shift, sloped=eps is not None)
                unscaled = None if scale is None else u
            else:
                if scale is None:
                    a = layer.linear(h, shift)
                else:
                    unscaled = layer.linear(h)
                    a = torch.addcmul(shift, unscaled, scale).to(unscaled.dtype)
                output = a
                if i < last:
                    output, slope = (self.phi.value(a), None) if eps is None else self.phi.activate(a)
            keeps_a = i < last and self.phi.keeps_input
            layers.append(_Layer(h, scale, unscaled, output, a if keeps_a else None, slope))
            h = output
        record = _Tape(t, c, layers)
        w = None if eps is None else self._product(record, eps)
        return Linearization(h, w, None, record if tape else None)

    def join(self, linearizations: list[Linearization], t: Tensor, eps: Tensor | None) -> Linearization:
        records: list[_Tape] = [linearization.tape for linearization in linearizations]
        f = torch.cat([linearization.f for linearization in linearizations])
        batch, c = len(linearizations[0].f), records[0].c
        joint = _Tape(t, None if c is None else c.repeat(len(records), 1), [])
        columns = [[record.layers[i] for record in records] for i in range(len(self.layers))]
        inputs = [torch.cat([layer.input for layer in column]) for column in columns]
        for column, h, output in zip(columns, inputs, [*inputs[1:], f], strict=True):
            scales = [layer.scale for layer in column]
            if c is None:
                scales = [None if s is None else s.expand(batch, *s.shape) for s in scales]
            unscaled, a = _cat([layer.unscaled for layer in column]), _cat([layer.a for layer in column])
            joint.layers.append(_Layer(h, _cat(scales), unscaled, output, a))
        w = None if eps is None else self._product(joint, eps)
        return Linearization(f, w, None, joint)

    def _slope(self, layer: _Layer) -> Tensor:
        if layer.slope is None:
            layer.slope = self.phi.slope(*layer.phi)
        return layer.slope

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
        """``w = εᵀ ∂f/∂z``; leaves each layer's part on the record."""
        k, batch = eps.shape[:2]
        g, kept_r = eps, None
        for i in reversed(range(len(self.layers))):
            layer = record.layers[i]
            scaled = (g if layer.scale is None else (g * layer.scale).to(g.dtype)).flatten(0, 1)
            layer.product = _Product(kept_r, g, scaled)
            r: Tensor = self.layers[i].linear.transpose(scaled).unflatten(0, (k, batch))
            if i:
                slope = self._slope(record.layers[i - 1])
                g, kept_r = (r * slope, r) if self.phi.keeps_r else (r.mul_(slope), None)
        return r

    def pullback(self, linearization: Linearization, bars: Cotangents) -> tuple[Tensor, Tensor | None]:
        if bars.w is not None:
            self.pull_product(linearization, bars.w)
        z_bar = self.pull_state(linearization, bars.f, slice(None))
        return z_bar, self.pull_parameters(linearization, bars.f)

    def pullback_state(self, linearization: Linearization, bars: Cotangents) -> Tensor:
        if bars.w is not None:
            for _ in self._transposed_product(linearization.tape, bars.w):
                pass  # what the weights' gradients are made of, which nobody asks for
        return self.pull_state(linearization, bars.f, slice(None))

    def split(self) -> SplitPullback:
        return self

    def pull_product(self, linearization: Linearization, w_bar: Tensor) -> None:
        for linear, p, scaled in self._transposed_product(linearization.tape, w_bar):
            linear.accumulate(p, scaled)

    def _transposed_product(self, record: _Tape, w_bar: Tensor) -> Iterator[tuple[Linear, Tensor, Tensor]]:
        """Pulls w̄ back, and gives every layer's weight with p and s ⊙ g, whose products are its gradient."""
        k, batch = w_bar.shape[:2]
        last = len(self.layers) - 1
        p = w_bar
        for i, (bound, layer) in enumerate(zip(self.layers, record.layers, strict=True)):
            assert layer.product is not None
            (r, g, scaled), layer.product = layer.product, None
            p = p.flatten(0, 1)
            yield bound.linear, p, scaled
            if i == last and layer.scale is None:
                break  # ε is held constant: nothing is asked of the last product but its weight
            g_bar = bound.linear(p).unflatten(0, (k, batch))
            if layer.scale is not None:
                layer.scale_bar = (g_bar * g).sum(0)
                g_bar = (g_bar * layer.scale).to(g_bar.dtype)
            if i < last:
                bend, p = self.phi.pull(*layer.phi, self._slope(layer), g, g if r is None else r, g_bar)
                layer.a_bar = bend[0] if k == 1 else bend.sum(0)

    def pull_state(self, linearization: Linearization, f_bar: Tensor, rows: slice) -> Tensor:
        layers: list[_Layer] = linearization.tape.layers
        batch = len(layers[0].input)
        a_bar = f_bar
        for i in reversed(range(len(layers))):
            scale = layers[i].scale
            if scale is not None:
                a_bar = a_bar * (scale[rows] if len(scale) == batch else scale)
            h_bar = self.layers[i].linear.transpose(a_bar)
            if i:
                before = layers[i - 1]
                slope = self._slope(before)
                if before.a_bar is None:
                    before.a_bar = torch.zeros_like(slope)
                a_bar = before.a_bar[rows].addcmul_(h_bar, slope[rows])
        return h_bar

    def pull_parameters(self, linearization: Linearization, f_bar: Tensor) -> Tensor | None:
        record: _Tape = linearization.tape
        parts, c_bars = self._parts(record.c), list[Tensor]()
        for bound, layer, part in zip(self.layers, record.layers, parts, strict=True):
            a_bar = f_bar if layer is record.layers[-1] else layer.a_bar
            assert a_bar is not None
            s_bar = None
            if layer.scale is not None and layer.unscaled is not None:
                s_bar = a_bar * layer.unscaled
                if layer.scale_bar is not None:
                    s_bar += layer.scale_bar
            c_bar = bound.accumulate(record.t, part, a_bar, s_bar)
            if c_bar is not None:
                c_bars.append(c_bar)
            bound.linear.accumulate(layer.input, a_bar if layer.scale is None else a_bar * layer.scale)
        return torch.cat(c_bars, 1) if c_bars else None

    def gradients(self) -> list[Tensor]:
        result = []
        for layer, names in zip(self.layers, self.names, strict=True):
            table = layer.settled or layer.gradients() | {"weight": layer.linear.weight_gradient()}
            result += [table[name] for name in names]
        return result


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    """The parts side by side in one batch; `None` where they are not there."""
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


class LayeredDynamics(Dynamics):
    """A stack of layers with one activation between them; see `MLP` and `ConvNet`.

    A context joins every layer as time does: as further inputs that are the same all along (``"concat"`` and
    ``"none"``; on images the same for all pixels, border included), or in gate and shift (``"concatsquash"``).
    """

    def __init__(
        self,
        layers: list[Layer],
        activation: str,
        event_shape: tuple[int, ...],
        context_dim: int = 0,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.layers: nn.ModuleList = nn.ModuleList(layers)
        self.activation = activation
        self.event_shape = event_shape
        self.context_dim = context_dim
        if context_dim:
            widths = [layer.weight.shape[0] * TIME_ENTRIES[layer.time].context_parts for layer in layers]
            device = layers[0].weight.device
            made = nn.Linear(context_dim, sum(widths), bias=False, device="meta", dtype=torch.float32)
            self.context: nn.Linear = made
            self.context.to_empty(device=device)
            # As nn.Linear draws before what is drawn here: so the numbers that a seed gives are what they always were.
            nn.init.kaiming_uniform_(self.context.weight, math.sqrt(5), generator=generator)
            with torch.no_grad():
                for layer, rows in zip(layers, self.context.weight.split(widths), strict=True):
                    bound = 0.0 if layer.zero else 1 / math.sqrt(layer.fan_in + context_dim)
                    rows.uniform_(-bound, bound, generator=generator)

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

    def bind(self, *, total_derivative: bool = False, hjb: bool = False, exact: bool = False) -> BoundDynamics:
        if total_derivative:
            return BoundModule(self, total_derivative=True)
        bound = self._bind(detach=True)
        bound.phi = kernelled(bound.phi, self.activation, bound.layers[0].linear.weight.device)
        return bound

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
        generator: What the parameters are drawn from; default torch's global generator.
    """

    def __init__(
        self,
        dim: int,
        hidden: tuple[int, ...] = (64, 64, 64),
        *,
        activation: str = "softplus",
        time: str = "concat",
        context_dim: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        widths = (dim, *hidden, dim)
        last = len(hidden)
        layers = [
            Layer(widths[i], widths[i + 1], time=time, zero=i == last, generator=generator) for i in range(last + 1)
        ]
        super().__init__(layers, activation, (dim,), context_dim, generator=generator)


class ConvNet(LayeredDynamics):
    """The paper's convolutional network on images ``(batch, C, H, W)``: same-size convolutions, stride 1.

    Args:
        event_shape: ``(C, H, W)``.
        hidden: Channels of the hidden layers.
        activation: ``"softplus"``, ``"tanh"``, ``"silu"``, ``"gelu"`` or ``"elu"``.
        time: How time enters each layer: ``"concat"``, ``"concatsquash"`` or ``"none"``.
        kernel_size: Side of the filters; odd.
        context_dim: Number of features of the context; 0 for none.
        generator: What the parameters are drawn from; default torch's global generator.
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
        generator: torch.Generator | None = None,
    ) -> None:
        channels, height, width = event_shape
        widths = (channels, *hidden, channels)
        last = len(hidden)
        sides, size = (kernel_size, kernel_size), (height, width)
        layers = [
            Layer(
                widths[i],
                widths[i + 1],
                time=time,
                kernel_size=sides,
                size=size,
                zero=i == last,
                generator=generator,
            )
            for i in range(last + 1)
        ]
        super().__init__(layers, activation, event_shape, context_dim, generator=generator)
