"""The plain engine: the state and l in ordinary differentiable operations, which torch can trace, transform and export.

The other engines' bound dynamics are faster in training: they write into their own intermediates and keep tapes. Here
nothing is written in place and nothing depends on values, so the same code runs under autograd, to any order, under
`torch.func` and `torch.export`. Steps are a fixed grid, written out one after the other.

Probes may be shared by the samples of a batch, ``(k, 1, *event)``: ``Σ_k ε_k · (∂f/∂z) ε_k`` over the unit vectors is
the trace, over seeded noise an estimate. Jacobian-vector products run forward with the network, so that the first
layer's is one product for the whole batch, and so is the transpose of the last one's, at which they end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrnode import solvers
from pyrnode.config import SolverConfig
from pyrnode.contexts import Contexts
from pyrnode.dynamics import Dynamics
from pyrnode.dynamics.layered import LayeredDynamics
from pyrnode.dynamics.layers import TIME_ENTRIES, Conv, Dense, Layer, Linear, TimeEntry
from pyrnode.dynamics.potential import Potential
from pyrnode.dynamics.scalar import curvature, gradient
from pyrnode.engines.base import Engine, Solution, Stats
from pyrnode.engines.runge_kutta import combine, grid
from pyrnode.errors import ConfigError, SolverError
from pyrnode.probes import Probes
from pyrnode.solvers import SolverInfo
from pyrnode.tracing import holds

_MAX_STEPS = 10_000


class PlainEngine(Engine):
    """Explicit Runge-Kutta methods along a fixed grid, those with an error estimate too; integrates z and l alone."""

    name = "plain"

    def solvers(self) -> list[SolverInfo]:
        return [method.info for method in solvers.METHODS.values()]

    def sensitivities(self) -> dict[str, str]:
        return {"Backprop": "autograd through the operations themselves, to any order"}

    def check(self, solver: SolverConfig) -> None:
        solvers.method(solver.name)
        solvers.step_size(solver)

    def steps(self, t_span: tuple[float, float], solver: SolverConfig) -> list[tuple[float, float]]:
        """Times and lengths of the steps; `ConfigError` where they are too many to be written out."""
        step_size = float(solver.step_size)
        if abs(t_span[1] - t_span[0]) / step_size > _MAX_STEPS:
            raise ConfigError(f"step_size = {step_size:g}: more than {_MAX_STEPS} steps; take a larger one")
        return grid(t_span, step_size)

    def integrate(
        self,
        dynamics: Dynamics,
        z0: Tensor,
        probes: Probes | None,
        t_span: tuple[float, float],
        solver: SolverConfig,
        *,
        context: Tensor | Contexts | None = None,
        total_derivative: bool = False,
        hjb: bool = False,
    ) -> Solution:
        self.check(solver)
        if total_derivative or hjb:
            raise ConfigError("the plain engine integrates z and l alone; for the penalties take another engine")
        tableau, steps = solvers.method(solver.name).tableau, self.steps(t_span, solver)
        if isinstance(context, Contexts):
            context = context.whole()
        rates, eps = bind(dynamics, context), None if probes is None else probes.eps
        z, l = z0, None
        for t, h in steps:
            fs: list[Tensor] = []
            for node, row, b in zip(tableau.c, tableau.a, tableau.b, strict=True):
                f, div = rates(t + node * h, combine(z, fs, row, h), eps if b else None)
                fs.append(f)
                if div is not None:
                    l = h * b * div if l is None else torch.add(l, div, alpha=h * b)
            z = combine(z, fs, tableau.b, h)
        zero = z.new_zeros(z.shape[0])
        l = zero if l is None or probes is None else l if probes.weight == 1 else l * probes.weight
        if not holds(torch.isfinite(z.sum() + l.sum())):
            raise SolverError(
                f"the state is not finite at t = {t_span[1]:g} ({solvers.describe(solver)}); take a smaller step_size",
                status="Unstable",
            )
        nfe = len(steps) * len(tableau.b)
        unknown = zero if probes is None else torch.full_like(zero, math.nan)
        return Solution(z, l, unknown, unknown, zero, zero, Stats(nfe=nfe, nfe_max=nfe, accepted=len(steps)))


class Smooth(NamedTuple):
    """An activation and its slope, both differentiable."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def _silu_slope(a: Tensor) -> Tensor:
    sigma = torch.sigmoid(a)
    return sigma * (1 + a * (1 - sigma))


def _gelu_slope(a: Tensor) -> Tensor:
    density = torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(a / math.sqrt(2))) + a * density


SMOOTH: dict[str, Smooth] = {
    # torch switches to the identity above the threshold: at its default, 2e-9 too early for double precision
    "softplus": Smooth(lambda a: F.softplus(a, threshold=40), torch.sigmoid),
    "tanh": Smooth(torch.tanh, lambda a: 1 - torch.tanh(a).square()),
    "silu": Smooth(F.silu, _silu_slope),
    "gelu": Smooth(F.gelu, _gelu_slope),
    "elu": Smooth(F.elu, lambda a: torch.exp(a.clamp(max=0))),  # clamped: no infinity for autograd to multiply by 0
}
"""The activations of `pyrnode.dynamics.activations`, by name."""


class PlainConv(Conv):
    """`Conv` in whatever memory layout the input has; takes ``(k, batch, C, H, W)`` too."""

    def __init__(self, weight: Tensor, size: tuple[int, int]) -> None:
        Linear.__init__(self, weight)
        self.size = size
        self.padding = weight.shape[-1] // 2

    def __call__(self, h: Tensor, shift: Tensor | None = None) -> Tensor:
        a = F.conv2d(h.flatten(0, -4), self.weight, padding=self.padding)
        a = a.unflatten(0, h.shape[:2]) if h.ndim == 5 else a
        return a if shift is None else a + shift

    def transpose(self, g: Tensor) -> Tensor:
        return F.conv_transpose2d(g, self.weight, padding=self.padding)

    def constant(self, weight: Tensor) -> Tensor:
        return F.conv2d(weight.new_ones(1, 1, *self.size), weight, padding=self.padding)[0]


def _bind(layer: Layer) -> TimeEntry:
    """The layer's operators over its present parameters, as `Layer.bind` gives them, but for the convolutions."""
    values: dict[str, Tensor] = dict(layer.named_parameters())
    weight = values.pop("weight")
    return TIME_ENTRIES[layer.time](Dense(weight) if layer.size is None else PlainConv(weight, layer.size), values)


class Rates(Protocol):
    """The right-hand side of ``z' = f`` and ``l' = tr ∂f/∂z``, bound to the present parameters."""

    def __call__(self, t: float, z: Tensor, probes: Tensor | None, /) -> tuple[Tensor, Tensor | None]:
        """``f`` ``(batch, *event)`` and ``Σ_k ε_k · (∂f/∂z) ε_k`` ``(batch,)``, of ``(k, batch or 1, *event)``."""
        ...


class LayeredRates:
    """The rates of an `MLP` or a `ConvNet`, for the contexts ``(batch, m)`` of one batch, where it takes any."""

    def __init__(self, dynamics: LayeredDynamics, context: Tensor | None = None) -> None:
        self.layers = [_bind(layer) for layer in dynamics.layers]  # type: ignore[arg-type]
        self.phi = SMOOTH[dynamics.activation]
        self.times: dict[float, list[tuple[Tensor | None, Tensor]]] = {}
        self.contexts: list[Tensor | None] = [None] * len(self.layers)
        if context is not None:
            widths = [layer.linear.weight.shape[0] * layer.context_parts for layer in self.layers]
            self.contexts = list(dynamics.embed(context).split(widths, 1))

    def _at(self, t: float) -> list[tuple[Tensor | None, Tensor]]:
        if t not in self.times:  # the middle of an RK4 step is asked for twice
            self.times[t] = [layer.at(t, c) for layer, c in zip(self.layers, self.contexts, strict=True)]
        return self.times[t]

    def __call__(self, t: float, z: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor | None]:
        entries = [(layer.linear, *entry) for layer, entry in zip(self.layers, self._at(t), strict=True)]
        hidden, (last, last_scale, last_shift) = entries[:-1], entries[-1]
        h, p = z, probes
        for linear, scale, shift in hidden:
            a = _affine(linear, h, scale, shift)
            h = self.phi.value(a)
            if p is not None:
                p = _scaled(linear(p), scale) * self.phi.slope(a)
        f = _affine(last, h, last_scale, last_shift)
        if p is None or probes is None:
            return f, None
        q = _scaled(probes, last_scale)
        q = last.transpose(q.flatten(0, 1)).unflatten(0, q.shape[:2])
        return f, (p * q).flatten(2).sum((0, 2)).expand(z.shape[0])


def _affine(linear: Linear, h: Tensor, scale: Tensor | None, shift: Tensor) -> Tensor:
    return linear(h, shift) if scale is None else linear(h) * scale + shift


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale


class PotentialRates:
    """The rates of a `Potential`: the probes run forward alone, for ``εᵀ∇²Φ ε`` is a sum of weighted squares."""

    def __init__(self, dynamics: Potential, context: Tensor | None = None) -> None:
        self.scalar = dynamics.scalar()
        self.context = None if context is None else dynamics.embed(context)

    def __call__(self, t: float, z: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor | None]:
        at = gradient(self.scalar, self.scalar.point(t, z), self.context)
        f = -at.G[:, : z.shape[1]]
        return f, None if probes is None else -curvature(self.scalar, at, probes)


class ModuleRates:
    """The rates of any other dynamics, differentiated by torch."""

    def __init__(self, dynamics: Dynamics, context: Tensor | None = None) -> None:
        self.dynamics, self.context = dynamics, context

    def __call__(self, t: float, z: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor | None]:
        times = z.new_full(z.shape[:1], t)
        return _differentiate(lambda state: self.dynamics(times, state, self.context), z, probes)


def _differentiate(field: Callable[[Tensor], Tensor], z: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``f`` and ``Σ_k ε_k · (∂f/∂z) ε_k``: a vector-Jacobian product for each probe.

    torch's forward mode is no faster for as many products, and warns of parts of its own that are deprecated.
    """
    if probes is None:
        return field(z), None
    f, pull, *_ = torch.func.vjp(field, z)
    terms = [(eps * pull(eps.expand_as(z))[0]).flatten(1).sum(1) for eps in probes.unbind(0)]
    return f, torch.stack(terms).sum(0)


class Recorded(nn.Module):
    """Dynamics whose differentiation is recorded, for any batch, as the tensor operations that it comes down to.

    `torch.export` cannot look into torch's own differentiation, but takes what is recorded here.

    Args:
        dynamics: Any dynamics.
        probes: Number of probes that the rates will be asked for.
    """

    def __init__(self, dynamics: Dynamics, probes: int) -> None:
        from torch.fx.experimental.proxy_tensor import make_fx

        super().__init__()
        self.dynamics, self.event_shape, self.context_dim = dynamics, dynamics.event_shape, dynamics.context_dim
        values = self._values()
        # sizes that are equal when recording are taken to be equal for ever, so the batch's must be like no other
        sizes = {size for value in values.values() for size in value.shape}
        sizes |= {*self.event_shape, probes, dynamics.context_dim}
        batch = next(n for n in itertools.count(5) if n not in sizes)
        like = next(iter(values.values()), torch.zeros((), dtype=torch.float32))
        z, eps = like.new_ones(batch, *self.event_shape), like.new_ones(probes, 1, *self.event_shape)
        context = [like.new_ones(batch, dynamics.context_dim)] if dynamics.context_dim else []

        def rates(
            values: dict[str, Tensor], t: Tensor, z: Tensor, eps: Tensor, *context: Tensor
        ) -> tuple[Tensor, Tensor | None]:
            return _differentiate(lambda y: torch.func.functional_call(dynamics, values, (t, y, *context)), z, eps)

        with torch.no_grad():
            self.graph = make_fx(rates, tracing_mode="symbolic")(values, like.new_ones(batch), z, eps, *context)

    def _values(self) -> dict[str, Tensor]:
        return {**dict(self.dynamics.named_parameters()), **dict(self.dynamics.named_buffers())}

    def rates(self, context: Tensor | None) -> Rates:
        """The rates for the contexts of one batch."""

        def rates(t: float, z: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor | None]:
            times = z.new_full(z.shape[:1], t)
            if probes is None:
                return self.dynamics(times, z, context), None
            f, div = self.graph(self._values(), times, z, probes, *([] if context is None else [context]))
            return f, div

        return rates


def bind(dynamics: nn.Module, context: Tensor | None) -> Rates:
    """The rates of dynamics with their present parameters, for the contexts ``(batch, m)`` of one batch."""
    if isinstance(dynamics, LayeredDynamics):
        return LayeredRates(dynamics, context)
    if isinstance(dynamics, Potential):
        return PotentialRates(dynamics, context)
    if isinstance(dynamics, Recorded):
        return dynamics.rates(context)
    assert isinstance(dynamics, Dynamics)
    return ModuleRates(dynamics, context)
