"""Dynamics that only Python can evaluate, such as a module of the user's own, for a solver in Julia."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrnode.dynamics import Dynamics
from pyrnode.dynamics.base import BoundDynamics, Cotangents, Linearization
from pyrnode.probes import Probes

_GIVEN = ("f", "w", "r", "hjb")  # of a linearization
_BUFFERS = ("z", "c", "eps", *_GIVEN, *(f"{name}_bar" for name in _GIVEN), "z_bar", "c_bar", "theta_bar")


class Foreign:
    """Dynamics that only Python can evaluate, such as a module of the user's own, called by Julia at every evaluation.

    Both sides see the same buffers, so that a call carries no arrays.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        like: Tensor,
        c: Tensor | None,
        probes: Probes | None,
        *,
        total_derivative: bool,
        hjb: bool = False,
    ) -> None:
        self.dynamics, self.total_derivative, self.has_residual = dynamics, total_derivative, hjb
        self.theta = torch.cat([like.new_zeros(0), *(p.detach().reshape(-1) for p in dynamics.solved_parameters())])
        self.c, self.c_bar = (None if c is None else torch.zeros_like(c) for _ in range(2))
        self.z, self.f, self.f_bar, self.z_bar = (torch.empty_like(like) for _ in range(4))
        k = 0 if probes is None else len(probes.eps)
        self.eps, self.w, self.w_bar = (like.new_empty(k, *like.shape) if k else None for _ in range(3))
        self.r, self.r_bar = (torch.empty_like(like) if total_derivative else None for _ in range(2))
        self.hjb, self.hjb_bar = (like.new_empty(len(like)) if hjb else None for _ in range(2))
        self.theta_bar = torch.zeros_like(self.theta)
        self.linearization: Linearization | None = None
        self.bound = self._bind()

    def _bind(self) -> BoundDynamics:
        return self.dynamics.bind(total_derivative=self.total_derivative, hjb=self.has_residual)

    def buffers(self) -> dict[str, Tensor | None]:
        """What both sides see, by the names that Julia's `foreign` knows."""
        return {name: getattr(self, name) for name in _BUFFERS}

    def linearize(self, t: float, probe: bool, tape: bool) -> None:
        """``z, c, ε → f, w, r``, and the residual of a potential, at time `t`."""
        eps = self.eps.clone() if probe and self.eps is not None else None
        z, c = self.bound.layout(self.z.clone()), None if self.c is None else self.c.clone()
        self.linearization = self.bound.linearize(t, z, eps, c=c, tape=tape)
        for name in _GIVEN:
            buffer, value = getattr(self, name), getattr(self.linearization, name)
            if buffer is not None and value is not None:
                buffer.copy_(value)

    def pull(self, has_w: bool) -> None:
        """The cotangents of what `linearize` gave ``→ z̄, c̄``; the gradient of θ gathers in the bound dynamics."""
        assert self.linearization is not None
        bars = Cotangents(self.f_bar)
        if has_w:
            bars = Cotangents(self.f_bar, self.w_bar, self.r_bar, hjb=self.hjb_bar)
        z_bar, c_bar = self.bound.pullback(self.linearization, bars)
        self.z_bar.copy_(z_bar)
        if self.c_bar is not None and c_bar is not None:
            self.c_bar.copy_(c_bar)

    def collect(self) -> None:
        """The gathered gradient ``→ θ̄``; the next one begins at zero."""
        gradients = [g.reshape(-1) for g in self.bound.gradients()]
        if gradients:
            torch.cat(gradients, out=self.theta_bar)
        self.bound = self._bind()
