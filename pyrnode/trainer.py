"""The training loop: steps, validation, checkpoints, and what happens when a step goes wrong."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pyrnode import files
from pyrnode.config import Config, SolverConfig
from pyrnode.data import Splits
from pyrnode.devices import resolve_device
from pyrnode.dynamics import Dynamics, ModuleDynamics
from pyrnode.errors import CheckpointError, ConfigError, DataError, SolverError, TrainingDivergedError
from pyrnode.flow import Flow, base_log_prob
from pyrnode.objective import Objective, objective
from pyrnode.runs import Board, Record, RunFolder, require_tensorboard
from pyrnode.seeds import generator

_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
_FLUSH_SECONDS = 5.0
_PROBE_SAMPLES = 64  # samples on which the training solver is compared with half its step
_MAX_REFINEMENT = 6
_STEP_TOLERANCE = 0.01  # nats per dimension by which the two may differ with step_size="auto"


class _NotFiniteError(Exception):
    """The loss, the gradient or the weights are not finite; the message says which."""


@dataclass
class _Progress:
    """The counters of a run; all of them are in its checkpoints."""

    step: int = 0  # optimiser steps done
    restarts: int = 0
    refinement: int = 0  # how often the solver's step was halved
    best: float = math.inf  # lowest validation value, nats per dimension
    best_step: int = 0
    stale: int = 0  # validations since then
    seconds: float = 0.0  # spent in optimiser steps, without validations and the final save


@dataclass(frozen=True)
class Weights:
    """Weights of the samples, positive; those of training have mean 1.

    Attributes:
        train: ``(n,)``, float64.
        validation: The same for the validation samples.
    """

    train: Tensor
    validation: Tensor

    def checked(self, splits: Splits) -> Weights:
        """The weights, brought to mean 1; raises `DataError` where they do not fit the samples."""
        parts = []
        for name in ("train", "validation"):
            values, count = getattr(self, name).double().cpu(), len(getattr(splits, name))
            if tuple(values.shape) != (count,):
                raise DataError(f"{name} weights of shape {tuple(values.shape)}: expected one for each of {count}")
            if not bool((torch.isfinite(values) & (values > 0)).all()):
                raise DataError(f"{name} weights must be finite and positive: leave out the samples of weight zero")
            parts.append(values / values.mean())
        return Weights(*parts)


class Trainer:
    """The training loop over one flow; `train` is the way to use it.

    Args:
        config: Settings.
        splits: Data.
        folder: Where to write; `None` writes nothing.
        dynamics: The user's own dynamics by event shape.
        progress: Show a progress bar.
        weights: Weights of the samples in the loss, in the validation and in the standardisation; `None` weighs all
            alike.
    """

    def __init__(
        self,
        config: Config,
        splits: Splits,
        folder: RunFolder | None,
        *,
        dynamics: Callable[[tuple[int, ...]], nn.Module] | None = None,
        progress: bool = True,
        weights: Weights | None = None,
    ) -> None:
        self.config, self.splits, self.folder, self.progress = config, splits, folder, progress
        self.weights = None if weights is None else weights.checked(splits)
        self.state = _Progress()
        if config.training.tensorboard:
            if folder is None:
                raise ConfigError("training.tensorboard = true needs out=, the folder to write to")
            require_tensorboard()
        if config.training.snapshots and (folder is None or dynamics is not None):
            need = "out=, the folder to write to" if folder is None else "pyrnode's own dynamics: others are not saved"
            raise ConfigError(f"training.snapshots = true needs {need}")
        self.device = resolve_device(config.device)
        sample = splits.train.tensor() if splits.levels is None and config.flow.standardize else None
        if sample is not None and self.weights is not None:
            sample = _with_moments_of(sample.double(), self.weights.train)
        self.make = None if dynamics is None else _wrapped(dynamics, splits.context_dim)
        contexts = None if splits.contexts is None else splits.contexts.train
        self.flow = self._built(config, sample, contexts).to(self.device)
        self.flow.engine.check(self.solver)
        self.steps_per_epoch = config.training.steps_per_epoch(len(splits.train))
        self.optimizer = self._optimizer()
        self.average = self._copy() if config.training.ema is not None else None
        self.best: dict[str, Tensor] = self._copy()
        self.history: list[Record] = []
        self.pending: list[Record] = []
        self.flushed = 0.0
        self.board: Board | None = None
        self._snapshot = self._capture()
        self._stop = False
        self._present: tuple[int, Tensor] | None = None  # the present epoch and its order

    def _built(self, config: Config, sample: Tensor | None = None, contexts: Tensor | None = None) -> Flow:
        """An untrained flow for the data."""
        splits = self.splits
        return Flow.build(
            config,
            splits.event_shape,
            levels=splits.levels,
            sample=sample,
            context_dim=splits.context_dim,
            context_sample=contexts,
            dynamics=self.make,
        )

    # -- what is fixed by the settings -------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.config.training.total_steps(len(self.splits.train))

    @property
    def solver(self) -> SolverConfig:
        """The training solver at its present refinement (`step_size="auto"` starts at 0.5)."""
        solver, halvings = self.config.solver, self.state.refinement
        step = 0.5 if solver.step_size == "auto" else float(solver.step_size)
        shrink = 0.1**halvings  # an adaptive solver is refined through its tolerances
        return replace(solver, step_size=step * 0.5**halvings, rtol=solver.rtol * shrink, atol=solver.atol * shrink)

    def _optimizer(self) -> torch.optim.Optimizer:
        training = self.config.training
        kind: Any = _OPTIMIZERS[training.optimizer]
        if not any(p.requires_grad for p in self.flow.parameters()):
            raise ConfigError("the dynamics have no trainable parameters: there is nothing to train")
        optimizer: torch.optim.Optimizer = kind(
            self.flow.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
        )
        return optimizer

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then constant or a half cosine to zero at the last step."""
        training = self.config.training
        if step < training.warmup_steps:
            return training.learning_rate * (step + 1) / training.warmup_steps
        if training.schedule == "constant":
            return training.learning_rate
        left = (step - training.warmup_steps) / max(1, self.total_steps - training.warmup_steps)
        return training.learning_rate * 0.5 * (1 + math.cos(math.pi * left))

    # -- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Trains to the end; returns False if Ctrl-C came before it."""
        self._open_board()
        try:
            with self._interruptible(), self._bar() as bar:
                return self._loop(bar)
        finally:
            self._close_board()

    def _loop(self, bar: Any) -> bool:
        validate_every = self.config.training.validate_every or self.steps_per_epoch
        clock = time.perf_counter()
        batches = self._batches()
        while not self.finished:
            try:
                record = self._step(next(batches))
                if record is None:
                    return False
                now = time.perf_counter()
                self.state.seconds, clock = self.state.seconds + now - clock, now
                self._log({**record, "seconds": round(self.state.seconds, 3)})
                bar.update()
                bar.set_postfix(self._postfix(record), refresh=False)
                if self.state.step % validate_every == 0 or self.state.step == self.total_steps:
                    self._validate()
                if self.finished:
                    self._save()
                clock = time.perf_counter()
            except (SolverError, _NotFiniteError) as error:
                self._recover(error)
                batches = self._batches()
                bar.n, clock = self.state.step, time.perf_counter()
        return not self._stop

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or validation has stopped improving."""
        patience = self.config.training.patience
        return self.state.step >= self.total_steps or (patience is not None and self.state.stale >= patience)

    def _batches(self) -> Iterator[Tensor]:
        """Raw batches from the present step on; each epoch in an order of its own."""
        size, workers = self.config.training.batch_size, self.config.data.workers
        first = self.state.step % self.steps_per_epoch
        for epoch in range(self.state.step // self.steps_per_epoch, 2**62):
            order = self._order(epoch)[first * size : self.steps_per_epoch * size]
            first = 0
            yield from self.splits.train.batches(order, size, workers=workers)

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.splits.train), generator=generator(self.config.seed, "order", epoch))

    def _rows(self, step: int) -> Tensor:
        """The indices of the samples in the batch of that step."""
        size, (epoch, number) = self.config.training.batch_size, divmod(step, self.steps_per_epoch)
        if self._present is None or self._present[0] != epoch:
            self._present = epoch, self._order(epoch)
        return self._present[1][number * size : (number + 1) * size]

    def _step(self, batch: Tensor) -> Record | None:
        """One optimiser step; `None` if Ctrl-C asked to end here.

        A state is saved only when its next loss and gradient have turned out finite, so that what training falls back
        to, or resumes from, is never a state that has already failed.
        """
        step, training = self.state.step, self.config.training
        random = generator(self.config.seed, "step", step)
        result, nfe = self._objective(batch, step, random)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        if not bool(torch.isfinite(result.loss)):
            parts = f"nll {float(result.nll):g}, E {float(result.E):g}, n {float(result.n):g}"
            raise _NotFiniteError(f"the loss is not finite ({parts}), though the state after every block is")
        result.loss.backward()
        norm = self._clip()
        if self._stop or (step and step % (training.checkpoint_every or self.steps_per_epoch) == 0):
            self._save()
            if self._stop:
                return None
        self.optimizer.step()
        self.state.step = step + 1
        if self.average is not None and training.ema is not None:
            decay = min(training.ema, (1 + step) / (10 + step))
            for name, value in self.flow.state_dict().items():
                average = self.average[name]
                average.lerp_(value, 1 - decay) if average.is_floating_point() else average.copy_(value)
        return {
            "step": self.state.step,
            "epoch": step // self.steps_per_epoch,
            "loss": float(result.loss.detach()),
            "nll": float(result.nll),
            "bits": result.bits,
            "E": float(result.E),
            "n": float(result.n),
            "nfe": nfe,
            "nfe_backward": self.nfe_backward,
            "grad_norm": norm,
            "learning_rate": self.learning_rate(step),
        }

    def _clip(self) -> float:
        """The norm of the gradient, which is then bounded by ``clip_norm``."""
        limit = math.inf if self.config.training.clip_norm is None else self.config.training.clip_norm
        try:
            return float(nn.utils.clip_grad_norm_(self.flow.parameters(), limit, error_if_nonfinite=True))
        except RuntimeError:
            for index, block in enumerate(self.flow.blocks):
                for name, p in block.named_parameters():
                    if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
                        raise _NotFiniteError(f"block {index}: the gradient of {name} is not finite") from None
            raise _NotFiniteError("the gradient's norm is not finite") from None

    def _objective(self, batch: Tensor, step: int, random: torch.Generator) -> tuple[Objective, float]:
        penalties, contexts = self.config.penalties, self.splits.contexts
        context = None if contexts is None else contexts.train[self._rows(step)]
        weights = None if self.weights is None else self.weights.train[self._rows(step)]
        x = self.flow.prepare(batch)
        if self.config.data.flip and len(self.splits.event_shape) == 3:
            flipped = torch.rand(len(x), generator=random) < 0.5
            x = torch.where(flipped.to(x.device)[:, None, None, None], x.flip(-1), x)
        y, log_det = self.flow.transform(x, random)
        draw = self.flow.draw(penalties.divergence, noise=penalties.noise, probes=penalties.probes, generator=random)
        solution = self.flow.solve(
            y,
            draw,
            self.solver,
            context=self.flow.condition(context, len(x)),
            total_derivative=penalties.total_derivative > 0,
        )
        self._stats = [block.stats for block in solution.blocks]
        return objective(solution, log_det, penalties, None if weights is None else weights.to(y)), solution.nfe

    @property
    def nfe_backward(self) -> float:
        """Evaluations per sample of the last step's backward pass."""
        return sum(stats.nfe_backward for stats in self._stats)

    def _recover(self, error: Exception) -> None:
        """Back to the last good state, with half the solver's step; a bounded number of times."""
        good, cause = self._snapshot[1].step, f"after step {self.state.step}: {error}"
        restarts, refinement = self.state.restarts + 1, self.state.refinement + 1
        where = ""
        if self.folder is not None and self.folder.checkpoint.exists():
            where = f" (the last good state, of step {good}, is in {self.folder.path})"
        if restarts > self.config.training.max_restarts:
            raise TrainingDivergedError(
                f"{cause}. {restarts - 1} restarts with a smaller solver step did not help{where}; "
                "lower the learning_rate, clip the gradient (clip_norm), or raise the kinetic and jacobian penalties"
            ) from error
        self._restore(self._snapshot)
        self.history = [r for r in self.history if r["step"] <= good]
        self.pending = [r for r in self.pending if r["step"] <= good]
        if self.folder is not None:
            self.folder.rewind(good)
        self._close_board()
        self._open_board()  # which hides what was written after this step
        self.state.restarts, self.state.refinement = restarts, refinement
        self._log({"step": good, "event": "restart", "cause": cause, "refinement": refinement})
        self._write(self._capture())
        tqdm.write(f"{cause}\n  went back to step {good}, with half the solver's step ({restarts})", file=sys.stderr)

    # -- validation --------------------------------------------------------------------------------------------------

    def _validate(self) -> None:
        """Scores the validation set with the training solver, and that solver against half its step."""
        with self._averaged(), torch.no_grad():
            disagreement = self._disagreement()
            if self.config.solver.step_size == "auto":
                disagreement = self._refine(disagreement)
            value = self._validation_value()
        if not math.isfinite(value):
            raise _NotFiniteError(f"the validation value is {value}")
        better = value < self.state.best
        self.state.stale = 0 if better else self.state.stale + 1
        if better:
            self.state.best, self.state.best_step = value, self.state.step
            self.best = self._validated()
        if self.config.training.snapshots and self.folder is not None:
            self._flow_with(self._validated()).save(self.folder.snapshot(self.state.step))
        self._log(
            {
                "step": self.state.step,
                "validation": value,
                "validation_bits": value / math.log(2),
                "disagreement": disagreement,
                "step_size": float(self.solver.step_size),
                "seconds": round(self.state.seconds, 3),
            }
        )

    def _validated(self) -> dict[str, Tensor]:
        """A copy of the weights that are validated: the averaged ones, where there are any."""
        return self._copy() if self.average is None else {k: v.clone() for k, v in self.average.items()}

    def _refine(self, disagreement: float) -> float:
        """Halves the step until the solver agrees with half its step; returns the disagreement that is left."""
        while disagreement > _STEP_TOLERANCE and self.state.refinement < _MAX_REFINEMENT:
            self.state.refinement += 1
            self.state.best = math.inf  # what the coarser solver scored is not comparable
            disagreement = self._disagreement()
        return disagreement

    @property
    def _validation_size(self) -> int:
        size = len(self.splits.validation)
        return min(size, self.config.training.validation_limit or size)

    def _validation_value(self) -> float:
        """Mean of ``−log p`` over the validation set, nats per dimension, always with the same noise."""
        samples, count = self.splits.validation, self._validation_size
        size = self.config.evaluation.chunk
        weights = torch.ones(count).double() if self.weights is None else self.weights.validation[:count]
        total = 0.0
        for number, batch in enumerate(samples.batches(torch.arange(count), size)):
            log_prob = self._log_prob(batch, number, self.solver).double().cpu()
            total += float((log_prob * weights[number * size : (number + 1) * size]).sum())
        return -total / float(weights.sum()) / self.flow.dim

    def _disagreement(self) -> float:
        """Mean ``|log p − log p'|`` of the training solver and of half its step, nats per dimension."""
        solver = self.solver
        finer = replace(solver, step_size=float(solver.step_size) / 2, rtol=solver.rtol / 10, atol=solver.atol / 10)
        count = min(_PROBE_SAMPLES, self._validation_size)
        batch = next(self.splits.validation.batches(torch.arange(count), count))
        difference = self._log_prob(batch, 0, solver) - self._log_prob(batch, 0, finer)
        return float(difference.abs().mean()) / self.flow.dim

    def _log_prob(self, batch: Tensor, number: int, solver: SolverConfig) -> Tensor:
        """Log-densities of the validation set's batch of that number."""
        random, penalties = generator(self.config.seed, "validation", number), self.config.penalties
        start, contexts = number * self.config.evaluation.chunk, self.splits.contexts
        context = None if contexts is None else contexts.validation[start : start + len(batch)]
        y, log_det = self.flow.transform(self.flow.prepare(batch), random)
        draw = self.flow.draw(penalties.divergence, noise=penalties.noise, probes=penalties.probes, generator=random)
        solution = self.flow.solve(y, draw, solver, context=self.flow.condition(context, len(batch)))
        log_prob: Tensor = base_log_prob(solution.z) + solution.log_det + log_det
        return log_prob

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones, where there are any."""
        if self.average is None:
            yield
            return
        trained = self._copy()
        self.flow.load_state_dict(self.average)
        try:
            yield
        finally:
            self.flow.load_state_dict(trained)

    def best_flow(self) -> Flow:
        """A flow with the weights that were best on validation, or the present ones before the first validation.

        Its settings hold the training solver with the step that training arrived at.
        """
        return self._flow_with(self.best if math.isfinite(self.state.best) else self._validated())

    def _flow_with(self, weights: dict[str, Tensor]) -> Flow:
        flow = self._built(replace(self.config, solver=self.solver))
        flow.load_state_dict(weights)
        return flow.to(self.device).eval()

    # -- state -------------------------------------------------------------------------------------------------------

    def _copy(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.flow.state_dict().items()}

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that training needs to go on, by name."""
        tensors = {f"flow.{k}": v for k, v in self.flow.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        tensors |= {f"average.{k}": v for k, v in (self.average or {}).items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in slots.items() if isinstance(v, Tensor)}
        return tensors

    def _capture(self) -> tuple[dict[str, Tensor], _Progress]:
        return {k: v.detach().clone() for k, v in self._tensors().items()}, replace(self.state)

    def _restore(self, captured: tuple[dict[str, Tensor], _Progress]) -> None:
        tensors, state = captured
        groups: dict[str, dict[str, Tensor]] = {"flow": {}, "best": {}, "average": {}, "optimizer": {}}
        for name, value in tensors.items():
            group, _, key = name.partition(".")
            groups[group][key] = value.clone()
        self.flow.load_state_dict(groups["flow"])
        self.best = groups["best"]
        self.average = groups["average"] if self.average is not None else None
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in groups["optimizer"].items():
            index, _, key = name.partition(".")
            slots.setdefault(int(index), {})[key] = value
        self.optimizer = self._optimizer()
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        self.state = replace(state)

    def _save(self) -> None:
        """Checkpoint and best model to the folder, and the state to fall back to.

        The model comes first: after a kill between the two files, the resumed run writes both again.
        """
        tensors, state = self._capture()
        for name, value in tensors.items():
            if not bool(torch.isfinite(value).all()):
                raise _NotFiniteError(f"{name} is not finite")
        self._write((tensors, state))

    def _write(self, captured: tuple[dict[str, Tensor], _Progress]) -> None:
        tensors, state = self._snapshot = captured
        if self.folder is None:
            return
        self._flush()
        if self.make is None:
            self.best_flow().save(self.folder.model)
        counts = {"samples": len(self.splits.train), "context_dim": self.splits.context_dim}
        description = {"progress": vars(state), **counts}
        files.write(self.folder.checkpoint, "checkpoint", tensors, description)

    def resume(self) -> None:
        """Takes up the run in the folder where its last checkpoint left it.

        Raises:
            CheckpointError: The checkpoint is damaged, or of another run.
        """
        assert self.folder is not None
        path = self.folder.checkpoint
        tensors, description = files.read(path, "checkpoint")
        samples, given = len(self.splits.train), self.splits.context_dim
        try:
            if description["context_dim"] != given:
                raise ValueError(
                    f"its context has {description['context_dim']} features, the one given {given}: pass that which it "
                    "was begun with, or take another out="
                )
            if description["samples"] != samples:
                raise ValueError(f"it was trained on {description['samples']} samples, not {samples}")
            state = _Progress(**description["progress"])
            self._restore(({k: v.to(self.device) for k, v in tensors.items()}, state))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} is not a checkpoint of this run: {error}") from error
        self.history = self.folder.rewind(state.step)
        self._snapshot = self._capture()

    # -- what a person sees ------------------------------------------------------------------------------------------

    def _log(self, record: Record) -> None:
        self.history.append(record)
        if self.folder is None:
            return
        self.pending.append(record)
        if time.monotonic() - self.flushed > _FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        self.flushed = time.monotonic()
        if self.folder is not None:
            self.folder.append(self.pending)
        if self.board is not None:
            self.board.write(self.pending)
        self.pending.clear()

    def _open_board(self) -> None:
        if self.config.training.tensorboard and self.folder is not None:
            self.board = Board(self.folder, self.state.step)

    def _close_board(self) -> None:
        if self.board is not None:
            self.board.close()
        self.board = None

    def _bar(self) -> Any:
        return tqdm(total=self.total_steps, initial=self.state.step, unit="step", disable=not self.progress)

    def _postfix(self, record: Record) -> dict[str, str]:
        unit, factor = ("nats", self.flow.dim) if self.splits.levels is None else ("bits/dim", 1 / math.log(2))
        shown = {"loss": f"{record['loss']:.4f}", unit: f"{record['nll'] * factor:.3f}"}
        shown |= {"E": f"{record['E']:.3g}", "n": f"{record['n']:.3g}", "nfe": f"{record['nfe']:.0f}"}
        if math.isfinite(self.state.best):
            shown["best"] = f"{self.state.best * factor:.3f}"
        return shown

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C (and SIGTERM) end the loop after the present step; a second Ctrl-C ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _with_moments_of(x: Tensor, weights: Tensor) -> Tensor:
    """Two samples whose mean and standard deviation are the weighted ones of ``x`` ``(n, *event)``."""
    share = (weights / weights.sum()).reshape(-1, *[1] * (x.ndim - 1))
    mean = (share * x).sum(0)
    std = (share * (x - mean).square()).sum(0).sqrt()
    return torch.stack((mean - std, mean + std))


def _wrapped(
    dynamics: Callable[[tuple[int, ...]], nn.Module], context_dim: int
) -> Callable[[tuple[int, ...]], Dynamics]:
    def make(shape: tuple[int, ...]) -> Dynamics:
        module = dynamics(shape)
        return module if isinstance(module, Dynamics) else ModuleDynamics(module, shape, context_dim)

    return make
