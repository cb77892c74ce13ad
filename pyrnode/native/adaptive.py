"""The compiled solves of a multilayer perceptron (mlp.c) in which every sample chooses its own steps.

The accepted steps of a solve that is to be differentiated stay in memory of C's, until the solve is gone.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrnode.native.mlp import Directions, Network, Shared, blocks, doubles


@dataclass(frozen=True)
class Control:
    """A Runge-Kutta method with an error estimate, and what its steps are chosen by.

    Attributes:
        a, b, c: The tableau.
        e: Weights of the error estimate.
        e3: Weights of a second one, as Hairer's DOP853 has it; `None` for a method without.
        order: What the step is taken to the power -1/order of the error by.
        t_span: Start and end time.
        rtol, atol: Tolerances.
        controlled: How many of the integrals take part in the norm of the error.
        most: Bound on the steps that a sample attempts.
    """

    a: Sequence[Sequence[float]]
    b: Sequence[float]
    c: Sequence[float]
    e: Sequence[float]
    e3: Sequence[float] | None
    order: int
    t_span: tuple[float, float]
    rtol: float
    atol: float
    controlled: int
    most: int


class AdaptiveSolve(Network):
    """Forward and reverse solves by steps of each sample's own.

    Args:
        library, weights, activation: As of a `Network`.
        entries: How time enters the layers, ``(terms, Σ out)``: a bias b; with two terms also its weight v; with four
            the weight u and bias g of a gate too: ``a = s ⊙ (W h) + (b ⊙ s + t v)``, ``s = σ(t u + g)`` or 1.
        control: Method and tolerances.
        context: As of a `Network`; without a gate alone.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        weights: list[Tensor],
        entries: Tensor,
        activation: str,
        control: Control,
        context: Tensor | None = None,
    ) -> None:
        super().__init__(library, weights, activation, control.a, control.b, context)
        self.entries, self.control = entries.contiguous(), control
        self.counts = entries.new_empty(0, 2, dtype=torch.int64)
        self._ends: Tensor | None = None

    def forward(self, z0: Tensor, directions: Directions | None, *, record: bool) -> tuple[Tensor, Tensor] | None:
        """The state at the end time ``(batch, d)``, and l, E, n and 0 ``(batch, 4)`` (no columns without probes).

        `None` where a sample cannot begin, or does not arrive. The samples' attempted and accepted steps are then in
        `counts`, ``(batch, 2)``.

        Args:
            z0: State at the start, ``(batch, d)``.
            directions: Probes.
            record: Keep the accepted steps, which `backward` starts from.
        """
        z0 = z0.contiguous()
        z1, q = torch.empty_like(z0), z0.new_zeros(len(z0), 4 if directions else 0)
        first, rate, q_rate = z0.new_empty(len(z0), dtype=torch.float64), torch.empty_like(z0), z0.new_empty(len(z0), 4)
        counts, ends = (z0.new_empty(shape, dtype=torch.int64) for shape in ((len(z0), 2), (len(z0),)))
        shared = Shared()
        fields: dict[str, Any] = {
            "z0": z0,
            "z1": z1,
            "q": q,
            "first": first,
            "rate": rate,
            "q_rate": q_rate,
            "counts": counts,
        }
        fields |= {"ends": ends if record else None, "shared": ctypes.pointer(shared)}
        self._run("start", z0, directions, blocks(z0), self._fields | fields)
        if not math.isfinite(float(rate.sum() + q_rate.sum())):
            return None
        try:
            self._run("travel", z0, directions, blocks(z0), self._fields | fields)
        finally:
            if shared.chunks:
                weakref.finalize(self, self._discard, shared.chunks)
        if shared.failed:
            return None
        self.counts, self._ends = counts, ends
        return z1, q

    def backward(
        self, z1_bar: Tensor, q_bar: Tensor, directions: Directions | None
    ) -> tuple[Tensor, list[Tensor], Tensor, Tensor | None]:
        """Cotangents of start state, weights, entries and context, given those of `forward`'s results."""
        z1_bar, q_bar = z1_bar.contiguous(), q_bar.contiguous()
        z0_bar = torch.empty_like(z1_bar)
        ranking = torch.argsort(self.counts[:, 1], descending=True, stable=True)
        fields: dict[str, Any] = {
            "z1_bar": z1_bar,
            "q_bar": q_bar,
            "z0_bar": z0_bar,
            "ends": self._ends,
            "ranking": ranking,
        }
        fields |= {"shared": ctypes.pointer(Shared())}
        w_bars, bars, context_bar = self.pull("back", z1_bar, directions, self.entries.numel(), self._fields | fields)
        return z0_bar, w_bars, bars.view_as(self.entries), context_bar

    @property
    def _discard(self) -> Any:
        function = self.library.discard
        function.argtypes, function.restype = [ctypes.c_void_p], None
        return function

    @property
    def _fields(self) -> dict[str, Any]:
        control = self.control
        (t0, t1), size = control.t_span, len(control.b) + 1

        def estimate(e: Sequence[float]) -> ctypes.Array[ctypes.c_double]:
            return doubles([*e, *[0.0] * (size - len(e))])

        return {
            "c": doubles(control.c),
            "e": estimate(control.e),
            "e3": None if control.e3 is None else estimate(control.e3),
            "order": control.order,
            "t0": t0,
            "t1": t1,
            "rtol": control.rtol,
            "atol": control.atol,
            "controlled": control.controlled,
            "most": control.most,
            "terms": len(self.entries),
            "entries": self.entries,
        }
