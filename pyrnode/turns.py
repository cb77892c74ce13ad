"""Samples with periodic columns, which stand for several values of a line each: their densities are sums over those."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from pyrnode.engines import Solution
from pyrnode.probes import Draw, Probes

LEAST = -1e30
"""A log-density at least, where shares are taken of it: of infinities they would be no numbers."""


def log_sum(each: Tensor) -> Tensor:
    """``log Σ exp`` of ``(turns, batch)`` over the turns; −inf where all are, with gradients of zero and not of NaN."""
    possible = each.detach().amax(0) > -math.inf
    return torch.where(possible, torch.where(possible, each, 0.0).logsumexp(0), -math.inf)


def means(solution: Solution, each: Tensor) -> Solution:
    """A block's solution with the integrals of samples: means over their turns, each with its share of the density.

    Args:
        solution: That of ``(turns * batch)`` values.
        each: Their log-densities ``(turns, batch)``.
    """
    share = torch.softmax(each.detach().clamp(min=LEAST), 0)
    integrals = {name: getattr(solution, name).unflatten(0, (len(each), -1)) for name in ("l", "E", "n", "D", "H")}
    return replace(solution, **{name: (share * values).sum(0) for name, values in integrals.items()})


def shared(draw: Draw, turns: int) -> Draw:
    """The same probes for all turns of a sample, of which `draw` gives those of the sample."""

    def probes(z: Tensor) -> Probes | None:
        found = draw(z[: z.shape[0] // turns])
        if found is None or found.axes:
            return found if found is None else Probes.exact(z)
        return found._replace(eps=found.eps.repeat(1, turns, *[1] * (z.ndim - 1)))

    return probes
