"""The contract of an engine: it integrates the augmented system of one block, and differentiates through it.

With probes ε held fixed for the whole solve (docs/design.md §2):

    z' = f(z, t; θ)        l' = εᵀ (∂f/∂z) ε        E' = ‖f‖²        n' = ‖εᵀ ∂f/∂z‖²

Everything above a block (composition, loss, optimiser, checkpoints) is the same for every engine.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pyrnode.config import SolverConfig
from pyrnode.contexts import Contexts
from pyrnode.dynamics.base import Dynamics, GradientDynamics
from pyrnode.errors import ConfigError, SolverError
from pyrnode.precision import own_precision
from pyrnode.probes import Probes
from pyrnode.solvers import SolverInfo


@dataclass
class Stats:
    """What one solve did.

    Attributes:
        nfe: Evaluations of the dynamics per sample, forward (mean over the batch).
        nfe_max: The same for the sample that needed most.
        nfe_backward: Evaluations per sample in the backward pass; 0 until it has run.
        accepted: Accepted steps per sample (mean).
        rejected: Rejected steps per sample (mean).
        status: SciML's return code; a solve that returns has ``"Success"``.
    """

    nfe: float = 0.0
    nfe_max: int = 0
    nfe_backward: float = 0.0
    accepted: float = 0.0
    rejected: float = 0.0
    status: str = "Success"


@dataclass
class Solution:
    """The augmented state at the end time; integrals are ``(batch,)`` and zero where no probes were given.

    Attributes:
        z: State, ``(batch, *event)``.
        l: ``∫ tr ∂f/∂z`` (nats), exact or estimated.
        E: ``∫ ‖f‖²``.
        n: ``∫ ‖∂f/∂z‖_F²``, exact or estimated.
        D: ``∫ ‖(∂f/∂z) f + ∂f/∂t‖²``; zero unless the total derivative was asked for.
        H: ``∫ |∂Φ/∂t − ½‖∇Φ‖²|`` of a potential; zero unless asked for.
        stats: Counts and status.
        verify: Raises `SolverError`, naming the step, where the solve is not finite. To look means to wait for the
            device, so a solve of fixed steps on another one than the CPU leaves it to its caller, who can look at many
            results at once; `None` where the solve has looked for itself.
    """

    z: Tensor
    l: Tensor
    E: Tensor
    n: Tensor
    D: Tensor
    H: Tensor
    stats: Stats = field(default_factory=Stats)
    verify: Callable[[], None] | None = field(default=None, repr=False)

    @property
    def total(self) -> Tensor:
        """The sum of everything, which is finite where all of it is (or too large)."""
        return torch.stack([x.detach().sum() for x in (self.z, self.l, self.E, self.n, self.D, self.H)]).sum()

    @classmethod
    def of(cls, z: Tensor, q: Tensor, stats: Stats, verify: Callable[[], None] | None = None) -> Solution:
        """From the integrals (l, E, n, D), and H where asked for, as a solve gives them; all zero where it gives none.

        What the solve does not have is zero.
        """
        found = q.unbind(1)
        l, E, n, D, H = (*found, *z.new_zeros(5 - len(found), len(z)).unbind(0))
        return cls(z, l, E, n, D, H, stats, verify)


def verify(solutions: list[Solution]) -> None:
    """Looks at all solves that have not looked for themselves, waiting for their device once."""
    left = [(solution.total, solution.verify) for solution in solutions if solution.verify is not None]
    if not left or math.isfinite(float(torch.stack([total for total, _ in left]).sum())):
        return
    for _, look in left:
        look()


class Solve(Protocol):
    """One solve of one block, which remembers what its backward pass needs."""

    def forward(self, z0: Tensor) -> tuple[Tensor, Tensor]:
        """The state at the end time and the integrals (l, E, n, D), ``(batch, 4)``, or no columns without probes."""
        ...

    def backward(self, z_bar: Tensor, q_bar: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Cotangents of the start state, of the embedded context, and of the parameters that the solve depends on."""
        ...

    def replay(self, z0: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """`forward` again, in operations that autograd can differentiate to any order.

        Raises:
            ConfigError: The engine cannot; the message names `to_torch`.
        """
        ...


class _Nothing:
    """The solve of an empty batch: no gradient comes of it."""

    def __init__(self, c: Tensor | None, parameters: tuple[Tensor, ...]) -> None:
        self.c, self.parameters = c, parameters

    def forward(self, z0: Tensor) -> tuple[Tensor, Tensor]:
        return z0.clone(), z0.new_zeros(0, 4)

    def backward(self, z_bar: Tensor, q_bar: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        c_bar = None if self.c is None else torch.zeros_like(self.c)
        return z_bar, c_bar, [torch.zeros_like(p) for p in self.parameters]

    def replay(self, z0: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.forward(z0)


class _Differentiable(torch.autograd.Function):
    """The solve as one node of autograd's graph; its parameters are inputs so that they get gradients."""

    @staticmethod
    def forward(ctx: Any, solve: Solve, z0: Tensor, c: Tensor | None, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.solve = solve
        ctx.save_for_backward(z0, c, *parameters)
        return solve.forward(z0.detach())

    @staticmethod
    def backward(ctx: Any, z_bar: Tensor, q_bar: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            with own_precision(z_bar):
                z0_bar, c_bar, gradients = ctx.solve.backward(z_bar, q_bar)
            return None, z0_bar, c_bar, *gradients
        z0, c, *parameters = ctx.saved_tensors  # create_graph=True: the gradient will be differentiated itself
        return None, *_Gradient.apply(ctx.solve, z_bar, q_bar, z0, c, *parameters)


class _Gradient(torch.autograd.Function):
    """The gradient of a solve as a node of its own, which is differentiated, to any order, through `Solve.replay`."""

    @staticmethod
    def forward(
        ctx: Any, solve: Solve, z_bar: Tensor, q_bar: Tensor, z0: Tensor, c: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.solve = solve
        ctx.save_for_backward(z_bar, q_bar, z0, c, *parameters)
        with own_precision(z_bar):
            z0_bar, c_bar, gradients = solve.backward(z_bar, q_bar)
        return z0_bar, c_bar, *gradients

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> tuple[Tensor | None, ...]:
        def gradient(z_bar: Tensor, q_bar: Tensor, z0: Tensor, c: Tensor | None, *parameters: Tensor) -> Tensors:
            return _grad(ctx.solve.replay(z0, c), (z_bar, q_bar), (z0, c, *parameters))

        return None, *_derivative(gradient, 4, ctx.saved_tensors, bars)


Tensors = tuple[Tensor | None, ...]


class _Derivative(torch.autograd.Function):
    """A function of tensors as a node whose derivative is such a node again.

    The first `cut` of its inputs are cut from the graphs that they come from, or else what goes through those would be
    counted here too; the others are parameters, which come from none.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensors], cut: int, *inputs: Tensor | None) -> Tensors:
        ctx.function, ctx.cut = function, cut
        ctx.save_for_backward(*inputs)
        own = (x if x is None else x.detach().requires_grad_(x.requires_grad) for x in inputs[:cut])
        like = next(x for x in inputs if x is not None)
        with torch.enable_grad(), own_precision(like):
            outputs = function(*own, *inputs[cut:])
        return tuple(x if x is None else x.detach() for x in outputs)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> Tensors:
        return None, None, *_derivative(ctx.function, ctx.cut, ctx.saved_tensors, bars)


def _derivative(function: Callable[..., Tensors], cut: int, inputs: Tensors, bars: Tensors) -> Tensors:
    """The cotangents of a function's inputs from those of its outputs."""

    def derivative(*values: Tensor | None) -> Tensors:
        given, own = values[: len(bars)], values[len(bars) :]
        return _grad(function(*own), given, own)

    found: Tensors = _Derivative.apply(derivative, len(bars) + cut, *bars, *inputs)
    return found


def _grad(outputs: Tensors, bars: Tensors, inputs: Tensors) -> Tensors:
    """The gradients for each of the inputs, in autograd's graph; `None` where there is none to be had."""
    live = [(y, bar) for y, bar in zip(outputs, bars, strict=True) if y is not None and bar is not None]
    live = [(y, bar) for y, bar in live if y.requires_grad]
    asked = [x for x in inputs if x is not None and x.requires_grad]
    if not live or not asked:
        return (None,) * len(inputs)
    ys, given = zip(*live, strict=True)
    found = iter(torch.autograd.grad(ys, asked, given, create_graph=True, allow_unused=True))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in inputs)


def run(
    z0: Tensor,
    c: Tensor | None,
    parameters: tuple[Tensor, ...],
    *,
    plain: Callable[[Tensor], tuple[Tensor, Tensor]],
    recorded: Callable[[Tensor], Solve],
) -> tuple[Tensor, Tensor]:
    """The state at the end time and the integrals, as `Solve.forward` gives them.

    Args:
        z0: State at the start.
        c: The context as a solve sees it (`embedded`).
        parameters: Those that the solve depends on.
        plain: Solves where no gradient can be asked for.
        recorded: The solve that becomes a node of autograd's graph where one can.
    """
    inputs = [z0, *parameters, *([] if c is None else [c])]
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if not differentiable:
        return plain(z0) if len(z0) else _Nothing(c, parameters).forward(z0)
    solve = recorded(z0) if len(z0) else _Nothing(c, parameters)
    z, q = _Differentiable.apply(solve, z0, c, *parameters)
    return z, q


def embedded(dynamics: Dynamics, context: Tensor | Contexts | None, batch: int) -> Tensor | None:
    """The context as a solve sees it; raises `ConfigError` where it does not fit the dynamics."""
    if isinstance(context, Contexts):
        given: tuple[int, ...] | None = (len(context), *context.values.shape[1:])
    else:
        given = None if context is None else tuple(context.shape)
    expected = (batch, dynamics.context_dim) if dynamics.context_dim else None
    if given != expected:
        raise ConfigError(f"context of shape {given}: expected {expected}, as the dynamics have it")
    if isinstance(context, Contexts):
        return dynamics.embed(context.values)[context.rows]
    return None if context is None else dynamics.embed(context).contiguous()


def check_state(dynamics: Dynamics, z0: Tensor, probes: Probes | None) -> None:
    """Raises `ConfigError` where the state or the probes do not fit the dynamics; kernels read memory unasked."""
    if tuple(z0.shape[1:]) != dynamics.event_shape or not z0.ndim:
        expected = f"(batch, {', '.join(map(str, dynamics.event_shape))})"
        raise ConfigError(f"state of shape {tuple(z0.shape)}: expected {expected}, as the dynamics have it")
    if probes is None:
        return
    eps = probes.eps
    if eps.shape[1:] != z0.shape or eps.dtype != z0.dtype or eps.device != z0.device:
        expected = f"(k, {', '.join(map(str, z0.shape))}) of {z0.dtype} on {z0.device}, as the state is"
        raise ConfigError(f"probes {tuple(eps.shape)} of {eps.dtype} on {eps.device}: expected {expected}")


def check_potential(dynamics: Dynamics) -> None:
    """Raises `ConfigError` where dynamics have no potential, whose Hamilton-Jacobi equation they could violate."""
    if not isinstance(dynamics, GradientDynamics):
        raise ConfigError(
            f"penalties.hjb needs dynamics that are the gradient of a potential, not {type(dynamics).__name__}: "
            "set network.kind = 'potential', give PotentialDynamics(module) as dynamics, or set penalties.hjb = 0"
        )


def unstable(name: str, step: int, steps: int, t: float, h: float, bad: int, batch: int) -> SolverError:
    """The error of a fixed-step solve whose `step`-th of `steps` steps, from `t` by `h`, left non-finite values."""
    return SolverError(
        f"the state is not finite after step {step} of {steps} ({name}, t = {t:.4g} to {t + h:.4g}) in {bad} of "
        f"{batch} samples; try a smaller step_size or learning rate, or stronger kinetic and jacobian penalties",
        status="Unstable",
    )


def not_finite_at_start(t: float, bad: int, batch: int) -> SolverError:
    """The error of a solve that cannot take its first step."""
    message = f"the dynamics are not finite at t = {t:g} for {bad} of {batch} samples"
    return SolverError(f"{message}; look for non-finite parameters or data", status="Unstable")


def stuck(status: str, why: str, t: float, bad: int, batch: int, *, remedy: str | None = None) -> SolverError:
    """The error of a solve that gave up; an adaptive one's, where no other remedy is named."""
    remedy = remedy or "loosen rtol/atol, raise maxiters, regularise more strongly, or use a fixed step"
    return SolverError(
        f"{why}: {bad} of {batch} samples stopped before the end time (first at t = {t:.4g}); {remedy}", status=status
    )


STUCK = {
    "DtLessThanMin": "the step size underflowed, the dynamics are too stiff",
    "MaxIters": "maxiters = {maxiters} steps did not suffice",
    "Unstable": "the solution grew beyond all bounds",
    "DtNaN": "the dynamics became NaN",
    "ConvergenceFailure": "the equations of an implicit step could not be solved",
}
"""Why a solve gives up, by SciML's return code."""


class Engine(ABC):
    """Integrates one block at a time. Everything else is written once, above it."""

    name: str

    @abstractmethod
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
        """Integrates the augmented system; differentiable in `z0`, `context` and the parameters of `dynamics`.

        Args:
            dynamics: ``f(z, t; θ)``, or ``f(z, t, c; θ)``.
            z0: State at the start, ``(batch, *event)``; an empty batch comes back as it is.
            probes: Probes of the divergence; `None` solves for the state alone.
            t_span: Start and end time; the end may come first (decoding).
            solver: Method, step or tolerances, sensitivity algorithm.
            context: ``(batch, m)``, or `Contexts` that samples share; for conditional dynamics.
            total_derivative: Also integrate ``D`` (eq. 7).
            hjb: Also integrate ``H``; of potentials alone.

        Raises:
            ConfigError: State, probes or context do not fit the dynamics, or they have no potential for `hjb`.
            EngineUnavailableError: The engine lacks the solver or the sensitivity algorithm.
            SolverError: The solve did not reach its end time, or is not finite; see `Solution.verify`.
        """

    @abstractmethod
    def check(self, solver: SolverConfig) -> None:
        """Raises `EngineUnavailableError` or `ConfigError` where the engine cannot do what `solver` asks."""

    @abstractmethod
    def solvers(self) -> list[SolverInfo]:
        """The solvers that it has."""

    @abstractmethod
    def sensitivities(self) -> dict[str, str]:
        """The sensitivity algorithms that it has: name, and what it does in a line."""
