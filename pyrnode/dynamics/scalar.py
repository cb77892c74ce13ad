"""The scalar network of potential flows (OT-Flow, Onken et al. 2021, eqs. 9 to 13): its gradient and its curvature.

With ``s = (z, t)``, or ``s = z`` where time does not enter,

    Φ(s) = wᵀ N(s) + ½ sᵀAᵀA s + bᵀs        a_0 = W_0 s + b_0          u_0 = φ(a_0)
    N(s) = u_{L−1}                          a_i = W_i u_{i−1} + b_i    u_i = u_{i−1} + h φ(a_i)

a residual network of L layers of one width m, ``h = 1/(L − 1)``. Its gradient runs back through the layers,
``y_{L−1} = w``, ``v_i = h_i φ'(a_i) ⊙ y_i``, ``y_{i−1} = y_i + W_iᵀ v_i`` (``h_0 = 1``, and no skip at layer 0):

    ∇Φ = W_0ᵀ v_0 + AᵀA s + b        ∇²Φ = Σ_i J_iᵀ diag(h_i φ''(a_i) ⊙ y_i) J_i + AᵀA,   J_i = ∂a_i/∂z

so that the Laplacian is a sum of weighted squares of what runs forward alone. A context adds to a_0 and to b.

Nothing here is written in place, so that autograd, `torch.func` and the exporters take it as it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrnode.dynamics.layers import Time


class Curve(ABC):
    """An activation φ with the three derivatives that a curvature's pullback takes, each a function of one root."""

    @abstractmethod
    def root(self, a: Tensor) -> Tensor:
        """What φ and its derivatives are simple functions of."""

    @abstractmethod
    def value(self, a: Tensor, root: Tensor) -> Tensor:
        """φ(a)."""

    @abstractmethod
    def slope(self, root: Tensor) -> Tensor:
        """φ'(a)."""

    @abstractmethod
    def bend(self, root: Tensor, slope: Tensor) -> Tensor:
        """φ''(a)."""

    @abstractmethod
    def twist(self, root: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
        """φ'''(a)."""


class LogCosh(Curve):
    """The antiderivative of tanh, ``log(2 cosh a)``: OT-Flow's."""

    def root(self, a: Tensor) -> Tensor:
        return torch.tanh(a)

    def value(self, a: Tensor, root: Tensor) -> Tensor:
        return a + F.softplus(-2 * a, threshold=40)

    def slope(self, root: Tensor) -> Tensor:
        return root

    def bend(self, root: Tensor, slope: Tensor) -> Tensor:
        return 1 - root * root

    def twist(self, root: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
        return -2 * root * bend


class Softplus(Curve):
    """``log(1 + eᵃ)``."""

    def root(self, a: Tensor) -> Tensor:
        return torch.sigmoid(a)

    def value(self, a: Tensor, root: Tensor) -> Tensor:
        return F.softplus(a, threshold=40)

    def slope(self, root: Tensor) -> Tensor:
        return root

    def bend(self, root: Tensor, slope: Tensor) -> Tensor:
        return root * (1 - root)

    def twist(self, root: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
        return bend * (1 - 2 * root)


class Tanh(Curve):
    """``tanh a``."""

    def root(self, a: Tensor) -> Tensor:
        return torch.tanh(a)

    def value(self, a: Tensor, root: Tensor) -> Tensor:
        return root

    def slope(self, root: Tensor) -> Tensor:
        return 1 - root * root

    def bend(self, root: Tensor, slope: Tensor) -> Tensor:
        return -2 * root * slope

    def twist(self, root: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
        return slope * (6 * root * root - 2)


CURVES: dict[str, Curve] = {"logcosh": LogCosh(), "softplus": Softplus(), "tanh": Tanh()}


class Scalar(NamedTuple):
    """The parameters of Φ: those of a module, or the same without autograd's graph."""

    weights: list[Tensor]  # W_0 (m, s), then W_i (m, m)
    biases: list[Tensor]
    w: Tensor
    A: Tensor
    b: Tensor
    curve: Curve
    timed: bool  # whether s has the time

    @property
    def steps(self) -> list[float]:
        """``h_i``, with ``h_0 = 1``."""
        further = len(self.weights) - 1
        return [1.0] + [1 / further for _ in range(further)]

    def point(self, t: Time, z: Tensor) -> Tensor:
        """``s``: ``(batch, d + 1)``, or z itself."""
        if not self.timed:
            return z
        time = t.to(z.dtype).unsqueeze(1) if isinstance(t, Tensor) else torch.full_like(z[:, :1], t)
        return torch.cat((z, time), 1)

    def context(self, c: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What an embedded context ``(batch, m + s)`` adds to a_0 and to b."""
        if c is None:
            return None, None
        shift, slope = c.split([len(self.w), len(self.b)], 1)
        return shift, slope


@dataclass(slots=True)
class Passed:
    """What the way through a layer leaves."""

    input: Tensor  # u_{i−1}, or s
    root: Tensor
    slope: Tensor  # φ'(a_i)
    y: Tensor  # the cotangent of u_i, (batch, m), or (m,) where it is w
    v: Tensor  # h_i φ'(a_i) ⊙ y_i


class Gradient(NamedTuple):
    """``∇_s Φ`` ``(batch, s)``, what the layers left, and ``A s``."""

    G: Tensor
    layers: list[Passed]
    As: Tensor


def value(scalar: Scalar, s: Tensor, c: Tensor | None) -> Tensor:
    """``Φ(s)``, ``(batch,)``."""
    shift, slope = scalar.context(c)
    u = s
    for i, (W, bias, h) in enumerate(zip(scalar.weights, scalar.biases, scalar.steps, strict=True)):
        a = F.linear(u, W, bias)
        a = a + shift if i == 0 and shift is not None else a
        phi = scalar.curve.value(a, scalar.curve.root(a))
        u = phi if i == 0 else u + h * phi
    linear = s @ scalar.b if slope is None else ((scalar.b + slope) * s).sum(1)
    return u @ scalar.w + 0.5 * (s @ scalar.A.t()).square().sum(1) + linear


def gradient(scalar: Scalar, s: Tensor, c: Tensor | None) -> Gradient:
    """``∇_s Φ``: once forward through the layers, and once back."""
    curve, steps, last = scalar.curve, scalar.steps, len(scalar.weights) - 1
    shift, more = scalar.context(c)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    u = s
    for i, (W, bias) in enumerate(zip(scalar.weights, scalar.biases, strict=True)):
        a = F.linear(u, W, bias)
        a = a + shift if i == 0 and shift is not None else a
        root = curve.root(a)
        seen.append((u, root, curve.slope(root)))
        if i < last:  # the value of the last layer is Φ's alone
            phi = curve.value(a, root)
            u = phi if i == 0 else torch.add(u, phi, alpha=steps[i])
    y, layers = scalar.w, list[Passed]()
    for i in reversed(range(last + 1)):
        u, root, slope = seen[i]
        v = slope * y if i == 0 else slope * (steps[i] * y)
        layers.insert(0, Passed(u, root, slope, y, v))
        pulled = v @ scalar.weights[i]
        y = pulled + y if i else pulled
    As = s @ scalar.A.t()
    G = y + As @ scalar.A + (scalar.b if more is None else scalar.b + more)
    return Gradient(G, layers, As)


def curvature(scalar: Scalar, at: Gradient, directions: Tensor) -> Tensor:
    """``Σ_k ε_kᵀ ∇²Φ ε_k``, ``(batch,)``, over directions ``(k, batch or 1, d)``; of unit vectors, the Laplacian."""
    d, last = directions.shape[-1], len(scalar.weights) - 1
    tangent, total = directions, None
    for i, (layer, W, h) in enumerate(zip(at.layers, scalar.weights, scalar.steps, strict=True)):
        a_dot = tangent @ (W[:, :d] if i == 0 else W).t()
        weight = h * scalar.curve.bend(layer.root, layer.slope) * layer.y
        term = (weight * a_dot.square().sum(0)).sum(1)
        total = term if total is None else total + term
        if i < last:
            moved = layer.slope * a_dot
            tangent = moved if i == 0 else tangent + h * moved
    quadratic = (directions @ scalar.A[:, :d].t()).square().sum((0, 2))
    assert total is not None
    return total + quadratic
