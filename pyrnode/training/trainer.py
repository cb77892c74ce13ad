"""The training loop: steps, validations, checkpoints, and what happens when a step goes wrong."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from pyrnode import files, solvers
from pyrnode.composition import Passage
from pyrnode.config import Config, SolverConfig
from pyrnode.data import Batch, Splits
from pyrnode.devices import resolve_device
from pyrnode.distributed import World, alone
from pyrnode.embedding import Given, check_dividable
from pyrnode.engines.base import check_potential
from pyrnode.errors import DataError, ProcessError, SolverError, TrainingDivergedError
from pyrnode.flow import Flow
from pyrnode.objective import Objective
from pyrnode.optimisation import ENDLESS
from pyrnode.runs import Record, RunFolder
from pyrnode.training.blueprint import UNSAVED, Blueprint
from pyrnode.training.callbacks import ASKED, Callback, Callbacks, TrainingRun, boards_of
from pyrnode.training.coarse import settled
from pyrnode.training.feed import Feed
from pyrnode.training.gradient import gradient
from pyrnode.training.journal import Journal, beside_the_bar, signals_call
from pyrnode.training.ladder import EVERY, Ladder, check_solvers
from pyrnode.training.origin import Origin
from pyrnode.training.span import Span
from pyrnode.training.state import NotFiniteError, Snapshot, State, Weights
from pyrnode.training.step import Order, clip, estimator, learning_rate, loss
from pyrnode.training.validation import Validation, price, wrong

_SAVED = 50
"""Steps between states to fall back to at least, unless an interval of checkpoints is given."""


class Trainer:
    """The training loop over one flow; `train` is the way to use it.

    Args:
        config: Settings.
        splits: Data.
        folder: Where to write; `None` writes nothing.
        dynamics: The user's own dynamics by event shape.
        embedding: The user's network between contexts and blocks.
        progress: Show a progress bar.
        world: The processes that train it together; the first of them writes and prints.
        callbacks: What is told how training goes, in the first process.
    """

    def __init__(
        self,
        config: Config,
        splits: Splits,
        folder: RunFolder | None,
        *,
        dynamics: Callable[[tuple[int, ...]], nn.Module] | None = None,
        embedding: Given | None = None,
        progress: bool = True,
        world: World = alone,
        callbacks: Callback | Iterable[Callback] = (),
    ) -> None:
        told = Callbacks(callbacks)
        self.blueprint = Blueprint(splits, dynamics, embedding)
        boards = boards_of(config, folder, saved=self.blueprint.saved)
        self.callbacks = Callbacks((*told, *boards)) if world.first else Callbacks()
        self.config, self.splits, self.folder, self.world = config, splits, folder, world
        self.progress = progress and world.first
        self.device = resolve_device(config.device)
        self.flow = self.blueprint.fitted(config, world).to(self.device)
        if world.size > 1:  # dynamics of the user's own, and another machine's algebra, may begin otherwise
            check_dividable(self.flow.embedding)
            self.flow.load_state_dict(world.once(lambda: {k: v.cpu() for k, v in self.flow.state_dict().items()}))
        self.state = State(self.flow, config.training)
        self.order = Order.of(len(splits.train), config.training.batch_size, config.seed, world)
        solver = config.solver.computing_in(world.once(lambda: settled(self.flow, config, self.order.here)))
        self.ladder = Ladder(solver, config.flow.end_time, config.training.tolerance)
        check_solvers(self.flow.engine, (self.solver, config.evaluation.solver), show=self.progress)
        if config.penalties.hjb:
            for block in self.flow.blocks:
                check_potential(block.dynamics)
        self._settled = replace(config, penalties=config.penalties.settled(len(splits.train), self.flow.dim))
        self.feed = Feed(self.flow, splits.train, self.order, workers=config.data.workers)
        self.span = Span(config.training, config.training.total_steps(len(splits.train)))
        self.validation = Validation(self.flow, splits.validation, config, world)
        self.gradient = gradient(world)
        self.journal = Journal(folder if world.first else None)
        self._price = price(estimator(self.flow, config.penalties), self.flow.dim)
        self._snapshot = self.state.capture()
        self._stop, self._enough, self._signals, self._saved = False, False, list[int](), 0.0
        unsaved = folder is not None and embedding is not None and not self.blueprint.saved
        self._late: list[str] = [UNSAVED] * unsaved
        self._begun_with: Origin | None = None
        self.say: Callable[[str], None] = lambda note: self._tell(f"note: {note}")
        list(map(self.say, self._late))

    @property
    def solver(self) -> SolverConfig:
        """The training solver at its present refinement."""
        return self.ladder[self.state.progress.refinement]

    @property
    def history(self) -> list[Record]:
        """A record for each step and validation so far."""
        return self.journal.history

    @property
    def finished(self) -> bool:
        """Whether all steps are done, the time is up, or validation has stopped improving."""
        patience, progress = self.config.training.patience, self.state.progress
        return self.span.ended(progress) or (patience is not None and progress.stale >= patience)

    @property
    def notes(self) -> list[str]:
        """What is to be said of the run, though it succeeds."""
        return [record["note"] for record in self.history if "note" in record] + self._late

    def best_flow(self) -> Flow:
        """A flow with the weights that were best on validation, or the present ones before the first validation.

        Its settings hold the step that training arrived at, and the penalties that ``"auto"`` meant.
        """
        return self._flow_with(self.state.chosen())

    def _flow_with(self, weights: Weights) -> Flow:
        flow = self.blueprint.build(replace(self._settled, solver=self.solver))
        flow.load_state_dict(weights)
        return flow.to(self.device).eval()

    # -- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Trains to the end; returns False if Ctrl-C, or a signal that a handler of the caller's took, came before.

        What a callback raises is raised when the run is saved, in all processes.
        """
        done = self.state.progress
        self._signals.clear()
        self._enough = False
        if self.world.size > 1:
            self._origin()  # all of them, before the first alone writes it
        with (
            signals_call(self._stop_soon, self._signals),  # outermost: what it hands on may end the process
            self.span.bar(done, show=self.progress) as bar,
            self._telling(),
        ):
            self.validation.tick = lambda n: bar.set_description(f"validate {n}/{self.validation.size}", refresh=False)
            try:
                ended = self._loop(bar)
                self.world.once(partial(self.callbacks.check, None if self.folder is None else self.folder.path))
                return ended
            except ProcessError as error:
                if self._stop:  # the signal that follows would leave it unsaid
                    tqdm.write(str(error), file=sys.stderr)
                raise

    def _loop(self, bar: Any) -> bool:
        clock = mark = time.perf_counter()
        first = self.state.progress.step
        batches = self._batches()
        while not (self.finished or self._enough):
            try:
                if self.state.progress.step == 0:
                    self._adjust(down=False)  # dynamics of the user's own may begin anywhere
                record = self._step(next(batches))
                if record is None:
                    return not self._stop
                progress, now = self.state.progress, time.perf_counter()
                seconds, elapsed = self.gradient.spent(now - clock, now - mark)
                progress.seconds, progress.elapsed, mark = progress.seconds + seconds, progress.elapsed + elapsed, now
                self.journal.log(record := {**record, "seconds": round(progress.seconds, 3)})
                self.callbacks.tell("on_step", record)
                self._show(bar, record, seconds, at_once=progress.step <= first + 3)  # the time left
                if progress.step % EVERY == 0:
                    self._adjust(down=True)
                if self.span.due(progress):
                    bar.set_description("validate")
                    self._validate()
                if self.finished:
                    bar.set_description("save")
                    self._save()
                bar.set_description("train", refresh=False)
                clock = time.perf_counter()
            except (SolverError, NotFiniteError) as error:
                self._recover(error)
                batches = self._batches()
                bar.n, clock = self.span.count(self.state.progress), time.perf_counter()
        self._stop_all(max(self.world.gathered(self._asked)))
        return not self._stop

    def _show(self, bar: Any, record: Record, seconds: float, *, at_once: bool) -> None:
        progress = self.state.progress
        bar.update(self.span.count(progress) - bar.n)
        discrete = self.splits.levels is not None
        shown = beside_the_bar(record, best=progress.best, dim=self.flow.dim, discrete=discrete)
        if self.world.size > 1 and seconds > 0:
            shown["samples/s"] = f"{self.order.total / seconds:.0f}"  # of all processes together
        bar.set_postfix(shown, refresh=at_once)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Callbacks are told of the beginning and the end; what they raise at the beginning is raised at once."""
        steps = self.span.steps if self.span.steps < ENDLESS else None
        out = None if self.folder is None else self.folder.path
        run = TrainingRun(self.config, out, self.state.progress.step, steps, self.best_flow, self.callbacks.stop)
        try:
            self.callbacks.start(run)
            self.world.once(partial(self.callbacks.check, out))
            yield
        finally:
            for note in self.callbacks.end():
                self._late.append(note)
                self.say(note)

    def _batches(self) -> Iterator[Batch]:
        """Batches as the flow takes them, from the present step on."""
        return self.feed.batches(self.state.progress.step)

    def _step(self, batch: Batch) -> Record | None:
        """One optimiser step; `None` if Ctrl-C or a callback asked to end here.

        A state is saved only when its next loss and gradient have turned out finite, so that what training falls back
        to, or resumes from, is never a state that has already failed.
        """
        step, training, state = self.state.progress.step, self.config.training, self.state
        state.begin()

        def compute() -> tuple[Objective, Passage]:
            return loss(self.flow, batch, self._settled, self.solver, step)

        try:
            taken = self.gradient.take(self.flow, batch, compute, state.optimizer, self._asked)
        except KeyboardInterrupt:  # the second time, in the midst of a solve: nothing of this step has been applied
            self._save()
            raise
        rate = learning_rate(training, step, self.span.done(state.progress))
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        if training.clip_norm is not None:
            clip(self.flow, taken.norm, training.clip_norm)
        self._stop_all(taken.stop)
        if (ends := self._stop or self._enough) or self._due(step):
            if ends or self._overdue or training.checkpoint_every:
                self._save()
            else:
                self._snapshot = self._good()
            if ends:
                return None
        state.take()
        state.progress.step = step + 1
        state.progress.work += batch.total * self._price * (taken.nfe + 2 * taken.nfe_backward)
        state.add_to_average(step)
        return {
            "step": step + 1,
            "epoch": step // self.order.steps_per_epoch,
            "loss": taken.loss,
            "nll": taken.nll,
            "bits": taken.nll / math.log(2),
            "E": taken.E,
            "n": taken.n,
            "nfe": taken.nfe,
            "nfe_backward": taken.nfe_backward,
            "grad_norm": taken.length,
            "learning_rate": rate,
            **({"H": taken.H} if self.config.penalties.hjb else {}),
        }

    def _due(self, step: int) -> bool:
        """Whether to keep the state: at an interval in steps, or when too much time has gone by to lose."""
        every = self.config.training.checkpoint_every or max(_SAVED, self.order.steps_per_epoch)
        return step > 0 and (step % every == 0 or self._overdue)

    @property
    def _overdue(self) -> bool:
        """Whether the last checkpoint is as old as one may be."""
        return self.state.progress.elapsed - self._saved >= 60 * self.config.training.checkpoint_minutes

    def _recover(self, error: Exception) -> None:
        """Back to the last good state, with half the solver's step; a bounded number of times."""
        good, now = self._snapshot.progress.step, self.state.progress
        cause = f"after step {now.step}: {error}"
        restarts, refinement = now.restarts + 1, now.refinement + 1
        if restarts > self.config.training.max_restarts:
            where = ""
            if self.folder is not None and good > 0:
                self.state.restore(self._snapshot)
                self.journal.rewind(good)
                self._write(self._snapshot)
                where = f" (the last good state, of step {good}, is in {self.folder.path})"
            raise TrainingDivergedError(
                f"{cause}. {restarts - 1} restarts with a smaller solver step did not help{where}; "
                "lower the learning_rate, clip the gradient (clip_norm), or raise the kinetic and jacobian penalties"
            ) from error
        self.state.restore(self._snapshot)
        self.journal.rewind(good)
        self.state.progress.restarts, self.state.progress.refinement = restarts, refinement
        record: Record = {"step": good, "event": "restart", "cause": cause, "refinement": refinement}
        self.journal.log(record)
        self.callbacks.tell("on_restart", record)
        self._write(self.state.capture())
        self._tell(f"{cause}\n  went back to step {good}, with half the solver's step ({restarts})")

    def _adjust(self, *, down: bool) -> None:
        """Takes a finer solver where the present one is wrong, or a cheaper one where that has long been right too."""
        if not self.ladder.moves:
            return
        progress, differ = self.state.progress, self.validation.differ
        before, calm = progress.refinement, 0
        at, found = self.ladder.climb(before, differ)
        if at == before and down:
            at, calm = self.ladder.descend(before, progress.calm, progress.restarts, differ)
        progress.calm = calm
        if at != before:
            progress.refinement = at
            solver, step = solvers.describe(self.solver), float(self.solver.step_size)
            record: Record = {"step": progress.step, "event": "solver", "solver": solver, "step_size": step}
            self.journal.log({**record, "disagreement": found})

    def _validate(self) -> None:
        """Scores the validation set with the accurate solver, the one in use, and the training solver against that."""
        state, progress, tolerance = self.state, self.state.progress, self.config.training.tolerance
        with state.averaged():
            found = self.validation.score(self.solver)
        progress.checked, progress.checking = progress.checked + found.cost, found.cost
        record: Record = {
            "step": progress.step,
            **found.record(),
            "step_size": float(self.solver.step_size),
            "seconds": round(progress.seconds, 3),
        }
        if not math.isfinite(found.value):
            record["event"] = "the accurate solver failed"
        better = found.value < progress.best
        progress.stale = 0 if better else progress.stale + 1
        if better:
            progress.best, progress.best_step = found.value, progress.step
            state.best = state.validated()
        if self.config.training.snapshots and self.folder is not None:
            self.world.once(partial(self._keep, self.folder.snapshot, progress.step))
        if found.disagreement > tolerance:
            if self.ladder.moves and progress.refinement < self.ladder.highest:
                progress.refinement, progress.calm = progress.refinement + 1, 0
            elif not self.notes:
                record["note"] = wrong(solvers.describe(self.solver), found.disagreement, progress.step, tolerance)
                self.say(record["note"])
        self.journal.log(record)
        self.callbacks.tell("on_validation", record)

    # -- files -------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Checkpoint and best model to the folder, and the state to fall back to."""
        self._write(self._good())

    def _good(self) -> Snapshot:
        """The present state, as one to fall back to."""
        snapshot = self.state.capture()
        snapshot.check()
        return snapshot

    def _write(self, snapshot: Snapshot) -> None:
        """Writes a state; the model comes first: after a kill between the two files, the resumed run writes both."""
        self._snapshot, self._saved = snapshot, snapshot.progress.elapsed
        if self.folder is not None:
            self.world.once(partial(self._write_to, self.folder, snapshot))

    def _write_to(self, folder: RunFolder, snapshot: Snapshot) -> None:
        self.journal.flush()
        if self.blueprint.saved:
            self.best_flow().save(folder.model)
        snapshot.write(folder.checkpoint, self._origin())

    def _keep(self, place: Callable[[int], Path], step: int) -> None:
        """Writes the model that is validated after that step."""
        self._flow_with(self.state.validated()).save(place(step))

    def resume(self) -> None:
        """Takes up the run in the folder where its last checkpoint left it.

        Raises:
            CheckpointError: The checkpoint is damaged, or of other settings, data or dynamics.
        """
        assert self.folder is not None
        path, folder = self.folder.checkpoint, self.folder
        snapshot, origin = self.world.once(lambda: Snapshot.read(path))
        here = self._origin()
        with files.converted(f"{path} is not a checkpoint of this run"):
            here.check(origin)
            snapshot.check()
            self.state.restore(snapshot)
        step, self._saved = self.state.progress.step, self.state.progress.elapsed
        self.journal.history = self.world.once(lambda: folder.rewind(step))
        self._snapshot = self.state.capture()
        if changed := self.world.once(lambda: folder.go_on(self.config)):
            self.journal.log({"step": step, "event": "resumed elsewhere", "changes": changed})
            self._tell(f"resumed, but from here on not bit for bit as begun: {'; '.join(changed)}")

    def _origin(self) -> Origin:
        """What the run began with, as its checkpoints say it; found by all processes, the first time.

        Raises:
            DataError: The processes have different data.
        """
        if self._begun_with is None:
            origins = self.world.gathered(lambda: Origin.of(self.config, self.splits))
            for number, other in enumerate(origins):
                if other.data != origins[0].data:
                    raise DataError(f"process {number} has other data than process 0: give all processes the same")
            self._begun_with = origins[0]
        return self._begun_with

    # -- being stopped -----------------------------------------------------------------------------------------------

    def _stop_soon(self) -> None:
        """Ends the loop after the present step; called for the second time, at once.

        Of several processes none ends without the others: a launcher hands on the Ctrl-C that they have had already,
        and ends by force what has not ended half a minute later.
        """
        if self._stop and self.world.size == 1:
            raise KeyboardInterrupt
        self._stop = True

    def _asked(self) -> int:
        """Number of the signal that this process was told to stop by, or `ASKED` by a callback; 0 without either."""
        return max(self._signals, default=signal.SIGINT) if self._stop else self.callbacks.asked

    def _stop_all(self, number: int) -> None:
        """Stops as the process does that was told to, if one was: with the same signal."""
        self._enough = self._enough or number == ASKED
        if number > ASKED and not self._stop:
            self._stop = True
            self._signals.append(number)

    def _tell(self, text: str) -> None:
        """A line for whoever watches."""
        if self.world.first:
            tqdm.write(text, file=sys.stderr)
