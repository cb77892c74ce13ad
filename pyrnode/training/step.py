"""One step of training: which samples it takes, the loss of a batch, its gradient, and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from pyrnode.composition import Composition, Passage
from pyrnode.config import Config, Divergence, PenaltyConfig, SolverConfig
from pyrnode.data import Batch, Samples
from pyrnode.objective import Objective, objective
from pyrnode.optimisation import TrainingConfig
from pyrnode.seeds import generator
from pyrnode.training.state import NotFiniteError


@dataclass(frozen=True)
class Order:
    """Which samples each step takes: an order of its own for every epoch, which the seed and the epoch determine.

    Attributes:
        samples: Number of training samples.
        batch_size: Samples per step; what does not fill a batch is left out of the epoch.
        seed: Seed.
    """

    samples: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch."""
        return max(1, self.samples // self.batch_size)

    def batches(self, samples: Samples, first: int = 0, *, workers: int = 0) -> Iterator[Batch]:
        """The batches from the step `first` on, without an end."""
        for rows in self.epochs(first):
            yield from samples.batches(rows, self.batch_size, workers=workers)

    def epochs(self, first: int) -> Iterator[Tensor]:
        """The indices of the samples from the step `first` on: of the rest of its epoch, and of every later one."""
        start = first % self.steps_per_epoch
        for epoch in range(first // self.steps_per_epoch, 2**62):
            rows = _shuffled(self.samples, self.seed, epoch)[: self.steps_per_epoch * self.batch_size]
            yield rows[start * self.batch_size :]
            start = 0


@lru_cache(maxsize=2)
def _shuffled(samples: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(samples, generator=generator(seed, "order", epoch), device="cpu")


def learning_rate(training: TrainingConfig, step: int, done: float) -> float:
    """Linear warm-up, then constant or a half cosine to zero.

    Args:
        training: Settings.
        step: Steps done.
        done: Share of the run that is done after the warm-up, in [0, 1].
    """
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    if training.schedule == "constant":
        return training.learning_rate
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def estimator(flow: Composition, penalties: PenaltyConfig) -> Divergence:
    """The divergence that a flow is trained with."""
    return penalties.estimator(flow.dim, closed_trace=flow.closed_trace)


def loss(flow: Composition, batch: Batch, config: Config, solver: SolverConfig, step: int) -> tuple[Objective, Passage]:
    """The objective of a batch, with the noise of that step, and the passage that it comes from.

    Nothing is read of a device: whether solves of fixed steps are finite is left to `Passage.verify`.

    Args:
        flow: The flow.
        batch: Samples, contexts and weights as `Composition.admit` gives them.
        config: Settings.
        solver: The training solver.
        step: Steps done; the noise is drawn where the flow is.
    """
    penalties, x = config.penalties, batch.x
    random = generator(config.seed, "step", step, device=x.device)
    if config.data.flip and len(flow.event_shape) == 3:
        flipped = torch.rand(len(x), generator=random, dtype=torch.float32, device=x.device) < 0.5
        x = torch.where(flipped[:, None, None, None], x.flip(-1), x)
    passage = flow.solve(
        x,
        flow.draw(estimator(flow, penalties), random, noise=penalties.noise),
        solver,
        context=batch.context,
        generator=random,
        total_derivative=penalties.total_derivative > 0,
        verified=False,
        hjb=penalties.hjb > 0,
        precision=solver.precision,
    )
    return objective(passage, penalties, batch.weight), passage


def differentiate(value: Tensor, module: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """Puts the gradient of a loss in place of the last one; returns its norm, ``()``, which nobody has read yet."""
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    norms = torch._foreach_norm(_gradients(module))
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else value.detach().new_zeros(())


def clip(module: nn.Module, norm: Tensor, most: float) -> None:
    """Scales the gradient, of that norm, to a norm of at most `most`."""
    if gradients := _gradients(module):
        torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))


def check_gradient(module: nn.Module, norm: float) -> None:
    """Raises `NotFiniteError` where the gradient's norm is not finite; the message names the parameter."""
    if math.isfinite(norm):
        return
    blocks = enumerate(module.blocks) if isinstance(module, Composition) else ()
    for part, owner in [*((f"block {index}: ", block) for index, block in blocks), ("", module)]:
        for name, p in owner.named_parameters():
            if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
                raise NotFiniteError(f"{part}the gradient of {name} is not finite")
    raise NotFiniteError("the gradient's norm is not finite")


def _gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]
