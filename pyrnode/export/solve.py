"""How an exported flow integrates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pyrnode.errors import ConfigError
from pyrnode.solvers import method


@dataclass(frozen=True)
class Solve:
    """How the module integrates: along a fixed grid, or with steps that every sample chooses for itself.

    Args:
        name: Solver, under DifferentialEquations.jl's name; one of the PyTorch engine's.
        step_size: Step of the fixed grid in units of time; an adaptive solver's formula can be used along a grid too.
        rtol, atol: Tolerances of an adaptive solver.

    Raises:
        EngineUnavailableError: There is no such solver.
        ConfigError: Both a step and tolerances, or tolerances for a solver that has no error estimate.
    """

    name: str
    step_size: float | None = None
    rtol: float | None = None
    atol: float | None = None

    def __post_init__(self) -> None:
        adaptive = method(self.name).adaptive
        if (self.step_size is None) == (self.rtol is None) or (self.rtol is None) != (self.atol is None):
            raise ConfigError(
                f"step_size = {self.step_size!r}, rtol = {self.rtol!r}, atol = {self.atol!r}: give step_size (fixed "
                "steps), or rtol and perhaps atol (adaptive ones)"
            )
        for name in ("step_size", "rtol", "atol"):
            value = getattr(self, name)
            known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if value is not None and not (known and value > 0):
                raise ConfigError(f"{name} = {value!r}: expected a positive number")
        if self.rtol is not None and not adaptive:
            raise ConfigError(f"{self.name} has no error estimate, so rtol does not apply: give step_size, or use DP5")

    @property
    def fixed(self) -> bool:
        """Whether the steps are a fixed grid."""
        return self.step_size is not None

    def __str__(self) -> str:
        return f"{self.name}, step {self.step_size:g}" if self.step_size else f"{self.name}, rtol {self.rtol:g}"


def unexportable(solve: Solve) -> ConfigError:
    """The error for a solver whose steps depend on values, where only a fixed sequence of operations will do."""
    return ConfigError(
        f"{solve}: an adaptive solver's steps depend on the values, so it cannot be exported, compiled, or used under "
        "torch.func; use fixed steps, e.g. solver='RK4', step_size=0.05"
    )
