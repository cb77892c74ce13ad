"""A study: the runs that experiments share, trained once, resumed, and scored with one accurate solver."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrnode import evaluation, solvers
from pyrnode.config import Config
from pyrnode.data import Splits, load
from pyrnode.data.loading import leaves_files
from pyrnode.devices import resolve_device
from pyrnode.distributed import World, alone
from pyrnode.errors import TrainingDivergedError
from pyrnode.files import read_json
from pyrnode.flow import Flow
from pyrnode.flow import load as load_flow
from pyrnode.paper.scales import Scale
from pyrnode.runs import Record, RunFolder, read_metrics
from pyrnode.training import train

TIMED_STEPS, UNTIMED = 3, 5
"""Steps that are timed, and on a GPU those before, in which it records graphs and compiles kernels."""

TUNED = ("rnode", "ffjord")
"""The methods whose learning rate is tuned; the ablations take the first one's."""


class Need(NamedTuple):
    """A run that an experiment needs."""

    data: str
    method: str
    seed: int = 0

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.data}-{self.method}-seed{self.seed}"


@dataclass(frozen=True)
class Run:
    """A trained flow.

    Attributes:
        need: What it is.
        config: Its settings, tuned.
        folder: Where it lies.
        flow: The best flow on validation.
        diverged: Why training ended early, if it did.
    """

    need: Need
    config: Config
    folder: RunFolder
    flow: Flow
    diverged: str | None

    @cached_property
    def history(self) -> list[Record]:
        """The records of all steps and validations."""
        return read_metrics(self.folder.path)

    @property
    def steps(self) -> list[Record]:
        """The records of the optimiser steps.

        Raises:
            TrainingDivergedError: There are none.
        """
        steps = [record for record in self.history if "loss" in record]
        if not steps:
            raise TrainingDivergedError(f"{self.need.name} took no step: {self.diverged}")
        return steps

    @property
    def seconds(self) -> float:
        """Time of all optimiser steps."""
        return float(self.steps[-1]["seconds"])


class Study:
    """Trains what experiments need, in ``runs/`` of a folder that all of them share.

    Args:
        scale: The sizes.
        out: The folder.
        settings: Settings for every run (engine, device, folder of the data).
        progress: Show progress on standard error.
        world: The processes that take part, all of which see the folder; the first of them writes.
    """

    def __init__(
        self, scale: Scale, out: Path, *, settings: dict[str, Any], progress: bool, world: World = alone
    ) -> None:
        self.scale, self.out, self.settings, self.world = scale, out, settings, world
        self.progress = progress and world.first
        self._splits: dict[str, Splits] = {}
        self._runs: dict[Need, Run] = {}
        self._rates: dict[tuple[str, str], float] = {}

    def say(self, text: str) -> None:
        """A line of progress."""
        if self.progress:
            print(text, file=sys.stderr, flush=True)

    # -- settings ----------------------------------------------------------------------------------------------------

    def _untuned(self, need: Need) -> Config:
        return self.scale.config(need.data, need.method, seed=need.seed).override(self.settings)

    def config(self, need: Need) -> Config:
        """The settings of a run, with the learning rate that its method was tuned to."""
        config = self._untuned(need)
        if need.data not in self.scale.images:
            return config
        return config.override({"training.learning_rate": self.learning_rate(need.data, need.method)})

    def learning_rate(self, data: str, method: str) -> float:
        """The rate of the grid whose short run ends best on validation; the ablations take the full method's."""
        rates = self.scale.learning_rates
        if len(rates) == 1:
            return rates[0]
        if method not in TUNED:
            return self.learning_rate(data, "rnode")
        if (data, method) in self._rates:
            return self._rates[data, method]
        scores = {}
        for rate in rates:
            folder = self._train(f"tuning/{data}-{method}-rate{rate:g}", self._tuning(data, method, rate))[0]
            records = self.world.once(partial(read_metrics, folder.path))
            values = [record["validation"] for record in records if "validation" in record]
            scores[rate] = values[-1] if values else float("inf")
        return self._rates.setdefault((data, method), min(scores, key=scores.__getitem__))

    def _tuning(self, data: str, method: str, rate: float) -> Config:
        steps = self.scale.tuning_steps
        settings = {"max_steps": steps, "validate_every": steps, "learning_rate": rate, "snapshots": False}
        return self._untuned(Need(data, method)).override({f"training.{key}": v for key, v in settings.items()})

    # -- runs --------------------------------------------------------------------------------------------------------

    def run(self, need: Need) -> Run:
        """The run, trained if it is not there yet, resumed if it was interrupted."""
        if need not in self._runs:
            config = self.config(need)
            folder, diverged = self._train(f"runs/{need.name}", config)
            if self.world.once(folder.model.exists):
                flow = load_flow(folder.model, engine=config.engine, device=config.device)
            else:  # it diverged before its first checkpoint
                splits = self.splits(config)
                flow = Flow.build(config, splits.event_shape, levels=splits.levels)
            self._runs[need] = Run(need, config, folder, flow, diverged)
        return self._runs[need]

    def _train(self, name: str, config: Config) -> tuple[RunFolder, str | None]:
        folder = RunFolder(self.out / name)
        report = folder.path / "diverged.txt"
        if told := self.world.once(lambda: report.read_text(encoding="utf-8").strip() if report.exists() else ""):
            return folder, told
        self.say(f"{name}")
        splits = self.splits(config)
        try:
            result = train(
                splits,
                preset=config,
                out=folder.path,
                resume=True,
                evaluate=False,
                progress=self.progress,
            )
        except TrainingDivergedError as error:
            told = str(error)
            self.world.once(lambda: folder.write_text(report.name, f"{told}\n"))
            return folder, told
        if result.interrupted:
            raise KeyboardInterrupt
        return folder, None

    def splits(self, config: Config) -> Splits:
        """The data of a run; all methods and seeds share it, and its split."""
        if config.data.name not in self._splits:
            in_turn = leaves_files(None, config.data)
            splits = self.world.together(lambda: load(None, config=config.data), in_turn=in_turn)
            self._splits[config.data.name] = splits
        return self._splits[config.data.name]

    # -- scores ------------------------------------------------------------------------------------------------------

    def validation(self, data: str) -> Tensor:
        """The validation samples on which all methods are scored."""
        samples = self.splits(self._untuned(Need(data, "rnode"))).validation
        return samples.tensor()[: self.scale.scored]

    def curve(self, run: Run) -> list[dict[str, float]]:
        """The model of every validation of a run, scored on the same samples with the same accurate solver and noise.

        Each entry has ``step``, ``seconds`` (of training until then), ``bits`` per dimension, ``E``, ``n`` and ``nfe``.
        They are kept in the run's folder.

        Raises:
            TrainingDivergedError: The run ended before its first validation.
        """
        path, remedy = run.folder.path / "curve.json", "delete it and go on with --resume"
        kept: list[dict[str, float]] | None = self.world.once(
            lambda: read_json(path, remedy=remedy, check=_points) if path.exists() else None
        )
        if kept is not None:
            return kept
        snapshots = self.world.once(run.folder.snapshots)
        if not snapshots:
            raise TrainingDivergedError(
                f"{run.need.name} was never validated, so nothing can be said of it: {run.diverged}"
            )
        self.say(f"scoring the models of {run.need.name}")
        x = self.validation(run.need.data)
        config = replace(run.config.evaluation, draws=1)
        seconds = {record["step"]: record["seconds"] for record in run.history if "validation" in record}
        curve = []
        for step, file in snapshots.items():
            flow = load_flow(file, engine=run.config.engine, device=run.config.device)
            found = evaluation.measure(flow, x, config=config, world=self.world)
            values = {"bits": found.score.bits, "E": found.E, "n": found.n, "nfe": found.nfe}
            curve.append({"step": step, "seconds": seconds[step], **values})
        self.world.once(lambda: run.folder.write_text(path.name, json.dumps(curve, indent=1) + "\n"))
        return curve

    # -- cost --------------------------------------------------------------------------------------------------------

    def estimate(self, needs: Iterable[Need]) -> float:
        """Seconds that the training of what is missing will take: the time of a step, measured, times the steps.

        An adaptive solver needs more evaluations as training goes on, so for those it is a lower bound.
        """
        total, lines = 0.0, []
        missing: dict[tuple[str, str], int] = {}
        for need in needs:
            if not self._complete(need):
                missing[need.data, need.method] = missing.get((need.data, need.method), 0) + 1
        for (data, method), runs in missing.items():
            config = self._untuned(Need(data, method))
            step, steps = self._step_seconds(config), config.training.total_steps(len(self.splits(config).train))
            tuned = data in self.scale.images and method in TUNED and len(self.scale.learning_rates) > 1
            tuning = self.scale.tuning_steps * len(self.scale.learning_rates) if tuned else 0
            seconds = step * (runs * steps + tuning)
            total += seconds
            bound = "at least " if solvers.method(config.solver.name).adaptive else ""
            lines.append(
                f"  {data} {method}: {runs} run(s) of {steps} steps, {step:.3g} s each: {bound}{hours(seconds)}"
            )
        if lines:
            self.say("\n".join(("estimated training time (measured step time x steps):", *lines, f"  {hours(total)}")))
        return total

    def _step_seconds(self, config: Config) -> float:
        first = 0 if resolve_device(config.device).type == "cpu" else UNTIMED
        timed = config.override(
            {
                "training.epochs": 2**31,
                "training.max_steps": first + TIMED_STEPS,
                "training.validate_every": first + TIMED_STEPS,
                "training.validation_limit": 1,
                "training.snapshots": False,
            }
        )
        result = train(self.splits(config), preset=timed, evaluate=False, progress=False)
        if result.interrupted:
            raise KeyboardInterrupt
        seconds = [record["seconds"] for record in result.history if "loss" in record]
        return float(seconds[-1] - seconds[first]) / (TIMED_STEPS - 1)

    def _complete(self, need: Need) -> bool:
        """Whether a run has ended, and needs no more time."""
        folder = RunFolder(self.out / "runs" / need.name)

        def ended() -> bool | tuple[Config, int]:
            """Whether it has, or the settings and the step that say it."""
            if (folder.path / "diverged.txt").exists():
                return True
            config, records = folder.stored_config(), read_metrics(folder.path)
            there = config is not None and folder.model.exists() and bool(records)
            return (config, records[-1]["step"]) if there and config is not None else False

        found = self.world.once(ended)
        if isinstance(found, bool):
            return found
        config, step = found
        return step >= config.training.total_steps(len(self.splits(config).train))


def _points(curve: Any) -> None:
    """Fails where a curve is none."""
    for point in curve:
        for name in ("step", "seconds", "bits", "E", "n", "nfe"):
            math.isfinite(point[name])


def hours(seconds: float) -> str:
    """A time in the unit in which a person would say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean, and standard deviation over seeds (0 for one)."""
    x = torch.tensor(list(values), dtype=torch.float64, device="cpu")
    return float(x.mean()), float(x.std()) if len(x) > 1 else 0.0
