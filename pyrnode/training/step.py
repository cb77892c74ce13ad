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
from pyrnode.distributed import World
from pyrnode.embedding import drawing
from pyrnode.errors import ConfigError
from pyrnode.objective import Objective, objective
from pyrnode.optimisation import TrainingConfig
from pyrnode.seeds import Share, derive, drawn, generator
from pyrnode.training.state import NotFiniteError


@dataclass(frozen=True)
class Order:
    """Which samples each step takes: an order of its own for every epoch, which the seed and the epoch determine.

    Attributes:
        samples: Number of training samples.
        batch_size: Samples per step; what does not fill a batch is left out of the epoch.
        seed: Seed.
        share: Which of the samples of a step are this process's; `None` for all.
    """

    samples: int
    batch_size: int
    seed: int
    share: Share | None = None

    @classmethod
    def of(cls, samples: int, batch_size: int, seed: int, world: World) -> Order:
        """The order of a process's samples.

        Raises:
            ConfigError: There are more processes than samples in a batch.
        """
        total = min(samples, batch_size)
        if world.size > total:
            raise ConfigError(
                f"batch_size = {batch_size}, of {samples} training samples, for {world.size} processes: expected at "
                "least one sample for each; raise batch_size, or start fewer"
            )
        return cls(samples, batch_size, seed, world.share(total))

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch."""
        return max(1, self.samples // self.batch_size)

    def batches(self, samples: Samples, first: int = 0, *, workers: int = 0) -> Iterator[Batch]:
        """The batches from the step `first` on, without an end."""
        for rows in self.epochs(first):
            # loader processes are told of all at once; of samples in memory, each batch's indices are made as they come
            for part in [rows] if workers else rows.split(self.here):
                yield from samples.batches(part.long(), self.here, workers=workers)

    @property
    def here(self) -> int:
        """Samples of a step that are this process's."""
        return self.batch_size if self.share is None else self.share.count

    @property
    def total(self) -> int:
        """Samples of a step, in all processes together."""
        return min(self.samples, self.batch_size)

    def epochs(self, first: int) -> Iterator[Tensor]:
        """This process's samples from the step `first` on, by index: of the rest of its epoch, and of later ones.

        They are int32 where that is enough: beside a large file that is mapped, indices are all that is in memory.
        """
        start = first % self.steps_per_epoch
        for epoch in range(first // self.steps_per_epoch, 2**62):
            yield _shuffled(self, epoch)[start * self.here :]
            start = 0


@lru_cache(maxsize=1)
def _shuffled(order: Order, epoch: int) -> Tensor:
    """What is a process's of an epoch's order, which is that of all samples."""
    short = torch.int32 if order.samples < 2**31 else torch.int64
    rows = torch.randperm(
        order.samples, generator=generator(order.seed, "order", epoch), dtype=short, device="cpu"
    )  # the same numbers in either type
    rows = rows[: order.steps_per_epoch * order.batch_size]
    if order.share is None:
        return rows
    return rows.view(-1, order.share.total)[:, order.share.rows].reshape(-1)


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
    random = batch.noise(generator(config.seed, "step", step, device=x.device))
    if config.data.flip and len(flow.event_shape) == 3:

        def uniform(shape: tuple[int, ...], source: torch.Generator | None) -> Tensor:
            return torch.rand(shape, generator=source, dtype=torch.float32, device=x.device)

        flipped = drawn(uniform, (len(x),), random) < 0.5
        x = torch.where(flipped[:, None, None, None], x.flip(-1), x)
    first = 0 if batch.share is None else batch.share.first
    with drawing(flow.embedding, x.device, derive(config.seed, "embedding", step, first)):
        passage = flow.solve(
            x,
            flow.draw(estimator(flow, penalties), random, noise=penalties.noise),
            solver,
            context=batch.context,
            generator=random,
            total_derivative=penalties.total_derivative > 0,
            verified=False,
            hjb=penalties.hjb > 0,
            precision=solver.numbers,
        )
    return objective(passage, penalties, batch.weight), passage


def differentiate(value: Tensor, module: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """Puts the gradient of a loss in place of the last one; returns its norm, ``()``, which nobody has read yet."""
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    return gradient_norm(module)


def gradient_norm(module: nn.Module) -> Tensor:
    """The norm of the gradient that a module's parameters have, ``()``."""
    if not (gradients := _gradients(module)):
        return next(module.parameters()).detach().new_zeros(())
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm


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
