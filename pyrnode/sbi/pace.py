"""At what pace a flow learns in a loop that is not ours: the rate, its decay, and the average of the weights.

sbi's loop has one rate, made for splines, and no schedule. But Adam's step is its rate times a direction that does not
depend on the rate. So whoever has the weights before and after a step can lengthen or shorten it, and what follows is
what Adam would have done at another rate. `Pace` does so at the next gradient; while the flow is validated and used, it
has the average of its weights in their place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

USUAL = 5e-4
"""sbi's rate where nobody has asked for another, which is then taken as it is."""

PEAK = 1e-2
"""The rate that takes its place: that of the preset "table"."""

_WARMUP = 50
"""Steps in which the rate grows to its peak."""

_SHARE, _LONGEST = 9, 1000
"""The average is over the last ninth of the steps, and at most so many."""

_PATIENCE, _DECAY, _LOWEST = 3, 0.5, 0.01
"""After so many epochs without a better validation the rate is halved, down to that share. sbi ends after 20."""


_ROUNDED, _OTHER = 1e-3, 0.2
"""Lengths of first steps differ by less, for weights are rounded. Another rate differs by more: where a gradient hardly
changes, the next steps are nearly as long as the first."""


class Pace:
    """Rate and average of the weights of one module, which an optimiser steps that knows nothing of it.

    Attributes:
        steps: Steps of the optimiser that were seen.
        factor: How much longer they are made at the peak: `PEAK` / `USUAL`, or 1 for a rate that somebody has chosen.
        share: What decay has left of the rate.
    """

    def __init__(self) -> None:
        self.factor = 1.0
        self._rate: float | None = None
        self._asked = True  # whether the next step may be the first of an optimiser, of whichever rate
        self._begin()

    def _begin(self) -> None:
        self.steps, self.share = 0, 1.0
        self._trained, self._average = list[Tensor](), list[Tensor]()
        self._averaged = False  # whether the average is in the weights' place
        self._best, self._stale, self._losses = math.inf, 0, list[Tensor]()

    @torch.no_grad()
    def follow(self, module: nn.Module) -> None:
        """Lengthens or shortens the step that was made since the last call, if one was."""
        weights = _weights(module)
        if not self._trained or not _alike(self._trained, weights):
            self._begin()
            self._trained, self._average = ([w.clone() for w in weights] for _ in range(2))
            return
        steps = torch._foreach_sub(weights, self._trained)
        if not (longest := float(torch.stack(torch._foreach_norm(steps, math.inf)).max())):
            return
        if self._asked:
            self._recognise(_rate(steps), longest)
        self.steps += 1
        length = self.factor * self.share * min(1.0, self.steps / _WARMUP)
        torch._foreach_add_(self._trained, steps, alpha=length)
        torch._foreach_copy_(weights, self._trained)
        torch._foreach_lerp_(self._average, weights, 1 / min(_LONGEST, 1 + self.steps / _SHARE))

    def _recognise(self, rate: float | None, longest: float) -> None:
        """Takes note of the optimiser's rate: at its first step, and at that of one that a later round has made."""
        self._asked = False
        if self._rate is None:
            self._rate = rate or longest
        elif rate is not None and not math.isclose(rate, self._rate, rel_tol=_OTHER):
            self._rate = rate
        self.factor = PEAK / USUAL if math.isclose(self._rate, USUAL, rel_tol=0.02) else 1.0

    @torch.no_grad()
    def retreat(self, module: nn.Module) -> None:
        """Goes back to the average, at half the rate."""
        self.follow(module)
        torch._foreach_copy_(self._trained, self._average)
        torch._foreach_copy_(_weights(module), self._average)
        self.share *= _DECAY

    @torch.no_grad()
    def use(self, module: nn.Module) -> None:
        """Puts the average in the weights' place."""
        if self._averaged or not self._trained:
            return
        self.follow(module)
        torch._foreach_copy_(_weights(module), self._average)
        self._averaged, self._losses = True, []

    def validated(self, losses: Tensor) -> None:
        """Takes note of losses that were found with the average in place."""
        self._losses.append(losses.detach())

    @torch.no_grad()
    def resume(self, module: nn.Module) -> None:
        """Puts the weights back; if others were loaded meanwhile, everything begins again, with those."""
        self._asked = True
        if not self._averaged:
            return
        weights, self._averaged = _weights(module), False
        if not _alike(weights, self._average) or not all(map(torch.equal, weights, self._average)):
            self._begin()
            return
        torch._foreach_copy_(weights, self._trained)
        if self._losses:
            self._decay(float(torch.cat(self._losses).mean()))

    def _decay(self, loss: float) -> None:
        self._stale = 0 if loss < self._best else self._stale + 1
        self._best = min(self._best, loss)
        if self._stale == _PATIENCE:
            self._stale, self.share = 0, max(_LOWEST, _DECAY * self.share)


def _weights(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def _alike(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether they are as many, each of the same shape, device and type: somebody may freeze some between rounds."""
    one, other = ([(w.shape, w.device, w.dtype) for w in weights] for weights in (some, others))
    return one == other


def _rate(steps: Sequence[Tensor]) -> float | None:
    """The rate, where steps are the first of an Adam: then all are as long as it, but for those without a gradient."""
    lengths = torch.cat([step.flatten() for step in steps]).abs()
    lengths = lengths[lengths > 0]
    typical = lengths.median()
    alike = ((lengths - typical).abs() <= _ROUNDED * typical).double().mean()
    return float(typical) if float(alike) > 0.5 else None
