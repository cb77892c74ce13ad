"""Probes: the directions in which the Jacobian is probed, for its trace and its norm."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Probes(NamedTuple):
    """Directions in which the Jacobian is probed.

    Attributes:
        eps: ``(k, batch, *event)``.
        weight: Weight of each probe in the sums: 1/k for an estimate, 1 for the d unit vectors (exact).
    """

    eps: Tensor
    weight: float

    @staticmethod
    def draw(z: Tensor, k: int = 1, *, noise: str = "gaussian", generator: torch.Generator | None = None) -> Probes:
        """Random probes for states like `z` ``(batch, *event)``: Gaussian, or Rademacher (±1)."""
        shape = (k, *z.shape)
        device = generator.device if generator is not None else z.device
        if noise == "rademacher":
            eps = torch.randint(0, 2, shape, generator=generator, device=device).to(z.dtype) * 2 - 1
        else:
            eps = torch.randn(shape, generator=generator, dtype=z.dtype, device=device)
        return Probes(eps.to(z.device), 1 / k)

    @staticmethod
    def exact(z: Tensor) -> Probes:
        """The unit vectors: sums over them are the trace and the squared Frobenius norm themselves."""
        d = math.prod(z.shape[1:])
        eye = torch.eye(d, dtype=z.dtype, device=z.device).reshape(d, 1, *z.shape[1:])
        return Probes(eye.expand(d, *z.shape), 1.0)
