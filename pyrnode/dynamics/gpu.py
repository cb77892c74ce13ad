"""Activations on a GPU by the kernels of `native.pointwise`, where those are; else as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrnode.dynamics.activations import Activation
from pyrnode.native import pointwise


def kernelled(exact: Activation, name: str, device: torch.device) -> Activation:
    """The activation of that name, by kernels where there are some for the device. Autograd does not see those."""
    found = pointwise.kernels(name, device)
    return exact if found is None else Kernelled(exact, found)


class Kernelled(Activation):
    """An activation by kernels.

    Args:
        exact: The same by torch's operations, where a tensor is not of a kernel's kind.
        kernels: The kernels.
    """

    fuses = True

    def __init__(self, exact: Activation, kernels: pointwise.Kernels) -> None:
        self.exact, self.kernels = exact, kernels
        self.keeps_input, self.keeps_r = exact.keeps_input, exact.keeps_r

    def enter(
        self, u: Tensor, scale: Tensor | None, shift: Tensor, *, sloped: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        found = self.kernels.activate(u, scale, shift, kept=self.keeps_input, sloped=sloped)
        return self.exact.enter(u, scale, shift, sloped=sloped) if found is None else found

    def value(self, a: Tensor) -> Tensor:
        return self.exact.value(a)

    def slope(self, a: Tensor, h: Tensor) -> Tensor:
        found = self.kernels.slope(a if self.keeps_input else h)
        return self.exact.slope(a, h) if found is None else found

    def bend(self, a: Tensor, h: Tensor, slope: Tensor, g: Tensor, r: Tensor) -> Tensor:
        return self.exact.bend(a, h, slope, g, r)

    def activate(self, a: Tensor) -> tuple[Tensor, Tensor]:
        return self.exact.activate(a)

    def pull(self, a: Tensor, h: Tensor, slope: Tensor, g: Tensor, r: Tensor, g_bar: Tensor) -> tuple[Tensor, Tensor]:
        found = self.kernels.pull(g_bar, slope, a if self.keeps_input else h, r if self.keeps_r else g)
        return self.exact.pull(a, h, slope, g, r, g_bar) if found is None else found
