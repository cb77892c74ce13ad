"""Activations φ with the first two derivatives that explicit vector-Jacobian products need.

An activation is a value, a slope φ' and a curvature φ''; each is written in terms of what is cheapest to keep.
Adding one is adding a subclass to this file.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(ABC):
    """An elementwise function with two derivatives; `a` is the input and `h = φ(a)` the output."""

    keeps_input = True  # whether slope and curvature read `a`; else it is not kept in memory

    @abstractmethod
    def value(self, a: Tensor) -> Tensor:
        """φ(a)."""

    @abstractmethod
    def slope(self, a: Tensor, h: Tensor) -> Tensor:
        """φ'(a)."""

    @abstractmethod
    def curvature(self, a: Tensor | None, h: Tensor, slope: Tensor) -> Tensor:
        """φ''(a)."""


class Softplus(Activation):
    """log(1 + eᵃ); φ' = σ(a), φ'' = φ'(1 − φ')."""

    keeps_input = False

    def value(self, a: Tensor) -> Tensor:
        return F.softplus(a)

    def slope(self, a: Tensor, h: Tensor) -> Tensor:
        return torch.sigmoid(a)

    def curvature(self, a: Tensor | None, h: Tensor, slope: Tensor) -> Tensor:
        return torch.addcmul(slope, slope, slope, value=-1)


class Tanh(Activation):
    """tanh(a); φ' = 1 − h², φ'' = −2 h φ'."""

    keeps_input = False

    def value(self, a: Tensor) -> Tensor:
        return torch.tanh(a)

    def slope(self, a: Tensor, h: Tensor) -> Tensor:
        return torch.addcmul(h.new_ones(()), h, h, value=-1)

    def curvature(self, a: Tensor | None, h: Tensor, slope: Tensor) -> Tensor:
        return (h * slope).mul_(-2)


class SiLU(Activation):
    """a σ(a); φ' = σ(1 + a(1 − σ)), φ'' = σ(1 − σ)(2 + a(1 − 2σ))."""

    def value(self, a: Tensor) -> Tensor:
        return F.silu(a)

    def slope(self, a: Tensor, h: Tensor) -> Tensor:
        sigma = torch.sigmoid(a)
        return sigma * (1 + a * (1 - sigma))

    def curvature(self, a: Tensor | None, h: Tensor, slope: Tensor) -> Tensor:
        assert a is not None
        sigma = torch.sigmoid(a)
        return sigma * (1 - sigma) * (2 + a * (1 - 2 * sigma))


class GELU(Activation):
    """a Φ(a) with the exact normal distribution function; φ' = Φ + a N(a), φ'' = N(a)(2 − a²)."""

    @staticmethod
    def _density(a: Tensor) -> Tensor:
        return torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)

    def value(self, a: Tensor) -> Tensor:
        return F.gelu(a)

    def slope(self, a: Tensor, h: Tensor) -> Tensor:
        return torch.special.ndtr(a) + a * self._density(a)

    def curvature(self, a: Tensor | None, h: Tensor, slope: Tensor) -> Tensor:
        assert a is not None
        return self._density(a) * (2 - a * a)


class ELU(Activation):
    """a for a > 0, else eᵃ − 1; φ' = 1 or h + 1, φ'' = 0 or h + 1."""

    keeps_input = False

    def value(self, a: Tensor) -> Tensor:
        return F.elu(a)

    def slope(self, a: Tensor, h: Tensor) -> Tensor:
        return torch.clamp(h, max=0) + 1

    def curvature(self, a: Tensor | None, h: Tensor, slope: Tensor) -> Tensor:
        return slope * (h < 0)


ACTIVATIONS: dict[str, Activation] = {
    "softplus": Softplus(),
    "tanh": Tanh(),
    "silu": SiLU(),
    "gelu": GELU(),
    "elu": ELU(),
}
