"""`train`: from data to a density, in a loop that can be stopped, resumed bit for bit, and trusted not to lose work."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from pyrnode import bounded, cards, distributed, engines, evaluation, reports
from pyrnode.config import Config, SolverConfig, made_for
from pyrnode.data import load, sources, support
from pyrnode.data.loading import leaves_files
from pyrnode.data.synthetic import DENSITIES
from pyrnode.embedding import Given
from pyrnode.errors import CheckpointError, ConfigError
from pyrnode.flow import Flow
from pyrnode.progress import progress_bar
from pyrnode.runs import Record, RunFolder, differences, lasting
from pyrnode.training.callbacks import Callback
from pyrnode.training.trainer import Trainer


@dataclass
class TrainingResult:
    """What `train` returns.

    Attributes:
        flow: The best flow on validation.
        history: A record per optimiser step (``loss``, ``nll``, ``bits``, ``E``, ``n``, ``nfe`` …) and per validation
            (``validation``, ``disagreement``), in order.
        report: Score on the test set with an accurate solver, beside the baselines; `None` if not asked for, if
            training was interrupted, or if it failed (`notes` says how).
        config: The resolved settings.
        out: Folder of the run; `None` if nothing was written.
        interrupted: Whether Ctrl-C ended training early, or a signal that a handler of the caller's took note of.
        notes: What is to be said of the data (`pyrnode.data.support`); that the training solver was wrong, and when;
            and what went wrong after training, which costs no result. What the report lacks, its own notes say.
    """

    flow: Flow
    history: list[Record]
    report: evaluation.Report | None
    config: Config
    out: Path | None
    interrupted: bool = False
    notes: list[str] = field(default_factory=list)


@torch.inference_mode(False)  # what is learned is differentiated, whatever mode the caller is in
@torch.enable_grad()
def train(
    data: Any = None,
    *,
    preset: str | Config | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    dynamics: Callable[[tuple[int, ...]], nn.Module] | None = None,
    context: Any = None,
    embedding: Given | None = None,
    validation: Any = None,
    validation_context: Any = None,
    callbacks: Callback | Iterable[Callback] = (),
    evaluate: bool = True,
    progress: bool = True,
    **settings: Any,
) -> TrainingResult:
    """Trains a regularised neural ODE on data.

    Settings are those of `Config`, by name: ``epochs=3``, ``kinetic=0.1``, ``engine="julia"``, ``seed=1``,
    ``solver="Midpoint"``. Whatever is not given comes from the preset; without one, from the one that is made for
    the named data set, from ``"table"`` or ``"wide-table"`` for vectors, and from ``"images"`` for images.

    Ctrl-C saves after the present step and ends training; a second one ends it at once. SIGTERM saves likewise, and is
    then handed to whoever would have had it without this function: by default, the process ends. So is SIGINT, where
    the caller has a handler of their own.

    Under torchrun, or within a process group of torch.distributed, all of its processes must call it, with the same
    arguments: they train one flow together, which each of them returns, and the first writes and prints
    (docs/parallel.md). The batch size is the whole run's.

    Args:
        data: Name of a data set, path of a file or folder, array ``(n, *event)``, torch data set, or `Splits`.
        preset: Name of a preset (``pyrnode presets``), path of a ``.toml`` file, or a `Config` of your own.
        out: Folder for configuration, metrics, checkpoints, report and pictures; `None` writes nothing.
        resume: Go on with the run in `out`, if there is one.
        dynamics: Makes a block's dynamics from its event shape: your own ``nn.Module`` called as ``f(t, z)``, or
            as ``f(t, z, c)`` where there is a context.
        context: What the density is conditional on, ``(n, m)`` numbers (array, tensor or data frame), a row for each
            sample of `data`, which is then an array, a table or a data set without a test set of its own. The flow is
            ``p(x | c)``: `log_prob` and `sample` take the context too. For an embedding ``(n, *shape)``.
        embedding: A network that makes a vector ``(n, m)`` of contexts of any shape, such as images or time series, and
            is trained with the flow: a function or class that makes it, `functools.partial` of either for its settings,
            or ``"module:function"``; or the module itself, which is copied, and with which no model can be saved. The
            contexts reach it in the flow's type, and standardised where they are vectors.
        validation: What the best flow is chosen on: a share of the samples (a number, by default 0.1), or samples of
            your own, of the same shape and kind as `data`: an array, a tensor, a data frame, a path, a data set. Those
            are never trained on, and nothing is standardised by them; all of `data` but the test samples is then
            trained on. To resume, pass the same again.
        validation_context: The context of validation samples of your own, ``(n, m)``, where there is a `context`.
        callbacks: A `Callback`, or several: your own code, which is told of every step and validation. What one raises
            is raised here, when the run is saved.
        evaluate: Score the result on the test set.
        progress: Show a progress bar.
        **settings: Settings by name; a mapping names several of a section, e.g. ``flow={"blocks": 2}``, and names with
            a dot come as ``**{"evaluation.solver.rtol": 1e-6}``. Of a solver, keys that are no settings are options of
            the solver itself (Julia engine), as in ``solver={"name": "Vern7", "lazy": False}``. Columns that lie
            between bounds, or are periodic, are named by ``bounds={"share": (0, 1), "income": (0, None)}`` and
            ``period={"angle": 360}`` (`ColumnsConfig`).

    Returns:
        The best flow on validation, the history and the report.

    Raises:
        ConfigError: A setting is unknown or does not fit; a callback is none, or has a method that nobody would call;
            the embedding fails, or does not give each context a vector of its own.
        DataError: The data is missing or unusable, or has values on its columns' bounds, or beyond them.
        CheckpointError: `out` already holds a run and `resume` is false, or its checkpoint is damaged, or of other
            settings or data; or another process trains in `out` now.
        ProcessError: Another process of the run has ended, or does not answer.
        TrainingDivergedError: Training stayed non-finite after ``training.max_restarts`` restarts.

    Example:
        >>> import pyrnode
        >>> result = pyrnode.train("8gaussians", epochs=1, samples=500, evaluate=False, progress=False)
        >>> result.flow.log_prob(result.flow.sample(3, seed=0)).shape
        torch.Size([3])
    """
    if isinstance(validation, (int, float)):
        settings["data.validation"], validation = validation, None
    world = distributed.world()
    folder = None if out is None else RunFolder(out)
    if isinstance(solver := settings.get("solver"), Mapping):
        settings["solver"] = _with_options(solver)
    if isinstance(data, (str, Path)):
        settings["data.name"] = str(data)
    resume = world.once(lambda: resume or (folder is not None and folder.goes_on()))
    config, settled = world.once(lambda: _resolve(folder, resume, preset, settings))
    splits = world.together(
        lambda: load(
            data,
            config=config.data,
            context=context,
            validation=validation,
            validation_context=validation_context,
            check=partial(bounded.check_source, config.columns),
        ),
        in_turn=leaves_files(data, config.data),
    )
    if not settled:
        made = made_for(config.flow.state_shape(splits.event_shape))
        config = world.once(lambda: _anchored(Config.preset(made).override(settings)))
    notes, progress = list[str](), progress and world.first
    remarks = list[str]()
    with evaluation.extra("the remarks on the data's support", notes):
        remarks = world.once(lambda: support.remarks(splits))
        for remark in remarks if world.first else ():
            print(f"note: {remark}", file=sys.stderr)
    if progress and config.engine == "auto":
        print("engine: {} ({})".format(*engines.choose(config.engine, config.device)), file=sys.stderr)
    own: dict[str, Any] = {"dynamics": dynamics, "embedding": embedding}
    trainer = Trainer(config, splits, folder, **own, progress=progress, world=world, callbacks=callbacks)
    with ExitStack() as held:
        if folder is not None:
            _start(trainer, folder, resume, held)
        interrupted = not trainer.run()
        best = trainer.best_flow()
        report = None
        if evaluate and not interrupted:
            with evaluation.extra("the report", notes):
                report = evaluation.evaluate(best, splits, progress=progress, world=world)
                report.notes.extend(trainer.notes)
                if folder is not None and world.first:
                    with progress_bar(None, "report and pictures", unit="", show=progress, uncounted=True):
                        reports.write_report(folder, best, splits, report, trainer.history)
        if folder is not None and folder.model.exists() and world.first:
            with evaluation.extra("the model card", notes):
                cards.write_card(folder, best, splits, report, trainer.history)
        for note in notes if world.first else ():
            tqdm.write(note, file=sys.stderr)
    out = None if folder is None else folder.path
    return TrainingResult(best, trainer.history, report, config, out, interrupted, remarks + trainer.notes + notes)


def _start(trainer: Trainer, folder: RunFolder, resume: bool, held: ExitStack) -> None:
    """Takes up the run in the folder, or begins one; the folder is locked first, so that nobody else begins one."""

    def begun() -> bool:
        held.enter_context(folder.locked())
        _check_free(folder, resume)
        if there := folder.checkpoint.exists():
            return there
        folder.begin(trainer.config)
        return False

    if trainer.world.once(begun):
        trainer.resume()


def _with_options(solver: Mapping[str, Any]) -> dict[str, Any]:
    """A solver's settings, whose further keys are options of the solver itself."""
    if "name" not in solver:
        raise ConfigError(f"solver = {dict(solver)!r}: expected a mapping with the solver's 'name'")
    known = {f.name for f in fields(SolverConfig)}
    options = {key: value for key, value in solver.items() if key not in known}
    return {k: v for k, v in solver.items() if k in known} | ({"options": options} if options else {})


_MADE_FOR = {"digits": "digits", "mnist": "mnist-cpu", "cifar10": "finlay2020-cifar10"}


def _resolve(
    folder: RunFolder | None, resume: bool, preset: str | Config | None, given: Mapping[str, Any]
) -> tuple[Config, bool]:
    """The settings of a run: the stored ones for a resumed one, else preset and overrides.

    Returns:
        The settings, and whether they hold whatever the data turns out to be.
    """
    stored = folder.stored_config() if folder is not None else None
    if folder is not None:
        _check_free(folder, resume)
    if resume and folder is None:
        raise ConfigError("resume=True needs out=, the folder of the run")
    if folder is not None and folder.started and stored is None:
        raise CheckpointError(f"{folder.path} holds a run without its config.toml; it cannot be resumed")
    if resume and stored is not None:
        asked = _anchored(_preset(preset, stored).override(given))
        if changed := differences(lasting(stored), lasting(asked)):
            raise ConfigError(f"cannot resume with other settings ({'; '.join(changed)}); use another folder (out)")
        return asked, True
    if preset is None:
        name = str(given.get("data.name", ""))
        preset = "toy" if name in DENSITIES else _MADE_FOR.get(name)
    return _anchored(_preset(preset, Config()).override(given)), preset is not None


def _anchored(config: Config) -> Config:
    """The settings with absolute paths of what is there now: a run is used from other working folders too."""
    name, folder = config.data.name, config.data.dir
    places = {} if name in sources else {"data.name": name}
    places |= {"data.dir": folder} if folder is not None else {}
    found = {key: os.path.abspath(os.path.expanduser(path)) for key, path in places.items() if path}
    return config.override({key: path for key, path in found.items() if os.path.exists(path)})


def _check_free(folder: RunFolder, resume: bool) -> None:
    if folder.started and not resume:
        raise CheckpointError(f"{folder.path} already holds a run; pass resume=True (--resume) or another folder")


def _preset(preset: str | Config | None, otherwise: Config) -> Config:
    if isinstance(preset, Config):
        return preset
    return otherwise if preset is None else Config.preset(preset)
