"""Activations φ with the first two derivatives that explicit vector-Jacobian products need.

An activation is a value, a slope φ', and the bend ``φ'' r`` for ``g = φ' r``; each is written in terms of what is
cheapest to keep. Adding one is adding a subclass to this file.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrnode.devices import awaited
from pyrnode.native import softplus

_IDENTITY = 40.0
"""From where on torch takes softplus for the identity; its default, 20, is 2e-9 too early in double precision."""


class Activation(ABC):
    """An elementwise function with two derivatives; `a` is the input and `h = φ(a)` the output.

    Attributes:
        keeps_input: Whether the derivatives read `a`; else it is not kept in memory, and anything may stand for it.
        keeps_r: Whether `bend` reads `r`. Where φ''/φ' is a bounded function of h or φ', g does instead.
        fuses: Whether a layer's scale and shift are best left to `enter`.
    """

    keeps_input = False
    keeps_r = False
    fuses = False

    @abstractmethod
    def value(self, a: Tensor) -> Tensor:
        """φ(a)."""

    @abstractmethod
    def slope(self, a: Tensor, h: Tensor) -> Tensor:
        """φ'(a)."""

    @abstractmethod
    def bend(self, a: Tensor, h: Tensor, slope: Tensor, g: Tensor, r: Tensor) -> Tensor:
        """φ''(a) r, where ``g = φ'(a) r``; `a` and `r` may be anything where they are not kept."""

    def activate(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Value and slope; may overwrite `a` where it is not kept."""
        h = self.value(a)
        return h, self.slope(a, h)

    def enter(
        self, u: Tensor, scale: Tensor | None, shift: Tensor, *, sloped: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """``a = scale ⊙ u + shift``, φ(a), and φ'(a) where it is asked for; may overwrite `u` where scale is `None`."""
        a = u + shift if scale is None else torch.addcmul(shift, u, scale)
        a = a.to(u.dtype)
        return (a, *self.activate(a)) if sloped else (a, self.value(a), None)

    def pull(self, a: Tensor, h: Tensor, slope: Tensor, g: Tensor, r: Tensor, g_bar: Tensor) -> tuple[Tensor, Tensor]:
        """``φ''(a) r ⊙ ḡ`` and ``φ'(a) ⊙ ḡ``, the cotangents of a and of r; may overwrite `g_bar`.

        Shapes ``(probes, batch, *hidden)`` of g, r, `g_bar` and both results, without probes of the rest.
        """
        bend = self.bend(a, h, slope, g, r).mul_(g_bar)
        return bend, g_bar.mul_(slope)


class Softplus(Activation):
    """log(1 + eᵃ); φ' = 1 − e⁻ʰ, φ'' = φ'(1 − φ')."""

    def value(self, a: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return F.softplus(a)
        # Half the library's time on a CPU, which takes log1p where an error of one rounding of 1 does no harm.
        if awaited(a):
            return F.softplus(a, threshold=_IDENTITY)
        limit = 80.0 if a.dtype == torch.float32 else 700.0
        h = torch.exp(a).add_(1).log_().clamp_(max=limit)
        return torch.maximum(h, a, out=h)

    def slope(self, a: Tensor, h: Tensor) -> Tensor:
        if awaited(h):
            return torch.neg(h).expm1_().neg_()
        return torch.neg(h).exp_().neg_().add_(1)

    def bend(self, a: Tensor, h: Tensor, slope: Tensor, g: Tensor, r: Tensor) -> Tensor:
        return torch.addcmul(g, g, slope, value=-1)

    def activate(self, a: Tensor) -> tuple[Tensor, Tensor]:
        if awaited(a):  # where each operation is a launch
            return F.softplus(a, threshold=_IDENTITY), torch.sigmoid(a)
        slope = softplus.activate(a)
        return super().activate(a) if slope is None else (a, slope)

    def pull(self, a: Tensor, h: Tensor, slope: Tensor, g: Tensor, r: Tensor, g_bar: Tensor) -> tuple[Tensor, Tensor]:
        bend = softplus.pull(g_bar[0], slope, g[0]) if len(g_bar) == 1 else None
        return super().pull(a, h, slope, g, r, g_bar) if bend is None else (bend.unsqueeze(0), g_bar)


class Tanh(Activation):
    """tanh(a); φ' = 1 − h², φ'' = −2 h φ'."""

    def value(self, a: Tensor) -> Tensor:
        return torch.tanh(a)

    def slope(self, a: Tensor, h: Tensor) -> Tensor:
        return torch.addcmul(h.new_ones(()), h, h, value=-1)

    def bend(self, a: Tensor, h: Tensor, slope: Tensor, g: Tensor, r: Tensor) -> Tensor:
        return (g * h).mul_(-2)


class SiLU(Activation):
    """a σ(a); φ' = σ(1 + a(1 − σ)), φ'' = σ(1 − σ)(2 + a(1 − 2σ))."""

    keeps_input = keeps_r = True

    def value(self, a: Tensor) -> Tensor:
        return F.silu(a)

    def slope(self, a: Tensor, h: Tensor) -> Tensor:
        sigma = torch.sigmoid(a)
        return sigma * (1 + a * (1 - sigma))

    def bend(self, a: Tensor, h: Tensor, slope: Tensor, g: Tensor, r: Tensor) -> Tensor:
        sigma = torch.sigmoid(a)
        return r * (sigma * (1 - sigma) * (2 + a * (1 - 2 * sigma)))


class GELU(Activation):
    """a Φ(a) with the exact normal distribution function; φ' = Φ + a N(a), φ'' = N(a)(2 − a²)."""

    keeps_input = keeps_r = True

    @staticmethod
    def _density(a: Tensor) -> Tensor:
        return torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)

    def value(self, a: Tensor) -> Tensor:
        return F.gelu(a)

    def slope(self, a: Tensor, h: Tensor) -> Tensor:
        slope: Tensor = torch.special.ndtr(a) + a * self._density(a)
        return slope

    def bend(self, a: Tensor, h: Tensor, slope: Tensor, g: Tensor, r: Tensor) -> Tensor:
        return r * (self._density(a) * (2 - a * a))


class ELU(Activation):
    """a for a > 0, else eᵃ − 1; φ' = 1 or h + 1, φ'' = 0 or h + 1."""

    def value(self, a: Tensor) -> Tensor:
        return F.elu(a)

    def slope(self, a: Tensor, h: Tensor) -> Tensor:
        return torch.clamp(h, max=0) + 1

    def bend(self, a: Tensor, h: Tensor, slope: Tensor, g: Tensor, r: Tensor) -> Tensor:
        return g * (h < 0)


ACTIVATIONS: dict[str, Activation] = {
    "softplus": Softplus(),
    "tanh": Tanh(),
    "silu": SiLU(),
    "gelu": GELU(),
    "elu": ELU(),
}
