"""Solvers and sensitivity algorithms: their names, and which engine has which.

Names are DifferentialEquations.jl's and SciMLSensitivity's. The PyTorch engine has the explicit Runge-Kutta methods
whose coefficients stand in `METHODS`; a new one is one more entry. Adaptive coefficients that SciPy publishes
(BS3, DP5, DP8) are read from SciPy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pyrnode.config import SolverConfig
from pyrnode.errors import ConfigError, EngineUnavailableError, unknown_name


@dataclass(frozen=True)
class SolverInfo:
    """A solver of an engine, as ``pyrnode solvers`` lists it.

    Attributes:
        name: DifferentialEquations.jl's name.
        order: Order of convergence; 0 where it varies.
        kind: Explicit, stiff or stabilised; multistep; adaptive or of fixed step.
        package: Where it comes from.
        description: One line.
        fault: What is known to be wrong with it, in the library that it comes from; empty where nothing is.
    """

    name: str
    order: int
    kind: str
    package: str
    description: str
    fault: str = ""

    @property
    def use(self) -> str:
        """What one would take it for: the last of `USES` that it is of."""
        return [use for use, fits in USES.items() if fits(self)][-1]


USES: dict[str, Callable[[SolverInfo], bool]] = {
    "training on a grid of steps": lambda s: True,
    "steps of its own, loose tolerances (1e-3 and above)": lambda s: "adaptive" in s.kind,
    "steps of its own, middling tolerances": lambda s: "adaptive" in s.kind and s.order > 3,
    "steps of its own, tight tolerances (1e-7 and below)": lambda s: "adaptive" in s.kind and s.order > 6,
    "expensive dynamics: few evaluations a step": lambda s: "multistep" in s.kind,
    "mildly stiff dynamics of many dimensions": lambda s: s.kind.startswith("stabilised"),
    "stiff dynamics of few dimensions": lambda s: s.kind.startswith("stiff"),
    "dynamics that may become stiff": lambda s: s.kind.startswith("explicit or stiff"),
    "made for discretised PDEs (little memory, strong stability)": lambda s: (
        s.package.endswith(("LowStorageRK", "SSPRK")) or s.name.startswith("SSP")
    ),
    "known to be wrong: take another": lambda s: bool(s.fault),
}
"""What solvers are taken for, and which of them; a later one says more than an earlier one."""


@dataclass(frozen=True)
class Tableau:
    """Coefficients of an explicit Runge-Kutta method.

    Attributes:
        c: Nodes, one per stage.
        a: Rows of the coefficient matrix, each as long as its stage's index.
        b: Weights of the solution.
        e: Weights of the error estimate (solution minus embedded solution), one more than stages where it uses the
            derivative at the new point; `None` for a method without one.
        e3: Weights of a second, lower-order estimate (DP8 combines the two as in Hairer's code).
    """

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    e: tuple[float, ...] | None = None
    e3: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Method:
    """A solver of the PyTorch engine.

    Attributes:
        name: DifferentialEquations.jl's name.
        order: Order of convergence.
        description: One line for ``pyrnode solvers``.
    """

    name: str
    order: int
    description: str
    coefficients: Tableau | str

    @cached_property
    def tableau(self) -> Tableau:
        """The coefficients; those that SciPy holds are read on first use."""
        if isinstance(self.coefficients, Tableau):
            return self.coefficients
        import scipy.integrate

        return _from_scipy(getattr(scipy.integrate, self.coefficients))

    @property
    def adaptive(self) -> bool:
        """Whether the method chooses its own steps."""
        return isinstance(self.coefficients, str) or self.coefficients.e is not None

    @property
    def info(self) -> SolverInfo:
        """Its line in a list of solvers."""
        kind = "explicit, adaptive" if self.adaptive else "explicit, fixed step"
        return SolverInfo(self.name, self.order, kind, "pyrnode", self.description)


def _from_scipy(solver: Any) -> Tableau:
    stages = len(solver.B)
    rows = tuple(tuple(float(x) for x in solver.A[i][:i]) for i in range(stages))
    second = tuple(map(float, solver.E3)) if hasattr(solver, "E3") else None
    error = solver.E5 if second else solver.E
    return Tableau(tuple(map(float, solver.C)), rows, tuple(map(float, solver.B)), tuple(map(float, error)), second)


_TSIT5 = Tableau(
    c=(0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0),
    a=(
        (),
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
    ),
    b=(0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774),
    e=(
        -0.001780011052225777,
        -0.0008164344596567469,
        0.007880878010261995,
        -0.1447110071732629,
        0.5823571654525552,
        -0.45808210592918697,
        1 / 66,
    ),
)

METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("Euler", 1, "forward Euler", Tableau((0.0,), ((),), (1.0,))),
        Method("Midpoint", 2, "explicit midpoint", Tableau((0.0, 0.5), ((), (0.5,)), (0.0, 1.0))),
        Method("Heun", 2, "Heun's trapezoidal method", Tableau((0.0, 1.0), ((), (1.0,)), (0.5, 0.5))),
        Method(
            "SSPRK33",
            3,
            "strong-stability-preserving Runge-Kutta of Shu and Osher",
            Tableau((0.0, 1.0, 0.5), ((), (1.0,), (0.25, 0.25)), (1 / 6, 1 / 6, 2 / 3)),
        ),
        Method(
            "RK4",
            4,
            "the classical Runge-Kutta method (the paper's training solver)",
            Tableau((0.0, 0.5, 0.5, 1.0), ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
        ),
        Method("BS3", 3, "Bogacki-Shampine 3(2)", "RK23"),
        Method("DP5", 5, "Dormand-Prince 5(4) (the paper's evaluation solver)", "RK45"),
        Method("Tsit5", 5, "Tsitouras 5(4)", _TSIT5),
        Method("DP8", 8, "Hairer's 8(5,3) after Dormand and Prince", "DOP853"),
    )
}
"""The solvers of the PyTorch engine by name."""

SENSITIVITIES: dict[str, str] = {
    "Backprop": "discretise, then optimise: the exact gradient of the discrete solve",
    "BacksolveAdjoint": "solves the state backwards beside the adjoint: constant memory, an error of the solver's own",
}
"""The sensitivity algorithms of the PyTorch engine by name, with a line on each."""


def method(name: str) -> Method:
    """The method of that name.

    Raises:
        EngineUnavailableError: The PyTorch engine does not have it; the message lists what it has.
        ConfigError: It is ``"auto"``.
    """
    if name == "auto":
        raise ConfigError(
            "solver 'auto' is resolved by training alone, whose flow then has one: train, or name a solver"
        )
    if name not in METHODS:
        raise EngineUnavailableError(unknown_solver("PyTorch", name, METHODS))
    return METHODS[name]


ELSEWHERE: dict[str, str] = {
    **dict.fromkeys(("dopri5", "rk45", "ode45", "dormand_prince", "scipy", "scipy_solver"), "DP5"),
    **dict.fromkeys(("dopri8", "dop853", "ode78", "ode89"), "DP8"),
    **dict.fromkeys(("bosh3", "rk23", "ode23"), "BS3"),
    **dict.fromkeys(("explicit_adams", "implicit_adams", "fixed_adams", "ode113", "adams", "abm"), "VCABM"),
    **dict.fromkeys(("bdf", "cvode_bdf", "cvode", "vode", "zvode", "ode15s"), "FBDF"),
    **dict.fromkeys(("lsoda", "lsodar"), "AutoTsit5(Rosenbrock23)"),
    **{
        "radau": "RadauIIA5",
        "radau5": "RadauIIA5",
        "ode23s": "Rosenbrock23",
        "ode23t": "Trapezoid",
        "ode23tb": "TRBDF2",
    },
    **{
        "adaptive_heun": "Heun",
        "heun2": "Heun",
        "heun3": "SSPRK33",
        "fehlberg2": "BS3",
        "rk4_classic": "RK4",
        "tsit": "Tsit5",
    },
}
"""Names that torchdiffeq, SciPy, MATLAB and SUNDIALS have, in small letters, and what is nearest to them here."""


def unknown_solver(engine: str, name: str, known: Iterable[str], *, listing: str | None = None) -> str:
    """Message for a solver that an engine does not have; names of other libraries get ours.

    Args:
        engine: How the engine is called.
        name: What was asked for.
        known: The names that the engine has.
        listing: Where a reader finds them, if they are too many to say.
    """
    names, kind = sorted(known), f"solver of the {engine} engine"
    meant = ELSEWHERE.get(name.lower()) or next((other for other in names if other.lower() == name.lower()), None)
    if meant is None:
        return unknown_name(kind, name, names, listing=listing)
    there = "" if engine == "Julia" or meant in names else " of the Julia engine"
    listed = listing or "known: " + ", ".join(names)
    return f"unknown {kind} {name!r} (here it is {meant!r}{there}); {listed}"


def adaptive(solver: SolverConfig) -> bool:
    """Whether a solver of the PyTorch engine chooses its own steps."""
    return method(solver.name).adaptive and solver.adaptive


def step_size(solver: SolverConfig) -> float:
    """The step of a fixed-step solver; `ConfigError` where it is still to be found."""
    if isinstance(solver.step_size, str):
        raise ConfigError(
            "step_size = 'auto' is resolved by training alone (pyrnode.train, pyrnode train, RNODEDensity), whose flow "
            f"then has the step: train with it, or give a number, e.g. {{'name': {solver.name!r}, 'step_size': 0.25}}"
        )
    return solver.step_size


def fixed(solver: SolverConfig) -> bool:
    """Whether a solver of either engine is known to take steps of one size: of Julia's own it is not, unless told."""
    known = METHODS.get(solver.name)
    return not solver.adaptive or (known is not None and not known.adaptive)


def describe(solver: SolverConfig) -> str:
    """A solver with what determines its accuracy, in a few words."""
    if fixed(solver):
        return f"{solver.name} step {solver.step_size}"
    return f"{solver.name} rtol {solver.rtol:g} atol {solver.atol:g}"


def check_sensitivity(name: str) -> None:
    """Raises `EngineUnavailableError`, listing what there is, for a sensitivity that the PyTorch engine lacks."""
    if name not in SENSITIVITIES:
        raise EngineUnavailableError(unknown_name("sensitivity algorithm of the PyTorch engine", name, SENSITIVITIES))
