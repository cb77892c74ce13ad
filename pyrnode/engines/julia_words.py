"""What Julia throws, and what its solvers do not take, in the words of both engines."""

from __future__ import annotations

import math
from dataclasses import fields

from pyrnode.config import SolverConfig
from pyrnode.engines.base import STUCK, not_finite_at_start, stuck, unstable
from pyrnode.engines.runge_kutta import grid
from pyrnode.errors import ConfigError, EngineError, SolverError

_SCIML = {"reltol": "rtol", "abstol": "atol", "dt": "step_size", "alg": "name"}
"""SciML's names of what are settings of a solver here."""


class JuliaFailure(Exception):
    """An exception of Julia's, told apart by kind; never leaves the engine.

    Of a solve that failed, it says SciML's return code, the time, how many samples of the batch are not finite, how
    many stopped, for how many the dynamics were not finite at the start, and whether it was the adjoint's solve.
    """

    def __init__(
        self,
        kind: str,
        status: str,
        message: str,
        time: float = 0.0,
        bad: int = 0,
        stopped: int = 0,
        batch: int = 0,
        at_start: int = 0,
        adjoint: bool = False,
    ) -> None:
        super().__init__(message)
        self.kind, self.status, self.time = kind, status, time
        self.bad, self.stopped, self.batch, self.at_start, self.adjoint = bad, stopped, batch, at_start, adjoint


def in_words(
    failure: JuliaFailure, solver: SolverConfig, t_span: tuple[float, float], *, adaptive: bool
) -> BaseException:
    """The error to raise for an exception in Julia.

    Args:
        failure: What Julia threw.
        solver: The solver's settings.
        t_span: Start and end time of the solve.
        adaptive: Whether it chose its steps.
    """
    if failure.kind == "interrupt":
        return KeyboardInterrupt()
    if failure.kind == "argument":
        return ConfigError(str(failure))
    if failure.kind != "solve":
        return EngineError(f"{solver.name} failed in Julia ({failure.status}): {failure}")
    if failure.at_start:
        return not_finite_at_start(t_span[0], failure.at_start, failure.batch)
    if not adaptive and failure.bad:
        steps = grid(t_span, float(solver.step_size))
        number = min(range(len(steps)), key=lambda i: abs(sum(steps[i]) - failure.time))
        return unstable(solver.name, number + 1, len(steps), *steps[number], failure.bad, failure.batch)
    return _stuck(failure, solver, adaptive=adaptive)


def _stuck(failure: JuliaFailure, solver: SolverConfig, *, adaptive: bool) -> SolverError:
    """The error of a solve that gave up, which names the option that made it."""
    why = STUCK.get(failure.status, f"the solver gave up with {failure.status}").format(maxiters=solver.maxiters)
    remedy = None
    if not adaptive:
        remedy = "try a smaller step_size, or another method"
    elif failure.status == "MaxIters" and "dtmax" in solver.options:
        why += f", and dtmax = {solver.options['dtmax']:g} allows no longer ones"
        remedy = "raise dtmax or maxiters"
    elif failure.status == "DtLessThanMin" and solver.options.get("dtmin"):
        why = f"the tolerances ask for steps shorter than dtmin = {solver.options['dtmin']:g}"
        remedy = "lower dtmin, loosen rtol/atol, or use a fixed step"
    if failure.adjoint:
        why = f"in the adjoint's solve, {why}"
    return stuck(failure.status, why, failure.time, failure.stopped, failure.batch, remedy=remedy)


def check_options(solver: SolverConfig) -> None:
    """Raises `ConfigError` for options that are settings of the solver, or that are nothing which options can be.

    Whether the solver has them, and takes such values, Julia knows (``julia/options.jl``).
    """
    settings = {f.name: f.name for f in fields(SolverConfig)} | _SCIML
    for name, value in solver.options.items():
        if name in settings and name != "adaptive":
            setting = settings[name]
            raise ConfigError(
                f"solver.options: {name} = {value!r} is no option but a setting; give it as solver.{setting}"
            )
        if not _plain(value):
            raise ConfigError(
                f"solver.options: {name} = {value!r}: expected a finite number, truth value, text, or a list of these"
            )


def _plain(value: object, *, nested: bool = False) -> bool:
    """Whether a value crosses to Julia as what it is."""
    if isinstance(value, list | tuple):
        return not nested and all(_plain(x, nested=True) for x in value)
    if isinstance(value, bool | str):
        return True
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return isinstance(value, float) and math.isfinite(value)
