"""The settings of the optimisation, a section of `pyrnode.Config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pyrnode.errors import ConfigError
from pyrnode.settings import Section, at_least

_STEPS = 4000
"""Optimiser steps of a run that nothing else bounds."""

ENDLESS = 2**53
"""Optimiser steps of a run that only time bounds."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Section):
    """The optimisation.

    Args:
        epochs: Passes over the training set; `None` sets no bound.
        max_steps: Stop after this many optimiser steps, whatever the epochs say. Where epochs, steps and minutes are
            all `None`, the number of samples decides (`total_steps`).
        batch_size: Samples per step.
        optimizer: ``"adam"``, ``"adamw"`` or ``"sgd"`` of `torch.optim`, or ``"soap"``, Adam in the eigenbases of the
            gradients' second moments (Vyas et al. 2024), which needs a fraction of the steps.
        learning_rate: Peak learning rate.
        schedule: After warm-up, ``"constant"`` or ``"cosine"`` (to zero at the last step).
        warmup_steps: Steps of linear warm-up.
        weight_decay: The optimiser's weight decay.
        clip_norm: Bound on the gradient's norm; `None` does not clip.
        ema: Decay of the averaged weights, which are then validated and saved; `None` averages nothing.
        minutes: Train for so long, validations included, or until epochs and steps are done. What comes of it depends
            on the machine's speed.
        tolerance: How far the training solver's log-densities may be from the accurate solver's, in nats per dimension,
            before training takes a finer step, or says that it cannot.
        validate_every: Validation interval in steps; 0 validates as often as costs a tenth of training.
        validation_limit: Validate on at most this many samples; `None` takes up to 2,000, fewer of many dimensions.
        patience: Stop after this many validations without improvement; `None` never stops early.
        checkpoint_every: Interval of checkpoints in steps; 0 leaves it to the time alone.
        checkpoint_minutes: A checkpoint is written at the latest so long after the last one, however long a step takes.
        snapshots: Keep the model of every validation, in ``snapshots/`` of the run's folder.
        tensorboard: Write the metrics for TensorBoard too, to ``tensorboard/`` in the run's folder.
        max_restarts: How often a non-finite step is answered by restoring the last good state and halving the
            solver's step before training gives up.
    """

    epochs: int | None = None
    max_steps: int | None = None
    batch_size: int = 200
    optimizer: Literal["adam", "adamw", "sgd", "soap"] = "adam"
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip_norm: float | None = None
    ema: float | None = None
    minutes: float | None = None
    tolerance: float = 0.01
    validate_every: int = 0
    validation_limit: int | None = None
    patience: int | None = None
    checkpoint_every: int = 0
    checkpoint_minutes: float = 2.0
    snapshots: bool = False
    tensorboard: bool = False
    max_restarts: int = 3

    def _validate(self) -> None:
        at_least(self, 1, "epochs", "max_steps", "batch_size", "patience", "validation_limit")
        at_least(self, 0, "learning_rate", "clip_norm", "minutes", "tolerance", "checkpoint_minutes", strict=True)
        at_least(self, 0, "warmup_steps", "weight_decay", "validate_every", "checkpoint_every", "max_restarts")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"ema = {self.ema!r}: expected a decay between 0 and 1")

    def steps_per_epoch(self, samples: int) -> int:
        """Optimiser steps of a pass over that many training samples; what does not fill a batch is left out."""
        return max(1, samples // self.batch_size)

    def total_steps(self, samples: int) -> int:
        """Optimiser steps of a whole run on that many training samples."""
        bounds = (
            [self.max_steps] if self.epochs is None else [self.epochs * self.steps_per_epoch(samples), self.max_steps]
        )
        given = [bound for bound in bounds if bound is not None]
        if given:
            return min(given)
        return ENDLESS if self.minutes is not None else _STEPS
