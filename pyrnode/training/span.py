"""How long a run is, in steps or in minutes, how much of it is done, and when it is time to validate."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from pyrnode.optimisation import ENDLESS, TrainingConfig
from pyrnode.progress import progress_bar
from pyrnode.training.state import Progress

_SHARE, _BETWEEN = 0.1, 20
"""Validations may cost this share of training, unless their interval is given; steps between them at least."""


class Span:
    """The length of a run.

    Args:
        training: Settings.
        steps: Optimiser steps of the whole run; `ENDLESS` where only time bounds it.
    """

    def __init__(self, training: TrainingConfig, steps: int) -> None:
        self._training, self.steps = training, steps
        self._seconds = None if training.minutes is None else 60 * training.minutes

    def ended(self, progress: Progress) -> bool:
        """Whether all steps are done, or the time is up."""
        return progress.step >= self.steps or (self._seconds is not None and progress.elapsed >= self._seconds)

    def done(self, progress: Progress) -> float:
        """The share of the run after the warm-up that is done, by steps or by time."""
        warmup = self._training.warmup_steps
        by_steps = (progress.step - warmup) / max(1, self.steps - warmup)
        by_time = 0.0 if self._seconds is None else progress.elapsed / self._seconds
        return min(1.0, max(0.0, by_steps, by_time))

    def due(self, progress: Progress) -> bool:
        """Whether to validate now: at the end, and before it at the interval, or as often as costs little."""
        if self.ended(progress):
            return True
        if self._training.validate_every:
            return progress.step % self._training.validate_every == 0
        affordable = progress.checked + progress.checking <= _SHARE * progress.work
        return progress.step % _BETWEEN == 0 and affordable

    def count(self, progress: Progress) -> int:
        """What a bar counts: steps, or seconds where only time bounds the run."""
        return progress.step if self.steps < ENDLESS else int(progress.elapsed)

    def bar(self, progress: Progress, *, show: bool) -> AbstractContextManager[Any]:
        """A bar of the run."""
        total, unit = (self.steps, "step") if self.steps < ENDLESS else (int(self._seconds or 0), "s")
        return progress_bar(total, "train", unit=unit, show=show, initial=self.count(progress))
