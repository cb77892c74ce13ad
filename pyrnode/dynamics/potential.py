"""Dynamics that are the gradient of a potential, ``f = −∇Φ``: our own network (scalar.py), and a user's module."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pyrnode.dynamics.base import BoundDynamics, GradientDynamics
from pyrnode.dynamics.bound_potential import BoundPotential
from pyrnode.dynamics.layers import Time
from pyrnode.dynamics.nested import BoundModule, ModuleDynamics
from pyrnode.dynamics.scalar import CURVES, Scalar, gradient, value
from pyrnode.errors import ConfigError, unknown_name

_SMALL = 1e-3
"""Entries of A at the identity. At zero AᵀA has no slope, and A would stay there; so f is 3e-6 s, not 0."""


class Potential(GradientDynamics):
    """``f(z, t) = −∇_z Φ(z, t)`` of OT-Flow's potential on vectors ``(batch, d)`` (Onken et al. 2021, eqs. 9 and 10).

    ``Φ(s) = wᵀN(s) + ½ sᵀAᵀA s + bᵀs``, ``s = (z, t)``, N a residual network. Trace and norm of ``∂f/∂z`` are exact, in
    closed form. A context joins the first layer as time does, and adds to b, linearly.

    Args:
        dim: Dimension ``d`` of the state.
        hidden: The width of each layer of N: all the same.
        activation: ``"logcosh"`` (the antiderivative of tanh, OT-Flow's), ``"softplus"`` or ``"tanh"``.
        time: ``"concat"``: s has the time; ``"none"``: Φ does not change in time, and ``∂Φ/∂t = 0``.
        rank: Rows of A; at most as many as s has numbers are made.
        initial: ``"identity"``: w and b zero and A of the size 1e-3, so that f is zero but for a few millionths of z;
            ``"ot-flow"``: w of ones, b zero, A by Xavier, as in OT-Flow's code.
        context_dim: Number of features of the context; 0 for none.
        generator: What the parameters are drawn from; default torch's global generator.

    Raises:
        ConfigError: Widths that differ, or an activation, a time or an initial state that it does not have.
    """

    closed_trace = True

    def __init__(
        self,
        dim: int,
        hidden: tuple[int, ...] = (64, 64),
        *,
        activation: str = "logcosh",
        time: str = "concat",
        rank: int = 10,
        initial: str = "identity",
        context_dim: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_settings(hidden, activation, time, rank, initial)
        self.event_shape: tuple[int, ...] = (dim,)
        self.context_dim = context_dim
        self.activation = activation
        self.timed: bool = time == "concat"
        width, inputs = hidden[0], dim + self.timed
        device = None if generator is None else generator.device

        def made(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        sizes = [inputs, *hidden[:-1]]
        self.layers: nn.ModuleList = nn.ModuleList(_Affine(made(width, size), made(width)) for size in sizes)
        self.w: nn.Parameter = nn.Parameter(made(width))
        self.b: nn.Parameter = nn.Parameter(made(inputs))
        self.A = nn.Parameter(made(min(rank, inputs), inputs))
        self.context: _Affine | None = _Affine(made(width + inputs, context_dim), None) if context_dim else None
        self.reset_parameters(initial, generator)

    def reset_parameters(self, initial: str = "identity", generator: torch.Generator | None = None) -> None:
        """Draws the parameters: the layers' as PyTorch does, the others as `initial` says."""
        with torch.no_grad():
            for parameter, bound in self._bounds(initial):
                parameter.uniform_(-bound, bound, generator=generator) if bound else parameter.zero_()
            if initial == "ot-flow":
                self.w.fill_(1)

    def _bounds(self, initial: str) -> Iterable[tuple[Tensor, float]]:
        """Every parameter, and within what it is drawn."""
        for layer in self._layers:
            bound = 1 / math.sqrt(layer.weight.shape[1])
            yield layer.weight, bound
            assert layer.bias is not None
            yield layer.bias, bound
        yield self.w, 0.0
        yield self.b, 0.0
        yield self.A, _SMALL if initial == "identity" else math.sqrt(6 / sum(self.A.shape))
        if self.context is not None:
            shift, slope = self.context.weight.split([len(self.w), len(self.b)])
            yield shift, 1 / math.sqrt(len(self.b) + self.context_dim)
            yield slope, 0.0

    @property
    def _layers(self) -> list[_Affine]:
        return [layer for layer in self.layers if isinstance(layer, _Affine)]

    def scalar(self, *, detach: bool = False) -> Scalar:
        """The parameters as the functions of scalar.py take them."""

        def given(p: Tensor | None) -> Tensor:
            assert p is not None
            return p.detach() if detach else p

        layers = self._layers
        return Scalar(
            [given(layer.weight) for layer in layers],
            [given(layer.bias) for layer in layers],
            given(self.w),
            given(self.A),
            given(self.b),
            CURVES[self.activation],
            self.timed,
        )

    def potential(self, t: Time, z: Tensor, c: Tensor | None = None) -> Tensor:
        scalar = self.scalar()
        return value(scalar, scalar.point(t, z), c)

    def slopes(self, t: Time, z: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        scalar, d = self.scalar(), z.shape[1]
        G = gradient(scalar, scalar.point(t, z), c).G
        return G[:, :d], G[:, d] if self.timed else torch.zeros_like(G[:, 0])

    def embed(self, context: Tensor) -> Tensor:
        assert self.context is not None
        return context @ self.context.weight.t()

    def solved_parameters(self) -> Iterable[nn.Parameter]:
        return [*self.layers.parameters(), self.w, self.A, self.b]

    def bind(self, *, total_derivative: bool = False, hjb: bool = False, exact: bool = False) -> BoundDynamics:
        if total_derivative:
            return BoundModule(self, total_derivative=True, hjb=hjb)
        return BoundPotential(self.scalar(detach=True), exact=exact, hjb=hjb)

    def extra_repr(self) -> str:
        time = "" if self.timed else ", time='none'"
        context = f", context_dim={self.context_dim}" if self.context_dim else ""
        return f"event_shape={self.event_shape}, activation={self.activation!r}, rank={len(self.A)}{time}{context}"


class _Affine(nn.Module):
    """The parameters of one affine map."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight: nn.Parameter = nn.Parameter(weight)
        self.bias: nn.Parameter | None = None if bias is None else nn.Parameter(bias)

    def extra_repr(self) -> str:
        outputs, inputs = self.weight.shape
        return f"{inputs}, {outputs}"


def check_settings(hidden: tuple[int, ...], activation: str, time: str, rank: int, initial: str) -> None:
    """Raises `ConfigError` where a potential cannot be made so."""
    if not hidden or min(hidden) < 1 or len(set(hidden)) > 1:
        raise ConfigError(
            f"hidden = {hidden!r}: the layers of a potential add to one another, so give one positive width for all, "
            "e.g. (64, 64)"
        )
    if activation not in CURVES:
        raise ConfigError(
            unknown_name("activation of a potential (its curvature takes three derivatives)", activation, CURVES)
        )
    if time not in ("concat", "none"):
        raise ConfigError(unknown_name("time of a potential", time, ("concat", "none")))
    if rank < 1:
        raise ConfigError(f"rank = {rank!r}: expected at least 1")
    if initial not in ("identity", "ot-flow"):
        raise ConfigError(unknown_name("initial", initial, ("identity", "ot-flow")))


def check_shape(event_shape: tuple[int, ...]) -> None:
    """Raises `ConfigError` for the potentials of images."""
    if len(event_shape) != 1:
        raise ConfigError(
            f"a potential of states {tuple(event_shape)}: expected vectors (d,). The first layer joins every number "
            "with every other, so a network for images would have neither their neighbourhoods nor an affordable "
            "Laplacian: flatten = true takes them for vectors, or use network.kind = 'conv'"
        )


class PotentialDynamics(ModuleDynamics, GradientDynamics):
    """``f(z, t) = −∇_z Φ(t, z)`` of the user's own scalar potential, by nested autograd.

    Args:
        module: Called as ``module(t, z)`` with `t` ``(batch,)`` and `z` ``(batch, d)``, or with a context as
            ``module(t, z, c)`` with `c` ``(batch, m)``; returns Φ of each sample, ``(batch,)``. It must treat the
            samples of a batch separately (no batch normalisation), and have three derivatives in z.
        event_shape: ``(d,)``.
        context_dim: Number of features ``m`` of the context; 0 for none.

    Raises:
        ConfigError: The module does not map ``(batch, d)`` to ``(batch,)``, or the states are images.

    Example:
        >>> import torch, pyrnode
        >>> class Bowl(torch.nn.Module):
        ...     def forward(self, t, z):
        ...         return 0.5 * (1 + t) * z.square().sum(1)
        >>> bowl = pyrnode.PotentialDynamics(Bowl(), (2,))
        >>> bowl(1.0, torch.tensor([[1.0, 2.0]]))
        tensor([[-2., -4.]])
    """

    def __init__(self, module: nn.Module, event_shape: tuple[int, ...], context_dim: int = 0) -> None:
        check_shape(event_shape)
        super().__init__(module, event_shape, context_dim)

    @property
    def _result_shape(self) -> tuple[int, ...]:
        return ()

    def potential(self, t: Time, z: Tensor, c: Tensor | None = None) -> Tensor:
        return self._call(t, z, c)

    def slopes(self, t: Time, z: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        time = t if isinstance(t, Tensor) else z.new_full((len(z),), t)
        grad = torch.func.grad(lambda time, z: self._call(time, z, c).sum(), argnums=(0, 1))
        rise, gradient = grad(time, z)  # torch.func: it nests in autograd, in itself, and in no_grad
        return gradient, rise

    def rate(self, t: Time, z: Tensor, c: Tensor | None) -> Tensor:
        return -self.slopes(t, z, c)[0]
