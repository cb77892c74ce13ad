"""`train`: from data to a density, in a loop that can be stopped, resumed bit for bit, and trusted not to lose work."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pyrnode import checkpoint, evaluation
from pyrnode.config import Config, FlowConfig, SolverConfig
from pyrnode.data import Splits, load
from pyrnode.dynamics import Dynamics, ModuleDynamics
from pyrnode.errors import CheckpointError, ConfigError, SolverError, TrainingDivergedError
from pyrnode.flow import Flow, base_log_prob
from pyrnode.objective import Objective, objective
from pyrnode.runs import Record, RunFolder, differences
from pyrnode.seeds import generator

_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
_FLUSH_SECONDS = 5.0
_PROBE_SAMPLES = 64  # samples on which the training solver is compared with half its step
_STEP_TOLERANCE = 0.01  # nats per dimension by which the two may differ with step_size="auto"


@dataclass
class TrainingResult:
    """What `train` returns.

    Attributes:
        flow: The best flow on validation.
        history: A record per optimiser step (``loss``, ``nll``, ``bits``, ``E``, ``n``, ``nfe`` …) and per validation
            (``validation``, ``disagreement``), in order.
        report: Score on the test set with an accurate solver, beside the baselines; `None` if not asked for, or if
            training was interrupted.
        config: The resolved settings.
        out: Folder of the run; `None` if nothing was written.
        interrupted: Whether Ctrl-C ended training early.
    """

    flow: Flow
    history: list[Record]
    report: evaluation.Report | None
    config: Config
    out: Path | None
    interrupted: bool = False


def train(
    data: Any = None,
    *,
    preset: str | None = None,
    flow: FlowConfig | Mapping[str, Any] | None = None,
    solver: str | None = None,
    step_size: float | str | None = None,
    sensealg: str | None = None,
    kinetic: float | None = None,
    jacobian: float | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    engine: str | None = None,
    device: str | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    overrides: Mapping[str, Any] | None = None,
    dynamics: Callable[[tuple[int, ...]], nn.Module] | None = None,
    evaluate: bool = True,
    progress: bool = True,
) -> TrainingResult:
    """Trains a regularised neural ODE on data.

    Whatever is not given here comes from the preset; without one, from the defaults of `Config` (RK4 with step 0.25,
    λ_K = λ_J = 0.01, Adam 1e-3: the paper's), or from the preset that is made for the named data set.

    Args:
        data: Name of a data set, path of a file or folder, array ``(n, *event)``, torch data set, or `Splits`.
        preset: Name of a preset (``pyrnode presets``) or path of a ``.toml`` file.
        flow: Composition and network, as a `FlowConfig` or a mapping of its fields.
        solver: Training solver, e.g. ``"RK4"``.
        step_size: Its step, or ``"auto"``.
        sensealg: Sensitivity algorithm, e.g. ``"Backprop"``.
        kinetic: ``λ_K``.
        jacobian: ``λ_J``.
        epochs: Passes over the training set.
        batch_size: Samples per step.
        learning_rate: Peak learning rate.
        engine: ``"torch"``, ``"julia"`` or ``"auto"``.
        device: torch device, or ``"auto"``.
        seed: Seed of everything random.
        out: Folder for configuration, metrics, checkpoints, report and pictures; `None` writes nothing.
        resume: Go on with the run in `out`, if there is one.
        overrides: Any other setting by name, e.g. ``{"ema": 0.999, "solver.rtol": 1e-6}``.
        dynamics: Makes a block's dynamics from its event shape: your own ``nn.Module`` called as ``f(t, z)``.
        evaluate: Score the result on the test set.
        progress: Show a progress bar.

    Returns:
        The best flow on validation, the history and the report.

    Raises:
        ConfigError: A setting is unknown or does not fit.
        DataError: The data is missing or unusable.
        CheckpointError: `out` already holds a run and `resume` is false, or its checkpoint is damaged.
        TrainingDivergedError: Training stayed non-finite after ``training.max_restarts`` restarts.

    Example:
        >>> import pyrnode
        >>> result = pyrnode.train("8gaussians", epochs=1, overrides={"samples": 500}, evaluate=False, progress=False)
        >>> result.flow.log_prob(result.flow.sample(3, seed=0)).shape
        torch.Size([3])
    """
    folder = None if out is None else RunFolder(out)
    given = {
        "flow": flow.to_dict() if isinstance(flow, FlowConfig) else flow,
        "solver.name": solver,
        "solver.step_size": step_size,
        "solver.sensealg": sensealg,
        "penalties.kinetic": kinetic,
        "penalties.jacobian": jacobian,
        "training.epochs": epochs,
        "training.batch_size": batch_size,
        "training.learning_rate": learning_rate,
        "engine": engine,
        "device": device,
        "seed": seed,
        "data.name": data if isinstance(data, str) else str(data) if isinstance(data, Path) else None,
    }
    given = {key: value for key, value in given.items() if value is not None} | dict(overrides or {})
    config = _resolve(folder, resume, preset, given)
    splits = load(data, config=config.data)
    trainer = Trainer(config, splits, folder, dynamics=dynamics, progress=progress)
    if folder is not None and resume and folder.checkpoint.exists():
        trainer.resume()
    elif folder is not None:
        folder.begin(config)
    interrupted = not trainer.run()
    best = trainer.best_flow()
    report = None
    if evaluate and not interrupted:
        report = evaluation.evaluate(best, splits, training_solver=trainer.solver, progress=progress)
        if folder is not None:
            evaluation.write_report(folder, best, splits, report, trainer.history)
    return TrainingResult(best, trainer.history, report, config, folder and folder.path, interrupted)


_MADE_FOR = {"digits": "digits", "mnist": "mnist-cpu", "cifar10": "finlay2020-cifar10"}


def _resolve(folder: RunFolder | None, resume: bool, preset: str | None, given: Mapping[str, Any]) -> Config:
    """The settings of a run: the stored ones for a resumed one, else preset and overrides."""
    stored = folder.stored_config() if folder is not None else None
    if folder is not None and folder.started and not resume:
        raise CheckpointError(f"{folder.path} already holds a run; pass resume=True (--resume) or another folder")
    if resume and folder is None:
        raise ConfigError("resume=True needs out=, the folder of the run")
    if resume and stored is not None:
        asked = (stored if preset is None else Config.preset(preset)).override(given)
        if changed := differences(stored, asked):
            raise ConfigError(f"cannot resume with other settings ({'; '.join(changed)}); use another out=")
        return asked
    if preset is None:
        from pyrnode.data.synthetic import DENSITIES

        name = str(given.get("data.name", ""))
        preset = "toy" if name in DENSITIES else _MADE_FOR.get(name)
    return (Config() if preset is None else Config.preset(preset)).override(given)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device = {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


class _NotFiniteError(Exception):
    """A step's loss or gradient is not finite; the message says which."""


@dataclass
class _Progress:
    """The counters of a run; all of them are in its checkpoints."""

    step: int = 0  # optimiser steps done
    restarts: int = 0
    refinement: int = 0  # how often the solver's step was halved
    best: float = math.inf  # lowest validation value, nats per dimension
    best_step: int = 0
    stale: int = 0  # validations since then
    seconds: float = 0.0


class Trainer:
    """The training loop over one flow; `train` is the way to use it.

    Args:
        config: Settings.
        splits: Data.
        folder: Where to write; `None` writes nothing.
        dynamics: The user's own dynamics by event shape.
        progress: Show a progress bar.
    """

    def __init__(
        self,
        config: Config,
        splits: Splits,
        folder: RunFolder | None,
        *,
        dynamics: Callable[[tuple[int, ...]], nn.Module] | None = None,
        progress: bool = True,
    ) -> None:
        self.config, self.splits, self.folder, self.progress = config, splits, folder, progress
        self.state = _Progress()
        self.device = _device(config.device)
        sample = splits.train.tensor() if splits.levels is None and config.flow.standardize else None
        self.make = None if dynamics is None else _wrapped(dynamics)
        self.flow = Flow.build(
            config, splits.event_shape, levels=splits.levels, sample=sample, dynamics=self.make
        ).to(self.device)
        self.flow.engine.check(self.solver)
        self.steps_per_epoch = max(1, len(splits.train) // config.training.batch_size)
        self.optimizer = self._optimizer()
        self.average = self._copy() if config.training.ema is not None else None
        self.best: dict[str, Tensor] = self._copy()
        self.history: list[Record] = []
        self.pending: list[Record] = []
        self.flushed = 0.0
        self._snapshot = self._capture()
        self._stop = False

    # -- what is fixed by the settings -------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        steps = self.config.training.epochs * self.steps_per_epoch
        return min(steps, self.config.training.max_steps or steps)

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
        training = self.config.training
        validate_every = training.validate_every or self.steps_per_epoch
        checkpoint_every = training.checkpoint_every or self.steps_per_epoch
        clock = time.perf_counter()
        with self._interruptible(), self._bar() as bar:
            batches = self._batches()
            while not self.finished and not self._stop:
                try:
                    record = self._step(next(batches))
                except (SolverError, _NotFiniteError) as error:
                    self._recover(error)
                    batches = self._batches()
                    bar.n = self.state.step
                    continue
                now = time.perf_counter()
                self.state.seconds += now - clock
                clock = now
                record["seconds"] = round(self.state.seconds, 3)
                self._log(record)
                bar.update()
                bar.set_postfix(self._postfix(record), refresh=False)
                step = self.state.step
                if step % validate_every == 0 or step == self.total_steps:
                    self._validate()
                    clock = time.perf_counter()
                if step % checkpoint_every == 0 or self.finished:
                    self._save()
        if self._stop:
            self._save()
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
            order = torch.randperm(len(self.splits.train), generator=generator(self.config.seed, "order", epoch))
            order = order[first * size : self.steps_per_epoch * size]
            first = 0
            yield from self.splits.train.batches(order, size, workers=workers)

    def _step(self, batch: Tensor) -> Record:
        """One optimiser step."""
        step, training = self.state.step, self.config.training
        random = generator(self.config.seed, "step", step)
        result, nfe = self._objective(batch, random)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        if not bool(torch.isfinite(result.loss)):
            raise _NotFiniteError(f"the loss is {float(result.loss.detach())}")
        result.loss.backward()
        limit = math.inf if training.clip_norm is None else training.clip_norm
        norm = float(nn.utils.clip_grad_norm_(self.flow.parameters(), limit))
        if not math.isfinite(norm):
            raise _NotFiniteError(f"the gradient's norm is {norm}")
        self.optimizer.step()
        self.state.step = step + 1
        if self.average is not None and training.ema is not None:
            decay = min(training.ema, (1 + step) / (10 + step))
            for name, value in self.flow.state_dict().items():
                self.average[name].lerp_(value, 1 - decay)
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

    def _objective(self, batch: Tensor, random: torch.Generator) -> tuple[Objective, float]:
        penalties = self.config.penalties
        x = self.flow.prepare(batch)
        if self.config.data.flip and len(self.splits.event_shape) == 3:
            flipped = torch.rand(len(x), generator=random) < 0.5
            x = torch.where(flipped.to(x.device)[:, None, None, None], x.flip(-1), x)
        y, log_det = self.flow.transform(x, random)
        draw = self.flow.draw(
            penalties.divergence, noise=penalties.noise, probes=penalties.probes, generator=random
        )
        solution = self.flow.solve(y, draw, self.solver, total_derivative=penalties.total_derivative > 0)
        self._stats = [block.stats for block in solution.blocks]
        return objective(solution, log_det, penalties), solution.nfe

    @property
    def nfe_backward(self) -> float:
        """Evaluations per sample of the last step's backward pass."""
        return sum(stats.nfe_backward for stats in self._stats)

    def _recover(self, error: Exception) -> None:
        """Back to the last good state, with half the solver's step; a bounded number of times."""
        failed, good = self.state.step + 1, self._snapshot[1].step
        restarts, refinement = self.state.restarts + 1, self.state.refinement + 1
        where = f" (the last good state, of step {good}, is in {self.folder.path})" if self.folder else ""
        if restarts > self.config.training.max_restarts:
            raise TrainingDivergedError(
                f"step {failed}: {error}. {restarts - 1} restarts with a smaller solver step did not help{where}; lower "
                "the learning_rate, clip the gradient (clip_norm), or raise the kinetic and jacobian penalties"
            ) from error
        self._restore(self._snapshot)
        self.history = [r for r in self.history if r["step"] <= good]
        self.pending = [r for r in self.pending if r["step"] <= good]
        if self.folder is not None:
            self.folder.rewind(good)
        self.state.restarts, self.state.refinement = restarts, refinement
        self._log({"step": good, "event": "restart", "cause": f"step {failed}: {error}", "refinement": refinement})
        tqdm.write(f"step {failed}: {error}\n  restored step {good}, solver's step halved ({restarts})", nolock=True)

    # -- validation --------------------------------------------------------------------------------------------------

    def _validate(self) -> None:
        """Scores the validation set with the training solver, and that solver against half its step."""
        training = self.config.training
        with self._averaged(), torch.no_grad():
            value = self._validation_value(training.validation_limit)
            disagreement = self._disagreement()
        if self.config.solver.step_size == "auto" and disagreement > _STEP_TOLERANCE and self.state.refinement < 6:
            self.state.refinement += 1
        better = value < self.state.best
        self.state.stale = 0 if better else self.state.stale + 1
        if better:
            self.state.best, self.state.best_step = value, self.state.step
            self.best = self._copy() if self.average is None else {k: v.clone() for k, v in self.average.items()}
        self._log(
            {
                "step": self.state.step,
                "validation": value,
                "validation_bits": value / math.log(2),
                "disagreement": disagreement,
                "step_size": float(self.solver.step_size),
            }
        )

    def _validation_value(self, limit: int | None) -> float:
        """Mean of ``−log p`` over the validation set, nats per dimension, always with the same noise."""
        samples = self.splits.validation
        count = min(len(samples), limit or len(samples))
        total = 0.0
        size = self.config.evaluation.chunk
        for number, batch in enumerate(samples.batches(torch.arange(count), size)):
            total += float(self._log_prob(batch, number, self.solver).double().sum())
        return -total / count / self.flow.dim

    def _disagreement(self) -> float:
        """Mean ``|log p − log p'|`` of the training solver and of half its step, nats per dimension."""
        solver = self.solver
        finer = replace(
            solver, step_size=float(solver.step_size) / 2, rtol=solver.rtol / 10, atol=solver.atol / 10
        )
        count = min(_PROBE_SAMPLES, len(self.splits.validation))
        batch = next(iter(self.splits.validation.batches(torch.arange(count), count)))
        difference = self._log_prob(batch, 0, solver) - self._log_prob(batch, 0, finer)
        return float(difference.abs().mean()) / self.flow.dim

    def _log_prob(self, batch: Tensor, number: int, solver: SolverConfig) -> Tensor:
        random, penalties = generator(self.config.seed, "validation", number), self.config.penalties
        y, log_det = self.flow.transform(self.flow.prepare(batch), random)
        draw = self.flow.draw(
            penalties.divergence, noise=penalties.noise, probes=penalties.probes, generator=random
        )
        solution = self.flow.solve(y, draw, solver)
        return base_log_prob(solution.z) + solution.log_det + log_det

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
        """A flow with the weights that were best on validation."""
        flow = Flow.build(self.config, self.splits.event_shape, levels=self.splits.levels, dynamics=self.make)
        flow.load_state_dict(self.best)
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
        """Checkpoint and best model to the folder, and the state to fall back to."""
        self._snapshot = self._capture()
        if self.folder is None:
            return
        self._flush()
        checkpoint.write(self.folder.checkpoint, "checkpoint", self._tensors(), {"progress": vars(self.state)})
        if self.make is None:
            self.best_flow().save(self.folder.model)

    def resume(self) -> None:
        """Takes up the run in the folder where its last checkpoint left it.

        Raises:
            CheckpointError: The checkpoint is damaged, or of another run.
        """
        assert self.folder is not None
        tensors, description = checkpoint.read(self.folder.checkpoint, "checkpoint")
        try:
            state = _Progress(**description["progress"])
            self._restore(({k: v.to(self.device) for k, v in tensors.items()}, state))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self.folder.checkpoint} is not a checkpoint of this run: {error}") from error
        self.history = self.folder.rewind(self.state.step)
        self._snapshot = self._capture()

    # -- what a person sees ------------------------------------------------------------------------------------------

    def _log(self, record: Record) -> None:
        self.history.append(record)
        self.pending.append(record)
        if self.folder is not None and time.monotonic() - self.flushed > _FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        self.flushed = time.monotonic()
        if self.folder is not None:
            self.folder.append(self.pending)
        self.pending.clear()

    def _bar(self) -> Any:
        return tqdm(total=self.total_steps, initial=self.state.step, unit="step", disable=not self.progress)

    def _postfix(self, record: Record) -> dict[str, str]:
        value = {"bits/dim": f"{record['bits']:.3f}"} if self.splits.levels else {"nats": f"{record['nll'] * self.flow.dim:.3f}"}
        shown = {"loss": f"{record['loss']:.4f}", **value, "E": f"{record['E']:.3g}", "n": f"{record['n']:.3g}"}
        shown["nfe"] = f"{record['nfe']:.0f}"
        if math.isfinite(self.state.best):
            shown["best"] = f"{self.state.best / math.log(2):.3f}" if self.splits.levels else f"{self.state.best:.3f}"
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


def _wrapped(dynamics: Callable[[tuple[int, ...]], nn.Module]) -> Callable[[tuple[int, ...]], Dynamics]:
    def make(shape: tuple[int, ...]) -> Dynamics:
        module = dynamics(shape)
        return module if isinstance(module, Dynamics) else ModuleDynamics(module, shape)

    return make
