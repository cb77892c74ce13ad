"""One step of training: which samples it takes, the loss of a batch, its gradient, and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from pyrnode.composition import Composition, Passage
from pyrnode.config import Config, Divergence, PenaltyConfig, SolverConfig, TrainingConfig
from pyrnode.data import Batch, Samples
from pyrnode.objective import Objective, objective
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
        start = first % self.steps_per_epoch
        for epoch in range(first // self.steps_per_epoch, 2**62):
            rows = _shuffled(self.samples, self.seed, epoch)[: self.steps_per_epoch * self.batch_size]
            yield from samples.batches(rows[start * self.batch_size :], self.batch_size, workers=workers)
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
    """The objective of a batch, with the noise of that step, and the passage that it comes from."""
    penalties, random = config.penalties, generator(config.seed, "step", step)
    x, context = flow.admit(batch.x, batch.context)
    if config.data.flip and len(flow.event_shape) == 3:
        flipped = torch.rand(len(x), generator=random, dtype=torch.float32, device="cpu") < 0.5
        x = torch.where(flipped.to(x.device)[:, None, None, None], x.flip(-1), x)
    passage = flow.solve(
        x,
        flow.draw(estimator(flow, penalties), random, noise=penalties.noise),
        solver,
        context=context,
        generator=random,
        total_derivative=penalties.total_derivative > 0,
        hjb=penalties.hjb > 0,
    )
    weight = None if batch.weight is None else batch.weight.to(passage.y)
    return objective(passage, penalties, weight), passage


def differentiate(
    value: Tensor, module: nn.Module, optimizer: torch.optim.Optimizer, *, clip_norm: float | None = None
) -> float:
    """Puts the gradient of a loss in place of the last one; returns its norm, which is then bounded by `clip_norm`.

    Raises:
        NotFiniteError: The gradient is not finite; the message names the parameter.
    """
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    limit = math.inf if clip_norm is None else clip_norm
    try:
        return float(nn.utils.clip_grad_norm_(module.parameters(), limit, error_if_nonfinite=True))
    except RuntimeError:
        blocks = enumerate(module.blocks) if isinstance(module, Composition) else ()
        for part, owner in [*((f"block {index}: ", block) for index, block in blocks), ("", module)]:
            for name, p in owner.named_parameters():
                if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
                    raise NotFiniteError(f"{part}the gradient of {name} is not finite") from None
        raise NotFiniteError("the gradient's norm is not finite") from None
