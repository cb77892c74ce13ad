"""The training solvers in the order of their cost, and when training goes up or down among them.

Each has half the step of the one before (an adaptive solver a tenth of its tolerances); where the solver is ``"auto"``,
the first is RK4, and the others have a formula of order five, which needs fewer evaluations as soon as one step is not
enough. A flow learns what its own
solver scores well, so a coarse one is right only as long as the trajectories are nearly straight, and training can bend
them until the score is the solver's alone. So training asks often whether a solve of a quarter of the step agrees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from pyrnode.config import SolverConfig
from pyrnode.engines import Engine
from pyrnode.progress import SECONDS, progress_bar

_HALVINGS = 6
"""How often the step is halved at most for the sake of the tolerance: 64 steps a block."""

EVERY = 25
"""Steps of the optimiser between two questions."""

_MARGIN, _CALM = 0.2, 8
"""A cheaper solver is taken when it has agreed to this share of the tolerance so many times in a row."""

Differ = Callable[[SolverConfig, SolverConfig], float]
"""How far two solvers' log-densities are apart, nats per dimension."""


def check_solvers(engine: Engine, solvers: Iterable[SolverConfig], *, show: bool) -> None:
    """Has the engine look at the solvers of a run before it begins, which starts Julia; a bar, if that takes long."""
    with progress_bar(None, "solvers", unit="", show=show, uncounted=True, delay=SECONDS):
        for solver in solvers:
            engine.check(solver)


class Ladder:
    """The solvers that a run may take.

    Args:
        solver: The solver of its settings.
        end_time: Integration time of a block.
        tolerance: How far log-densities may be from those of a finer solve, nats per dimension.

    Attributes:
        moves: Whether the step is training's to choose.
        highest: Up to where it goes for the sake of the tolerance.
    """

    def __init__(self, solver: SolverConfig, end_time: float, tolerance: float) -> None:
        self._solver, self._end_time, self.tolerance = solver, end_time, tolerance
        self.moves = solver.step_size == "auto"
        self._mixed = solver.name == "auto"
        self.highest = _HALVINGS + self._mixed

    def __getitem__(self, number: int) -> SolverConfig:
        """The solver of that number, from 0 on."""
        solver, halvings = self._solver, number
        if self._mixed and number == 0:
            solver = replace(solver, name="RK4")
        elif self._mixed:
            solver, halvings = replace(solver, name="DP5", adaptive=False), number - 1
        shrink = 0.1**halvings
        step = self._end_time if solver.step_size == "auto" else float(solver.step_size)
        step, rtol, atol = step * 0.5**halvings, solver.rtol * shrink, solver.atol * shrink
        return replace(solver, step_size=step, rtol=rtol, atol=atol)

    def climb(self, at: int, differ: Differ) -> tuple[int, float]:
        """The cheapest solver from `at` on that is right, or the finest; and how far it is from a quarter of its step.

        Args:
            at: Where training stands.
            differ: Measures it.
        """
        while (found := differ(self[at], self[at + 2])) > self.tolerance and at < self.highest:
            at += 1
        return at, found

    def descend(
        self, at: int, calm: int, lowest: int, differ: Callable[[SolverConfig, SolverConfig], float]
    ) -> tuple[int, int]:
        """One down, when the solver below has been right with a margin for a while; and for how long it has.

        Args:
            at: Where training stands.
            calm: How often in a row the solver below was right with a margin.
            lowest: What is not to be gone below.
            differ: As in `climb`.
        """
        if at <= lowest:
            return at, 0
        if differ(self[at - 1], self[at + 1]) > _MARGIN * self.tolerance:
            return at, 0
        return (at, calm + 1) if calm + 1 < _CALM else (at - 1, 0)
