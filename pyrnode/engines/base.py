"""The contract of an engine: it integrates the augmented system of one block, and differentiates through it.

With probes ε held fixed for the whole solve (design.md §2):

    z' = f(z, t; θ)        l' = εᵀ (∂f/∂z) ε        E' = ‖f‖²        n' = ‖εᵀ ∂f/∂z‖²

Everything above a block (composition, loss, optimiser, checkpoints) is the same for every engine.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pyrnode.config import SolverConfig
from pyrnode.dynamics.base import Dynamics


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
        stats: Counts and status.
    """

    z: Tensor
    l: Tensor
    E: Tensor
    n: Tensor
    D: Tensor
    stats: Stats = field(default_factory=Stats)


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
        total_derivative: bool = False,
    ) -> Solution:
        """Integrates the augmented system; differentiable in `z0` and in the parameters of `dynamics`.

        Args:
            dynamics: ``f(z, t; θ)``.
            z0: State at the start, ``(batch, *event)``.
            probes: Probes of the divergence; `None` solves for the state alone.
            t_span: Start and end time; the end may come first (decoding).
            solver: Method, step or tolerances, sensitivity algorithm.
            total_derivative: Also integrate ``D`` (eq. 7).

        Raises:
            EngineUnavailableError: The engine lacks the solver or the sensitivity algorithm.
            SolverError: The solve did not reach its end time, or is not finite.
        """

    @abstractmethod
    def check(self, solver: SolverConfig) -> None:
        """Raises `EngineUnavailableError` or `ConfigError` where the engine cannot do what `solver` asks."""
