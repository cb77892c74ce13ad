"""The gradient of a step's loss, over all processes of a run: one way for one process, one for several.

Several take one sum a step, of one vector: the gradient of every parameter, the numbers of the step, whether a step has
failed anywhere, and whether anyone was told to stop. Each process adds its samples' share of the batch's mean. What
comes back is the same in all of them, to the bit, and so is what each makes of it.
"""

from __future__ import annotations

import math
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrnode.composition import Passage
from pyrnode.data import Batch
from pyrnode.distributed import World
from pyrnode.errors import SolverError
from pyrnode.flow import Flow
from pyrnode.objective import Objective
from pyrnode.training.callbacks import ASKED
from pyrnode.training.state import NotFiniteError
from pyrnode.training.step import check_gradient, differentiate, gradient_norm

Compute = Callable[[], tuple[Objective, Passage]]
"""The loss of the batch that is here, and the passage that it comes from."""

_SHORT = 5.0
"""Seconds: after a step of less, others that do not answer within `PROMPT` are lost."""


@dataclass(frozen=True)
class Taken:
    """What a step found; the gradient is with the parameters.

    Attributes:
        loss, nll, E, n, H: Means over the batch, as in `Objective`.
        nfe, nfe_backward: Evaluations of the dynamics per sample.
        norm: The gradient's norm, ``()``, on the flow's device.
        length: The same, read.
        stop: Number of the signal that says to stop, 0 without one.
    """

    loss: float
    nll: float
    E: float
    n: float
    H: float
    nfe: float
    nfe_backward: float
    norm: Tensor
    length: float
    stop: int


class Gradient(ABC):
    """Takes gradients of a flow's loss."""

    @abstractmethod
    def take(
        self, flow: Flow, batch: Batch, compute: Compute, optimizer: torch.optim.Optimizer, stop: Callable[[], int]
    ) -> Taken:
        """Puts the gradient of the whole batch's loss in place of the last one.

        Args:
            flow: The flow.
            batch: The samples that are here.
            compute: Their loss.
            optimizer: The optimiser.
            stop: The signal that this process was told to stop by; asked as late as can be.

        Raises:
            SolverError: A solve failed.
            NotFiniteError: The loss or the gradient is not finite, or an integral of squares is negative.
        """

    @abstractmethod
    def spent(self, seconds: float, elapsed: float) -> tuple[float, float]:
        """What a run takes for the time of its last step, in the step itself and in all; the same in all processes."""


def gradient(world: World) -> Gradient:
    """The way of so many processes."""
    return _Alone() if world.size == 1 else _Together(world)


class _Alone(Gradient):
    """One process: the device is waited for once, to read everything."""

    def take(
        self, flow: Flow, batch: Batch, compute: Compute, optimizer: torch.optim.Optimizer, stop: Callable[[], int]
    ) -> Taken:
        result, passage = compute()
        norm = differentiate(result.loss, flow, optimizer)
        parts = (result.loss.detach(), result.nll, result.E, result.n, result.H, norm)
        value, nll, E, n, H, length = torch.stack(parts).tolist()  # the one place where a step waits for its device
        if not all(map(math.isfinite, (value, nll, E, n))):
            passage.verify()
        if not math.isfinite(value):
            raise NotFiniteError(_unexplained(nll, E, n))
        _check_signs(E=E, n=n, H=H)
        check_gradient(flow, length)
        return Taken(value, nll, E, n, H, passage.nfe, passage.nfe_backward, norm, length, stop())

    def spent(self, seconds: float, elapsed: float) -> tuple[float, float]:
        return seconds, elapsed


_NUMBERS = 13
"""Entries of the vector beside the gradient: seven sums over samples, failure, three reasons to stop, two times."""


class _Together(Gradient):
    """Several processes."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._mine = self._told = (0.0, 0.0)

    def take(
        self, flow: Flow, batch: Batch, compute: Compute, optimizer: torch.optim.Optimizer, stop: Callable[[], int]
    ) -> Taken:
        optimizer.zero_grad(set_to_none=True)
        passage, failure = None, None
        values = flow.reference.new_zeros(7)
        try:
            result, passage = compute()
            (result.loss * (len(batch) / batch.total)).backward()
            parts = (result.loss.detach(), result.nll, result.E, result.n, result.H)
            spent = values.new_tensor([passage.nfe, passage.nfe_backward])
            values = len(batch) * torch.cat([torch.stack(parts).to(values), spent])  # counts stay whole numbers
        except (SolverError, NotFiniteError) as error:
            failure = error
        flat = self._summed(flow, values, failed=failure is not None, stop=stop())
        norm = gradient_norm(flow)
        numbers = torch.cat([flat, norm.to(flat)[None]]).tolist()
        *sums, failed, asked, interrupt, terminate, seconds, elapsed, length = numbers
        self._told = seconds, elapsed
        value, nll, E, n, H, nfe, nfe_backward = (total / batch.total for total in sums)
        if failed or not all(map(math.isfinite, (value, nll, E, n))):
            self._explain(failure, passage, value, _unexplained(nll, E, n))
        _check_signs(E=E, n=n, H=H)
        check_gradient(flow, length)
        told = signal.SIGTERM if terminate else signal.SIGINT if interrupt else ASKED if asked else 0
        return Taken(value, nll, E, n, H, nfe, nfe_backward, norm, length, int(told))

    def _summed(self, flow: Flow, values: Tensor, *, failed: bool, stop: int) -> Tensor:
        """Sums over the processes: every gradient, in its place, and the numbers of the step, which are returned."""
        with torch.no_grad():
            parameters = [p for p in flow.parameters() if p.requires_grad]
            parts = [p.new_zeros(p.shape) if failed or p.grad is None else p.grad for p in parameters]
            times = self._mine if self._world.first else (0.0, 0.0)
            reasons = (stop == reason for reason in (ASKED, signal.SIGINT, signal.SIGTERM))
            more = values.new_tensor([failed, *reasons, *times])
            flat = torch.cat([*(part.reshape(-1).to(values) for part in parts), values, more])
            flat = self._world.sum(flat, patient=not 0 < self._told[1] < _SHORT)
            parts = flat.split([*(p.numel() for p in parameters), _NUMBERS])
            for p, total in zip(parameters, parts, strict=False):
                if p.grad is not None:  # what takes no part in the loss has none, and its optimiser lets it be
                    p.grad = total.view_as(p).to(p.dtype)
            numbers: Tensor = parts[-1]
        return numbers

    def _explain(self, failure: Exception | None, passage: Passage | None, value: float, otherwise: str) -> None:
        """Raises, in all processes, what went wrong in the first of them in which something did; if something did."""

        def cause() -> str:
            try:
                if passage is not None:
                    passage.verify()
            except SolverError as error:
                return str(error)
            return "" if failure is None else str(failure)

        causes = self._world.gathered(cause)
        for number, text in enumerate(causes):
            if text:
                raise NotFiniteError(f"process {number}: {text}")
        if not math.isfinite(value):
            raise NotFiniteError(otherwise)

    def spent(self, seconds: float, elapsed: float) -> tuple[float, float]:
        """Those of the first process that the last sum brought: of the step before."""
        self._mine = seconds, elapsed
        return self._told


_ROUNDING = 1e-3
"""How far below zero, per dimension, an integral of squares may be: what negative weights leave where there is hardly
any motion yet is harmless, and weighs less than the solver's tolerance."""


def _check_signs(**integrals: float) -> None:
    """Raises where a mean of what is never negative is: a solver with negative weights, such as DP5, steps too far.

    Its minimum would have no bound: a rate at the stages that count negatively, which no finer solve sees.
    """
    for name, value in integrals.items():
        if value < -_ROUNDING:
            raise NotFiniteError(f"{name} = {value:g} is negative: the training solver's steps are too long for it")


def _unexplained(nll: float, E: float, n: float) -> str:
    return f"the loss is not finite (nll {nll:g}, E {E:g}, n {n:g}), though the state after every block is"
