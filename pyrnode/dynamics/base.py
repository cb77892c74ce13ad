"""What dynamics are to an engine: bound to their parameters, they give f with εᵀ∂f/∂z, and pull cotangents back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from pyrnode.dynamics.layers import Time


class Linearization(NamedTuple):
    """The dynamics at a point: f with its vector-Jacobian products.

    Attributes:
        f: ``f(z, t; θ)``, ``(batch, *event)``.
        w: ``εᵀ ∂f/∂z`` for each probe, ``(k, batch, *event)``; `None` if no noise was given.
        r: The total derivative ``(∂f/∂z) f + ∂f/∂t``, ``(batch, *event)``; `None` unless asked for.
        tape: What `BoundDynamics.pullback` needs to pull cotangents back.
        hjb: ``∂Φ/∂t − ½‖∇Φ‖²`` of a potential, ``(batch,)``; `None` unless asked for.
    """

    f: Tensor
    w: Tensor | None
    r: Tensor | None
    tape: Any
    hjb: Tensor | None = None


class Cotangents(NamedTuple):
    """The cotangents of what a `Linearization` has, and of `BoundDynamics.trace_and_norm`; `None` is zero."""

    f: Tensor
    w: Tensor | None = None
    r: Tensor | None = None
    trace: Tensor | None = None
    frobenius: Tensor | None = None
    hjb: Tensor | None = None


class SplitPullback(Protocol):
    """Products and pullback in parts, over one tape that holds the evaluations of many stages side by side.

    The stages' states have to be found one after the other, their products do not. And the cotangent w̄ of every stage
    is known as soon as the forward solve is done; only f̄ has to wait for the stages after it. So the products of all
    stages are pulled back at once, the states stage by stage, and the parameters at once again.
    """

    def join(self, linearizations: list[Linearization], t: Tensor, eps: Tensor | None) -> Linearization:
        """One linearization of all stages, from taped ones of f alone; `t` and `eps` are for the joint batch."""
        ...

    def pull_product(self, linearization: Linearization, w_bar: Tensor) -> None:
        """First: the transpose of the product, for all stages."""

    def pull_state(self, linearization: Linearization, f_bar: Tensor, rows: slice) -> Tensor:
        """Then, from the last stage to the first: the cotangent of the state of the stage at `rows` of the batch."""
        ...

    def pull_parameters(self, linearization: Linearization, f_bar: Tensor) -> Tensor | None:
        """Last: adds the parameters' gradients, given the f̄ of all stages; gives the cotangent of c."""


class BoundDynamics(ABC):
    """The dynamics with their parameters bound for one solve; gradients of the parameters accumulate in it."""

    @abstractmethod
    def linearize(
        self, t: Time, z: Tensor, eps: Tensor | None, *, c: Tensor | None = None, tape: bool = False
    ) -> Linearization:
        """Evaluates f at ``(z, t, c)`` and, where `eps` ``(k, batch, *event)`` is given, the products εᵀ∂f/∂z.

        Args:
            t: Time, one number or ``(batch,)``.
            z: State, ``(batch, *event)``.
            eps: Probes; `None` evaluates f alone.
            c: The samples' embedded context, ``(batch, s)``, where the dynamics have one.
            tape: Keep what `pullback` needs.
        """

    @abstractmethod
    def pullback(self, linearization: Linearization, bars: Cotangents) -> tuple[Tensor, Tensor | None]:
        """Cotangents of z and c from those of the linearization; adds those of θ to the gradients.

        That of c is `None` without a context.
        """

    @abstractmethod
    def pullback_state(self, linearization: Linearization, bars: Cotangents) -> Tensor:
        """The cotangent of z alone, as `pullback` gives it; those of c and θ are not computed."""

    def trace_and_norm(self, linearization: Linearization) -> tuple[Tensor, Tensor] | None:
        """``tr ∂f/∂z`` and ``‖∂f/∂z‖_F²``, ``(batch,)``, of dynamics that give them in place of w (`Dynamics.bind`).

        The linearization was made with probes, and with a tape.
        """
        return None

    def split(self) -> SplitPullback | None:
        """The pullback in parts, for an engine that batches all evaluations of a solve; `None` if it has none."""
        return None

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """The accumulated gradients, in the order of the dynamics' ``solved_parameters()``."""

    @abstractmethod
    def tape_bytes(self, z: Tensor, probes: int) -> int:
        """Size of one evaluation's tape for states like `z`."""

    def layout(self, z: Tensor) -> Tensor:
        """`z` in the memory layout in which the bound dynamics are fast."""
        return z.contiguous()


class Dynamics(nn.Module, ABC):
    """Dynamics ``f(z, t; θ)``, or conditional ones ``f(z, t, c; θ)``.

    A context stays the same along a solve, so what the parameters make of it is made once: `embed`, by autograd. The
    engines, and `rate`, see the embedded context alone.

    Attributes:
        event_shape: Shape of one state, without the batch.
        context_dim: Number of features ``m`` of the context; 0 for unconditional dynamics.
        closed_trace: Whether they have the trace of their Jacobian in closed form.
    """

    event_shape: tuple[int, ...]
    context_dim: int = 0
    closed_trace: bool = False

    def forward(self, t: Time, z: Tensor, context: Tensor | None = None) -> Tensor:
        """``f(z, t, c; θ)``, ``(batch, *event)``, differentiable by autograd.

        Args:
            t: Time, one number or ``(batch,)``.
            z: State, ``(batch, *event)``.
            context: ``(batch, m)``, for conditional dynamics.
        """
        return self.rate(t, z, None if context is None else self.embed(context))

    @abstractmethod
    def rate(self, t: Time, z: Tensor, c: Tensor | None) -> Tensor:
        """`forward` with the context as `embed` gives it."""

    def embed(self, context: Tensor) -> Tensor:
        """What a solve needs of the context ``(batch, m)``: ``(batch, s)``; here the context itself."""
        return context

    def solved_parameters(self) -> Iterable[nn.Parameter]:
        """The parameters that a solve depends on, once the context is embedded."""
        return self.parameters()

    @abstractmethod
    def bind(self, *, total_derivative: bool = False, hjb: bool = False, exact: bool = False) -> BoundDynamics:
        """The dynamics as an engine computes with them: bound to the present parameters.

        Args:
            total_derivative: Linearizations with probes have r.
            hjb: Linearizations with probes have the residual of the Hamilton-Jacobi equation; of potentials alone.
            exact: The probes will be the unit vectors: dynamics that have trace and norm in closed form may give them
                in place of the products.
        """


class GradientDynamics(Dynamics):
    """Dynamics that are the gradient of a potential, ``f(z, t, c) = −∇_z Φ(t, z, c)``, on vectors ``(batch, d)``."""

    @abstractmethod
    def potential(self, t: Time, z: Tensor, c: Tensor | None = None) -> Tensor:
        """``Φ``, ``(batch,)``, of the embedded context; differentiable."""

    @abstractmethod
    def slopes(self, t: Time, z: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """``∇_z Φ`` ``(batch, d)`` and ``∂Φ/∂t`` ``(batch,)``, differentiable to any order."""

    def rate(self, t: Time, z: Tensor, c: Tensor | None) -> Tensor:
        return -self.slopes(t, z, c)[0]


def hjb_residual(dynamics: Dynamics, t: Time, z: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """``f`` and ``∂Φ/∂t − ½‖∇Φ‖²`` ``(batch,)`` of a potential, differentiable (OT-Flow, eq. 7)."""
    assert isinstance(dynamics, GradientDynamics)
    gradient, rise = dynamics.slopes(t, z, c)
    return -gradient, rise - 0.5 * gradient.square().sum(1)
