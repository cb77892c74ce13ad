"""What training changes: weights, their average and the best of them, the optimiser's memory, and the counters.

All of it is data: captured as tensors by name with the counters, restored from that, and what a checkpoint holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrnode import files
from pyrnode.devices import awaited
from pyrnode.errors import CheckpointError, ConfigError
from pyrnode.flow import Flow
from pyrnode.optimisation import TrainingConfig
from pyrnode.training import soap
from pyrnode.training.origin import Origin

_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "soap": soap.SOAP,
}


def _memory(optimizer: str, parameter: Tensor) -> dict[str, Tensor]:
    """What an optimiser keeps of a parameter, beside the number of its steps; the values do not matter."""
    if optimizer == "soap":
        return soap.memory(parameter)
    return {} if optimizer == "sgd" else {"exp_avg": parameter, "exp_avg_sq": parameter}


Weights = dict[str, Tensor]
"""Parameters and buffers of a flow, by name."""


class NotFiniteError(Exception):
    """The loss, the gradient or the weights are not finite, or an integral is impossible; the message says which."""


@dataclass
class Progress:
    """The counters of a run; all of them are in its checkpoints."""

    step: int = 0  # optimiser steps done
    restarts: int = 0
    refinement: int = 0  # how often the solver's step was halved
    calm: int = 0  # how often in a row twice that step was right with a margin
    best: float = math.inf  # lowest validation value, nats per dimension
    best_step: int = 0
    stale: int = 0  # validations since then
    seconds: float = 0.0  # spent in optimiser steps, without validations and the final save
    elapsed: float = 0.0  # spent in all
    work: float = 0.0  # evaluations of the dynamics in optimiser steps, summed over the samples
    checked: float = 0.0  # the same in validations
    checking: float = 0.0  # the same in the last one

    def check(self) -> None:
        """Raises `CheckpointError` where a counter, read from a file, is none."""
        for name in ("step", "restarts", "refinement", "calm", "best_step", "stale"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < 2**62:
                raise CheckpointError(f"{name} = {value!r}: expected a count")
        if self.refinement > 1000:
            raise CheckpointError(f"refinement = {self.refinement}: no solver's step is halved so often")
        for name in ("best", "seconds", "elapsed", "work", "checked", "checking"):
            value = getattr(self, name)
            if type(value) not in (int, float) or math.isnan(value):
                raise CheckpointError(f"{name} = {value!r}: expected a number")


@dataclass(frozen=True)
class Snapshot:
    """A copy of a state: everything that training needs to go on, by name, and the counters."""

    tensors: dict[str, Tensor]
    progress: Progress

    def check(self) -> None:
        """Raises `NotFiniteError` where a tensor is not finite."""
        sums = {name: value.sum(dtype=torch.float64) for name, value in self.tensors.items()}
        like = next(iter(sums.values()), torch.zeros((), dtype=torch.float64, device="cpu"))
        read = torch.stack([like, *(value.to(like.device) for value in sums.values())]).tolist()
        for (name, value), total in zip(self.tensors.items(), read[1:], strict=True):
            if not math.isfinite(total) and not bool(torch.isfinite(value).all()):
                raise NotFiniteError(f"{name} is not finite")

    def write(self, path: Path, origin: Origin) -> None:
        """Writes a checkpoint of the run with that origin."""
        files.write(path, "checkpoint", self.tensors, {"progress": vars(self.progress), **vars(origin)})

    @classmethod
    def read(cls, path: Path) -> tuple[Snapshot, Origin]:
        """Reads what `write` wrote: the state, on the CPU, and the origin of its run.

        Raises:
            CheckpointError: The file is damaged, or no checkpoint.
        """
        tensors, description = files.read(path, "checkpoint")
        with files.converted(f"{path} is not a checkpoint of this version"):
            progress = Progress(**description.pop("progress"))
            progress.check()
            origin = Origin(**description)
        return cls(tensors, progress), origin


def weights(flow: Flow) -> Weights:
    """A copy of a flow's weights."""
    return {name: value.detach().clone() for name, value in flow.state_dict().items()}


class State:
    """The state of a run.

    Args:
        flow: The flow that is trained.
        training: The optimiser's settings, and whether weights are averaged.

    Attributes:
        optimizer: The optimiser.
        average: Averaged weights, where they are asked for.
        best: The weights that were best on validation.
        progress: The counters.

    Raises:
        ConfigError: There is nothing to train.
    """

    def __init__(self, flow: Flow, training: TrainingConfig) -> None:
        self.flow, self._training = flow, training
        self.optimizer = self._new_optimizer()
        self._before: Weights = {}
        self.average: Weights | None = weights(flow) if training.ema is not None else None
        self.best: Weights = weights(flow)
        self.progress = Progress()

    def _new_optimizer(self) -> torch.optim.Optimizer:
        if not any(p.requires_grad for p in self.flow.parameters()):
            raise ConfigError("the dynamics have no trainable parameters: there is nothing to train")
        settings: dict[str, Any] = {"lr": self._training.learning_rate, "weight_decay": self._training.weight_decay}
        if self._training.optimizer != "soap":
            settings["foreach"] = awaited(self.flow.reference)  # one launch for all; on a CPU that is no gain
        return _OPTIMIZERS[self._training.optimizer](self.flow.parameters(), **settings)

    # -- a step ------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Notes what a forward pass changes by itself: an embedding's buffers, such as running means of its batches.

        What is captured before `take` has them as they were: a resumed run takes the step, and so the pass, again.
        """
        self._before = {
            name: value.clone() for name, value in self.flow.named_buffers() if name.startswith("embedding.")
        }

    def take(self) -> None:
        """The optimiser's step."""
        self.optimizer.step()
        self._before = {}

    # -- weights -----------------------------------------------------------------------------------------------------

    def add_to_average(self, step: int) -> None:
        """Adds the present weights to the averaged ones, whose decay grows with the steps done so far."""
        if self.average is None or self._training.ema is None:
            return
        decay = min(self._training.ema, (1 + step) / (10 + step))
        present = self.flow.state_dict()
        floats = [name for name, value in present.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.average[name] for name in floats], [present[name] for name in floats], 1 - decay)
        for name in present.keys() - floats:
            self.average[name].copy_(present[name])

    def validated(self) -> Weights:
        """A copy of the weights that are validated: the averaged ones, where there are any."""
        return weights(self.flow) if self.average is None else {k: v.clone() for k, v in self.average.items()}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones, where there are any."""
        if self.average is None:
            yield
            return
        trained = weights(self.flow)
        self.flow.load_state_dict(self.average)
        try:
            yield
        finally:
            self.flow.load_state_dict(trained)

    def chosen(self) -> Weights:
        """The weights that were best on validation, or the present ones before the first validation."""
        return self.best if math.isfinite(self.progress.best) else self.validated()

    # -- copies ------------------------------------------------------------------------------------------------------

    def capture(self) -> Snapshot:
        """A copy of it all."""
        present = self.flow.state_dict()
        tensors = {f"flow.{k}": self._before.get(k, v) for k, v in present.items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        tensors |= {f"average.{k}": v for k, v in (self.average or {}).items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in slots.items() if isinstance(v, Tensor)}
        return Snapshot({k: v.detach().clone() for k, v in tensors.items()}, replace(self.progress))

    def restore(self, snapshot: Snapshot) -> None:
        """Becomes what was captured.

        Raises:
            CheckpointError: It was captured of another flow, or another optimiser.
        """
        groups: dict[str, Weights] = {"flow": {}, "best": {}, "average": {}, "optimizer": {}}
        for name, value in snapshot.tensors.items():
            group, _, key = name.partition(".")
            if group not in groups:
                raise CheckpointError(f"there is no place for {name!r}")
            counts = group == "optimizer" and key.endswith(".step")  # which the optimiser reads at each step
            groups[group][key] = value.to("cpu" if counts else self.flow.reference.device, copy=True)
        averages = [] if self.average is None else ["average"]
        for group in ("flow", "best", *averages):
            files.check_tensors(groups[group], self.flow.state_dict())
        slots = self._slots(groups["optimizer"], snapshot.progress.step)
        self._before = {}
        self.flow.load_state_dict(groups["flow"])
        self.best = groups["best"]
        self.average = groups["average"] if self.average is not None else None
        self.optimizer = self._new_optimizer()
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        self.progress = replace(snapshot.progress)

    def _slots(self, stored: Weights, done: int) -> dict[int, Weights]:
        """The optimiser's memory by parameter: of each parameter everything that this optimiser keeps, or nothing.

        Args:
            stored: The memory by number of the parameter and name.
            done: Steps of the run.
        """
        slots: dict[int, Weights] = {}
        for name, value in stored.items():
            index, _, key = name.partition(".")
            slots.setdefault(int(index), {})[key] = value
        parameters = list(self.flow.parameters())
        for number, found in slots.items():
            if not 0 <= number < len(parameters):
                raise CheckpointError(f"the optimiser's memory is of a parameter {number}, of {len(parameters)}")
            alike = _memory(self._training.optimizer, parameters[number])
            steps = {name: value for name, value in found.items() if name == "step"}
            files.check_tensors(steps, {"step": torch.zeros((), dtype=torch.float32, device="cpu")}, types=False)
            files.check_tensors({name: value for name, value in found.items() if name != "step"}, alike)
            for name, value in found.items():
                if not _possible(name, value, done):
                    raise CheckpointError(f"optimizer.{number}.{name} is nothing that an optimiser could have kept")
        return slots


def _possible(name: str, value: Tensor, done: int) -> bool:
    """Whether an optimiser's memory may have that value after so many steps of a run."""
    if name == "step":
        return 1 <= float(value) <= done and float(value).is_integer()
    if name == "exp_avg_sq":
        return bool((value >= 0).all())
    return not name.endswith("_basis") or soap.orthonormal(value)
