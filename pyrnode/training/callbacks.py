"""Callbacks: what a user's own code is told while a flow trains, and what becomes of its errors."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyrnode.config import Config
from pyrnode.errors import ConfigError
from pyrnode.flow import Flow
from pyrnode.runs import Record, RunFolder

ASKED = 1
"""Says, where the number of a signal would stand, that a callback asked for the end; SIGINT and SIGTERM are greater."""


@dataclass(frozen=True)
class TrainingRun:
    """The run that callbacks are told of.

    Attributes:
        config: The resolved settings.
        out: Folder of the run; `None` if nothing is written.
        step: Optimiser steps done before: 0, or those of the run that is taken up.
        steps: Optimiser steps of the whole run; `None` where only time bounds it.
        flow: Makes a flow of its own with the best weights on validation so far, the present ones before the first.
        stop: Ends training before the next step, as if it were done: it is saved, and scored on the test set.
    """

    config: Config
    out: Path | None
    step: int
    steps: int | None
    flow: Callable[[], Flow]
    stop: Callable[[], None]


class Callback:
    """What is told how training goes; derive from it, and write the methods that you need.

    Of several processes only the first calls them. A record that they get is a copy, with ``step``, the number of
    optimiser steps done. They may draw random numbers: training does not use the global state. Training waits for them;
    their time counts in `minutes`, and not in a record's ``seconds``.

    An error that a method raises ends training: the state is saved as for Ctrl-C, no method but `on_end` is called any
    more, and `train` raises the error, in all processes, with a note that says which method it came from and how to go
    on. What `on_end` raises costs no result: it is said, and is in the result's notes.

    Example:
        >>> import pyrnode
        >>> class Losses(pyrnode.Callback):
        ...     def __init__(self):
        ...         self.losses = []
        ...
        ...     def on_step(self, record):
        ...         self.losses.append(record["loss"])
        >>> seen = Losses()
        >>> settings = {"max_steps": 3, "samples": 200, "evaluate": False, "progress": False}
        >>> result = pyrnode.train("moons", callbacks=seen, **settings)
        >>> len(seen.losses)
        3
    """

    def on_start(self, run: TrainingRun) -> None:
        """Training begins, or goes on after `run.step` steps; what was told of later steps is told again."""

    def on_step(self, record: Record) -> None:
        """After an optimiser step: ``loss``, ``nll``, ``bits``, ``E``, ``n``, ``nfe``, ``grad_norm``, ``seconds``."""

    def on_validation(self, record: Record) -> None:
        """After a validation: ``validation`` (nats per dimension), ``validation_bits``, ``disagreement``.

        A number that is not finite is left out.
        """

    def on_restart(self, record: Record) -> None:
        """Steps after ``record["step"]`` are undone, since one was not finite (``cause``), and are told again."""

    def on_end(self) -> None:
        """Training ends, however it does; called once for each `on_start`, before the test set is scored."""


_HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_"))


class Callbacks:
    """Several callbacks as one, whose errors are kept until the run is saved.

    Args:
        given: A `Callback`, or several.

    Attributes:
        failed: The error that a method raised, after which none is called.
        stopped: Whether one asked for the end.

    Raises:
        ConfigError: One is no `Callback`, or has a method ``on_…`` that nobody would call.
    """

    def __init__(self, given: Callback | Iterable[Callback] = ()) -> None:
        every = (given,) if isinstance(given, Callback) else given
        if not isinstance(every, Iterable):
            raise ConfigError(f"callbacks = {given!r}: expected a pyrnode.Callback, or several in a list")
        self._all = tuple(every)
        for one in self._all:
            _check(one)
        self._started: list[Callback] = []
        self.failed: Exception | None = None
        self.stopped = False

    def __iter__(self) -> Iterator[Callback]:
        return iter(self._all)

    @property
    def asked(self) -> int:
        """`ASKED` where training is to end, else 0."""
        return ASKED if self.stopped or self.failed is not None else 0

    def stop(self) -> None:
        """Asks for the end of training."""
        self.stopped = True

    def start(self, run: TrainingRun) -> None:
        """Tells all that training begins."""
        self.failed, self.stopped = None, False
        for one in self._all:
            if self.failed is None:
                self._started.append(one)  # one that fails half-way may have something to close, too
                self._call(one, "on_start", f"step {run.step}", run)

    def tell(self, hook: str, record: Record) -> None:
        """Calls that method of all, with copies of the record."""
        for one in self._all:
            self._call(one, hook, f"step {record['step']}", dict(record))

    def end(self) -> list[str]:
        """Tells all that were started that training has ended; returns what went wrong in that."""
        notes = list[str]()
        while self._started:
            one = self._started.pop()
            try:
                one.on_end()
            except Exception as error:  # the run is over, and what it found is whole
                notes.append(f"{_named(one)}.on_end failed: {type(error).__name__}: {error}")
        return notes

    def check(self, out: Path | None) -> None:
        """Raises the error that a method raised, if one did, with how to go on."""
        if self.failed is not None:
            saved = "nothing is saved, since out= was not given"
            if out is not None:
                saved = f"the run is saved in {out}, and goes on from there with resume=True"
            self.failed.add_note(saved)
            raise self.failed

    def _call(self, one: Callback, hook: str, where: str, argument: Any) -> None:
        if self.failed is None:
            try:
                getattr(one, hook)(argument)
            except Exception as error:  # whatever a user's code raises: the run is saved first
                error.add_note(f"raised by the callback {_named(one)}.{hook}, at {where}")
                self.failed = error


def _named(one: Callback) -> str:
    return type(one).__qualname__


def _check(one: object) -> None:
    """Raises `ConfigError` where it is no callback, or has a method that looks like one of ours and is none."""
    if isinstance(one, type) or not isinstance(one, Callback):
        hint = f": pass an object, {one.__qualname__}()" if isinstance(one, type) else ""
        raise ConfigError(f"callbacks: {one!r} is no pyrnode.Callback{hint}; derive your class from it")
    for name in dir(one):
        if name.startswith("on_") and name not in _HOOKS:
            close = difflib.get_close_matches(name, _HOOKS, n=1, cutoff=0.5)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(f"{_named(one)}.{name} is never called{hint}; there are {', '.join(_HOOKS)}")


class TensorBoard(Callback):
    """The metrics for TensorBoard: optimiser steps under ``train/``, validations under ``validation/``.

    The setting ``training.tensorboard = true`` adds one that writes to ``tensorboard/`` in the run's folder. A run that
    goes on, or back, hides what was written after the step that it starts from.

    Args:
        folder: Where to write.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        _summary_writer()
        self.folder: Path = Path(folder)
        self._writer: Any = None

    def on_start(self, run: TrainingRun) -> None:
        self._open(run.step)

    def on_step(self, record: Record) -> None:
        self._write("train", record)

    def on_validation(self, record: Record) -> None:
        self._write("validation", record)
        self._writer.flush()

    def on_restart(self, record: Record) -> None:
        self.on_end()
        self._open(record["step"])

    def on_end(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None  # so that it can be pickled, and used again

    def _open(self, step: int) -> None:
        self._writer = _summary_writer()(str(self.folder), purge_step=step + 1, flush_secs=5)

    def _write(self, group: str, record: Record) -> None:
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(f"{group}/{name}", value, record["step"])


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"pyrnode.TensorBoard (and training.tensorboard = true) needs: pip install tensorboard ({error})"
        ) from None
    return SummaryWriter


def boards_of(config: Config, folder: RunFolder | None, *, saved: bool) -> list[Callback]:
    """The callbacks that settings ask for; a `ConfigError` where what is to be written has no place, or cannot be."""
    boards = list[Callback]()
    if config.training.tensorboard:
        if folder is None:
            raise ConfigError("training.tensorboard = true needs out=, the folder to write to")
        boards.append(TensorBoard(folder.path / "tensorboard"))
    if config.training.snapshots and (folder is None or not saved):
        need = "pyrnode's own dynamics, and embeddings with a name: others are not saved"
        need = "out=, the folder to write to" if folder is None else need
        raise ConfigError(f"training.snapshots = true needs {need}")
    return boards
