"""The standard construction of a regularised neural ODE, which the speed benchmark measures pyrnode against.

It is built the way FFJORD and ffjord-rnode build theirs: the dynamics are a plain torch module; the divergence and the
Jacobian penalty come from ``torch.autograd.grad(..., create_graph=True)`` inside the right-hand side; the augmented
state ``(z, l, E, n)`` goes as a tuple through ``torchdiffeq.odeint_adjoint``, which solves the adjoint backwards in
time. It shares no code with pyrnode, so it is also an oracle. The mathematics is that of docs/design.md §2: one
Gaussian probe per block and sample, held fixed; the loss is eq. 17 of Finlay et al. (2020) in nats per dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint

Gradients = Literal["adjoint", "backprop"]
Noise = Sequence[Tensor] | torch.Generator | None


class Augmented(NamedTuple):
    """The state at the end: latents ``z`` (batch, d), and ``l``, ``E``, ``n`` (batch,), summed over the blocks."""

    z: Tensor
    l: Tensor
    E: Tensor
    n: Tensor


class ConcatMLP(nn.Module):
    """Fully connected ``f(t, z)``; the time is the first input of each layer."""

    def __init__(self, dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        widths = [dim, *hidden, dim]
        self.layers = nn.ModuleList(nn.Linear(1 + a, b) for a, b in pairwise(widths))
        _zero_last_layer(self.layers)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            z = layer(torch.cat([t.expand(z.shape[0], 1), z], dim=1))
            if i < len(self.layers) - 1:
                z = F.softplus(z)
        return z


class ConcatConvNet(nn.Module):
    """Convolutional ``f(t, z)``, 3×3 with padding 1; the time is the first input channel of each layer."""

    def __init__(self, channels: int, hidden: Sequence[int]) -> None:
        super().__init__()
        widths = [channels, *hidden, channels]
        self.layers = nn.ModuleList(nn.Conv2d(1 + a, b, kernel_size=3, padding=1) for a, b in pairwise(widths))
        _zero_last_layer(self.layers)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            z = layer(torch.cat([t.expand(z.shape[0], 1, *z.shape[2:]), z], dim=1))
            if i < len(self.layers) - 1:
                z = F.softplus(z)
        return z


def _zero_last_layer(layers: nn.ModuleList) -> None:
    for parameter in layers[-1].parameters():
        nn.init.zeros_(parameter)


class AugmentedODE(nn.Module):
    """The right-hand side of ``(z, l, E, n)``, for a probe ``eps`` that is set before each solve."""

    eps: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = state[0]
        differentiate = torch.is_grad_enabled()  # off in the forward solve of the adjoint method
        with torch.enable_grad():
            if not (differentiate and z.requires_grad):
                z = z.detach().requires_grad_(True)
            f = self.network(t, z)
            (eps_J,) = torch.autograd.grad(f, z, self.eps, create_graph=differentiate)
        with torch.set_grad_enabled(differentiate):
            return f, _sum(eps_J * self.eps), _sum(f * f), _sum(eps_J * eps_J)


def _sum(x: Tensor) -> Tensor:
    return x.flatten(1).sum(dim=1)


class ReferenceBlock(nn.Module):
    """One ODE block, solved over [0, end_time] with torchdiffeq.

    Args:
        network: The dynamics, called as ``network(t, z)``.
        gradients: ``"adjoint"`` (FFJORD's: backsolve) or ``"backprop"`` (through the solver's operations).
        step_size: Step of torchdiffeq's ``"rk4"``.
        end_time: ``T``.
    """

    def __init__(self, network: nn.Module, *, gradients: Gradients, step_size: float, end_time: float) -> None:
        super().__init__()
        if gradients not in ("adjoint", "backprop"):
            raise ValueError(f"gradients = {gradients!r}: expected 'adjoint' or 'backprop'")
        self.ode = AugmentedODE(network)
        self.solve = odeint_adjoint if gradients == "adjoint" else odeint
        self.step_size = step_size
        self.end_time = end_time

    @property
    def network(self) -> nn.Module:
        return self.ode.network

    def forward(self, z: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self.ode.eps = eps
        zero = z.new_zeros(z.shape[0])
        times = torch.tensor([0.0, self.end_time], dtype=z.dtype, device=z.device)
        options = {"step_size": self.step_size}
        solution = self.solve(self.ode, (z, zero, zero, zero), times, method="rk4", options=options)
        end_z, l, E, n = (state[-1] for state in solution)
        return end_z, l, E, n


class _ReferenceFlow(nn.Module):
    """What both flows share: probes, composition, loss.

    Attributes:
        blocks: The ODE blocks in order. Layer ``j`` of block ``i`` is ``blocks[i].network.layers[j]``; its ``weight``
            has the time's part first: ``weight[:, :1]`` is pyrnode's ``time_weight``, ``weight[:, 1:]`` its ``weight``.
        block_shapes: Event shape of each block's state, which is also that of its probe.
    """

    def __init__(self, networks: Sequence[nn.Module], block_shapes: Sequence[tuple[int, ...]],
                 gradients: Gradients, step_size: float, end_time: float) -> None:  # fmt: skip
        super().__init__()
        self.blocks = nn.ModuleList(
            ReferenceBlock(network, gradients=gradients, step_size=step_size, end_time=end_time) for network in networks
        )
        self.block_shapes = list(block_shapes)

    def probes(self, x: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        """Gaussian probes for a batch ``x``, one tensor (batch, *block_shape) per block."""
        return [
            torch.randn(x.shape[0], *shape, generator=generator, dtype=x.dtype, device=x.device)
            for shape in self.block_shapes
        ]

    def after_block(self, index: int, z: Tensor, latents: list[Tensor]) -> Tensor:
        """Reshapes the state between the blocks; what is factored out goes to ``latents``."""
        return z

    def augmented(self, x: Tensor, eps: Noise = None) -> Augmented:
        """Integrates all blocks.

        Args:
            x: Data (batch, *event), after every other transform.
            eps: The probes, one per block, or the generator to draw them with.
        """
        probes = self.probes(x, eps) if eps is None or isinstance(eps, torch.Generator) else eps
        if len(probes) != len(self.blocks):
            raise ValueError(f"{len(probes)} probes for {len(self.blocks)} blocks")
        l = E = n = x.new_zeros(x.shape[0])
        z, latents = x, list[Tensor]()
        for i, (block, probe) in enumerate(zip(self.blocks, probes, strict=True)):
            z, dl, dE, dn = block(z, probe)
            l, E, n = l + dl, E + dE, n + dn
            z = self.after_block(i, z, latents)
        return Augmented(torch.cat([part.flatten(1) for part in (*latents, z)], dim=1), l, E, n)

    def loss(self, x: Tensor, eps: Noise = None, *, kinetic: float = 0.01, jacobian: float = 0.01) -> Tensor:
        """Mean over the batch of ``(−log p + λ_K E + λ_J n) / d``, in nats per dimension (eq. 17)."""
        z, l, E, n = self.augmented(x, eps)
        d = z.shape[1]
        log_prob = l - 0.5 * (z * z).sum(dim=1) - 0.5 * d * math.log(2 * math.pi)
        return (-log_prob + kinetic * E + jacobian * n).mean() / d


class ReferenceMLPFlow(_ReferenceFlow):
    """Flow on vectors (batch, dim)."""

    def __init__(self, dim: int, hidden: Sequence[int] = (64, 64, 64), *, blocks: int = 1,
                 gradients: Gradients = "adjoint", step_size: float = 0.25, end_time: float = 1.0) -> None:  # fmt: skip
        networks = [ConcatMLP(dim, hidden) for _ in range(blocks)]
        super().__init__(networks, [(dim,)] * blocks, gradients, step_size, end_time)


class ReferenceImageFlow(_ReferenceFlow):
    """FFJORD's multi-scale flow on images (batch, channels, height, width).

    Each scale has ``blocks`` ODE blocks, a squeeze (2×2 space to channels), ``blocks`` more, and factors the second
    half of the channels out; the last scale has ``blocks`` and neither. The defaults are the paper's MNIST network:
    10 blocks, 800,636 parameters.
    """

    def __init__(self, channels: int = 1, height: int = 28, width: int = 28, hidden: Sequence[int] = (64, 64, 64),
                 scales: int = 3, blocks: int = 2, *, gradients: Gradients = "adjoint", step_size: float = 0.25,
                 end_time: float = 1.0) -> None:  # fmt: skip
        if height % 2 ** (scales - 1) or width % 2 ** (scales - 1):
            raise ValueError(f"{height}×{width} cannot be halved {scales - 1} times")
        shapes: list[tuple[int, int, int]] = []
        c, h, w = channels, height, width
        for _ in range(scales - 1):
            shapes += [(c, h, w)] * blocks + [(4 * c, h // 2, w // 2)] * blocks
            c, h, w = 2 * c, h // 2, w // 2
        shapes += [(c, h, w)] * blocks
        super().__init__([ConcatConvNet(s[0], hidden) for s in shapes], shapes, gradients, step_size, end_time)
        self.blocks_per_stage = blocks

    def after_block(self, index: int, z: Tensor, latents: list[Tensor]) -> Tensor:
        stage, position = divmod(index + 1, self.blocks_per_stage)
        if position or index + 1 == len(self.blocks):
            return z
        if stage % 2:
            return F.pixel_unshuffle(z, 2)
        z, factored_out = z.chunk(2, dim=1)
        latents.append(factored_out)
        return z
