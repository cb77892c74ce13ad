"""Dynamics of the user's own: any `nn.Module` ``f(t, z)`` or ``f(t, z, c)``, differentiated by nested autograd."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyrnode.dynamics.base import BoundDynamics, Cotangents, Dynamics, Linearization, hjb_residual
from pyrnode.dynamics.layers import Time
from pyrnode.errors import ConfigError


@dataclass
class _Graph:
    """The live autograd graph of one evaluation."""

    z: Tensor
    c: Tensor | None
    f: Tensor
    w: Tensor | None
    r: Tensor | None
    hjb: Tensor | None

    def pull(self, bars: Cotangents, inputs: list[Tensor]) -> list[Tensor | None]:
        """Cotangents of z and of the `inputs`; `None` where nothing depends on them."""
        pairs = [(self.f, bars.f), (self.w, bars.w), (self.r, bars.r), (self.hjb, bars.hjb)]
        live = [(y, bar) for y, bar in pairs if y is not None and bar is not None and y.requires_grad]
        if not live:
            return [None] * (1 + len(inputs))
        outputs, given = zip(*live, strict=True)
        return list(torch.autograd.grad(outputs, [self.z, *inputs], given, allow_unused=True, retain_graph=True))


class BoundModule(BoundDynamics):
    """Evaluates any dynamics: w by a vector-Jacobian product whose graph is kept.

    The general path: slower than an explicit product, and the only one that knows the total derivative.
    """

    def __init__(self, dynamics: Dynamics, *, total_derivative: bool = False, hjb: bool = False) -> None:
        self.dynamics = dynamics
        self.total_derivative, self.hjb = total_derivative, hjb
        self.parameters = list(dynamics.solved_parameters())
        self.trainable = [p for p in self.parameters if p.requires_grad]
        self.sums = [torch.zeros_like(p) for p in self.parameters]

    @torch.inference_mode(False)
    @torch.enable_grad()
    def linearize(
        self, t: Time, z: Tensor, eps: Tensor | None, *, c: Tensor | None = None, tape: bool = False
    ) -> Linearization:
        z, t = _recordable(z), _recordable(t) if isinstance(t, Tensor) else t
        eps, c = (None if x is None else _recordable(x) for x in (eps, c))
        if eps is None and not tape:
            with torch.no_grad():
                return Linearization(self.dynamics.rate(t, z, c), None, None, None)
        z = z.detach().requires_grad_()
        c = None if c is None else c.detach().requires_grad_(tape)
        if self.total_derivative:
            t = t.detach() if isinstance(t, Tensor) else z.new_full((len(z),), t, requires_grad=False)
            t = t.requires_grad_()
        hjb = w = r = None
        if self.hjb and eps is not None:
            f, hjb = hjb_residual(self.dynamics, t, z, c)
        else:
            f = self.dynamics.rate(t, z, c)
        if eps is not None:
            w = torch.stack([vjp(f, z, e, create_graph=tape) for e in eps.unbind(0)])
        if self.total_derivative:
            assert isinstance(t, Tensor)
            r = total_derivative(t, z, f)
        graph = _Graph(z, c, f, w, r, hjb) if tape else None
        w, r, hjb = (None if x is None else x.detach() for x in (w, r, hjb))
        return Linearization(f.detach(), w, r, graph, hjb=hjb)

    def pullback(self, linearization: Linearization, bars: Cotangents) -> tuple[Tensor, Tensor | None]:
        graph: _Graph = linearization.tape
        inputs = [*([] if graph.c is None else [graph.c]), *self.trainable]
        z_bar, *rest = graph.pull(bars, inputs)
        c_bar = None
        if graph.c is not None:
            c_bar = rest.pop(0)
            c_bar = torch.zeros_like(graph.c) if c_bar is None else c_bar
        found = iter(rest)
        for p, total in zip(self.parameters, self.sums, strict=True):
            bar = next(found) if p.requires_grad else None
            if bar is not None:
                total.add_(bar)
        return torch.zeros_like(graph.z) if z_bar is None else z_bar, c_bar

    def pullback_state(self, linearization: Linearization, bars: Cotangents) -> Tensor:
        graph: _Graph = linearization.tape
        (z_bar,) = graph.pull(bars, [])
        return torch.zeros_like(graph.z) if z_bar is None else z_bar

    def tape_bytes(self, z: Tensor, probes: int) -> int:
        return 0  # not known

    def gradients(self) -> list[Tensor]:
        return self.sums


def _recordable(x: Tensor) -> Tensor:
    """`x`, or a copy that autograd takes where it was made in inference mode."""
    return x.clone() if x.is_inference() else x


def vjp(f: Tensor, z: Tensor, v: Tensor, *, create_graph: bool) -> Tensor:
    """``vᵀ ∂f/∂z``; zero where f does not depend on z."""
    if not f.requires_grad:
        return torch.zeros_like(z)
    (w,) = torch.autograd.grad(f, z, v, create_graph=create_graph, retain_graph=True, allow_unused=True)
    return torch.zeros_like(z) if w is None else w


def total_derivative(t: Tensor, z: Tensor, f: Tensor) -> Tensor:
    """``(∂f/∂z) f + ∂f/∂t`` (eq. 7): a Jacobian-vector product, not Jᵀf.

    Got from two vector-Jacobian products (``uᵀJ`` is linear in u, and its transpose in u is J), so that any module
    that can be differentiated twice will do.
    """
    if not f.requires_grad:
        return torch.zeros_like(z)
    u = torch.zeros_like(f, requires_grad=True)
    products = torch.autograd.grad(f, (z, t), u, create_graph=True, allow_unused=True)
    pairs = [(p, v) for p, v in zip(products, (f, torch.ones_like(t)), strict=True) if p is not None]
    linear = [(p, v) for p, v in pairs if p.requires_grad]
    if not linear:
        return torch.zeros_like(z)
    outputs, directions = zip(*linear, strict=True)
    (r,) = torch.autograd.grad(outputs, u, directions, create_graph=True)
    result: Tensor = r
    return result


class ModuleDynamics(Dynamics):
    """Dynamics given by the user's own module.

    Args:
        module: Called as ``module(t, z)`` with `t` ``(batch,)`` and `z` ``(batch, *event)``, or with a context as
            ``module(t, z, c)`` with `c` ``(batch, m)``; returns ``(batch, *event)``. It must treat the samples of a
            batch separately (no batch normalisation).
        event_shape: Shape of one state, without the batch.
        context_dim: Number of features ``m`` of the context; 0 for none.

    Raises:
        ConfigError: The module does not map ``(batch, *event)`` to itself.
    """

    def __init__(self, module: nn.Module, event_shape: tuple[int, ...], context_dim: int = 0) -> None:
        super().__init__()
        self.module = module
        self.event_shape: tuple[int, ...] = tuple(event_shape)
        self.context_dim = context_dim
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                raise ConfigError(
                    f"{type(layer).__name__} mixes the samples of a batch, so the divergence of one sample is not "
                    "defined; use GroupNorm, LayerNorm or none"
                )
        reference = next(module.parameters(), torch.zeros((), dtype=torch.float32))
        with torch.no_grad():
            context = reference.new_zeros(2, context_dim) if context_dim else None
            try:
                probe = self._call(0.5, reference.new_zeros(2, *self.event_shape), context)
            except TypeError as error:
                form = "module(t, z, c)" if context_dim else "module(t, z)"
                raise ConfigError(f"the dynamics cannot be called as {form}: {error}") from error
        if not isinstance(probe, Tensor) or tuple(probe.shape) != (2, *self._result_shape):
            shape = tuple(probe.shape) if isinstance(probe, Tensor) else type(probe).__name__
            expected = "the same" if self._result_shape == self.event_shape else str((2, *self._result_shape))
            given = f"module(t, z) gave {shape} for z of shape {(2, *self.event_shape)}"
            raise ConfigError(f"{given}; expected {expected}")

    @property
    def _result_shape(self) -> tuple[int, ...]:
        """Shape of what the module gives for one state."""
        return self.event_shape

    def _call(self, t: Time, z: Tensor, c: Tensor | None) -> Tensor:
        time = t if isinstance(t, Tensor) else z.new_full((len(z),), t)
        result: Tensor = self.module(time, z) if c is None else self.module(time, z, c)
        return result

    def rate(self, t: Time, z: Tensor, c: Tensor | None) -> Tensor:
        return self._call(t, z, c)

    def bind(self, *, total_derivative: bool = False, hjb: bool = False, exact: bool = False) -> BoundDynamics:
        return BoundModule(self, total_derivative=total_derivative, hjb=hjb)
