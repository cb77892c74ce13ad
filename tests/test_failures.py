"""Solves that fail say why, in the same words in every engine: causes × engines × messages."""

from __future__ import annotations

import signal
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyrnode.config import SolverConfig
from pyrnode.dynamics import MLP, Dynamics, ModuleDynamics
from pyrnode.engines import Engine, create
from pyrnode.engines.julia_words import JuliaFailure, check_options, in_words
from pyrnode.errors import ConfigError, EngineError, EngineUnavailableError, SolverError
from pyrnode.probes import Probes
from pyrnode.solvers import ELSEWHERE, METHODS, unknown_solver

TOGETHER = {"together": True}
FINE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(params=["torch", pytest.param("julia", marks=pytest.mark.needs_julia)])
def engine(request: pytest.FixtureRequest) -> Engine:
    return create(request.param)


class Explosive(nn.Module):
    """``z' = z²``: reaches infinity at t = 1/z(0)."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return z * z


def network(value: float | None = None) -> MLP:
    """A perceptron in double precision, whose parameters may all be one number."""
    dynamics = MLP(2, (8,)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in dynamics.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) if value is None else torch.tensor(value))
    return dynamics


def integrate(engine: Engine, dynamics: Dynamics, solver: SolverConfig, batch: int, span: Any = (0.0, 1.0)) -> Any:
    z0 = torch.linspace(0.1, 0.9, 2 * batch, dtype=torch.float64).reshape(batch, 2)
    if isinstance(dynamics, ModuleDynamics):
        z0 = torch.tensor([[10.0], [0.1]], dtype=torch.float64)
    return engine.integrate(dynamics, z0, Probes.exact(z0) if isinstance(dynamics, MLP) else None, span, solver)


NAN, EXPLOSIVE = "parameters that are NaN", "dynamics that explode"
CAUSES: list[tuple[str, dict[str, Any], int, str, str, str]] = [
    # cause, solver, batch, engines, status, message
    (
        NAN,
        {"name": "DP5"},
        3,
        "torch julia",
        "Unstable",
        r"^the dynamics are not finite at t = 0 for 3 of 3 samples; look",
    ),
    (
        NAN,
        {"name": "DP5"},
        1,
        "torch julia",
        "Unstable",
        r"^the dynamics are not finite at t = 0 for 1 of 1 samples; look",
    ),
    (
        NAN,
        {"name": "DP5", "options": TOGETHER},
        3,
        "julia",
        "Unstable",
        r"not finite at t = 0 for 3 of 3 samples; look",
    ),
    (NAN, {"name": "VCABM"}, 3, "julia", "Unstable", r"not finite at t = 0 for 3 of 3 samples; look"),
    (NAN, {"name": "Rosenbrock23"}, 1, "julia", "Unstable", r"not finite at t = 0 for 1 of 1 samples; look"),
    (NAN, {}, 3, "torch julia", "Unstable", r"not finite after step 1 of 4 \(RK4, t = 0 to 0.25\) in 3 of 3 samples"),
    (NAN, {}, 1, "torch julia", "Unstable", r"not finite after step 1 of 4 \(RK4, t = 0 to 0.25\) in 1 of 1 samples"),
    (
        EXPLOSIVE,
        {"step_size": 0.1},
        2,
        "torch julia",
        "Unstable",
        r"after step \d+ of 10 \(RK4, t = .*in 1 of 2 samples",
    ),
    (
        EXPLOSIVE,
        {"name": "DP5"},
        2,
        "torch julia",
        "",
        r"1 of 2 samples stopped before the end time \(first at t = 0\.1",
    ),
    (EXPLOSIVE, {"name": "DP5", "options": TOGETHER}, 2, "julia", "", r" of 2 samples stopped .*\(first at t = 0\.1"),
    (
        "",
        {"name": "DP5", "maxiters": 3, **FINE},
        3,
        "torch julia",
        "MaxIters",
        r"^maxiters = 3 steps did not suffice: 3 of 3 samples stopped .*; loosen rtol/atol, raise maxiters",
    ),
    (
        "",
        {"name": "DP5", "maxiters": 3, **FINE, "options": TOGETHER},
        3,
        "julia",
        "MaxIters",
        r"^maxiters = 3 steps did not suffice: 3 of 3 samples stopped",
    ),
    (
        "",
        {"name": "DP5", "maxiters": 20, "options": {"dtmax": 1e-3}},
        3,
        "julia",
        "MaxIters",
        r"^maxiters = 20 steps did not suffice, and dtmax = 0\.001 allows no longer ones: .*; raise dtmax or maxiters",
    ),
    (
        "",
        {"name": "DP5", **FINE, "options": {"dtmin": 0.4}},
        3,
        "julia",
        "DtLessThanMin",
        r"^the tolerances ask for steps shorter than dtmin = 0\.4: 3 of 3 samples .*first at t = 0\); lower dtmin",
    ),
    (
        "",
        {"name": "DP5", **FINE, "options": {"dtmin": 0.4} | TOGETHER},
        3,
        "julia",
        "DtLessThanMin",
        r"^the tolerances ask for steps shorter than dtmin = 0\.4: 3 of 3 samples",
    ),
]


@pytest.mark.parametrize("case", CAUSES, ids=[f"{cause}-{i}" for i, (cause, *_) in enumerate(CAUSES)])
def test_a_failure_names_its_cause(engine: Engine, case: tuple[str, dict[str, Any], int, str, str, str]) -> None:
    cause, settings, batch, engines, status, message = case
    if engine.name not in engines:
        with pytest.raises((ConfigError, EngineUnavailableError)):  # what the other engine alone has, it says
            engine.check(SolverConfig(**settings))
        return
    dynamics: Dynamics = ModuleDynamics(Explosive(), (1,)) if cause == EXPLOSIVE else network()
    if cause == NAN:
        dynamics = network(float("nan"))
    with pytest.raises(SolverError, match=message) as failure:
        integrate(engine, dynamics, SolverConfig(**settings), batch)
    assert failure.value.status == (status or failure.value.status)
    assert failure.value.status in ("Unstable", "DtLessThanMin", "MaxIters", "DtNaN")


def test_a_failure_backwards_in_time_names_its_start(engine: Engine) -> None:
    with pytest.raises(SolverError, match=r"not finite at t = 1 for 2 of 2 samples"):
        integrate(engine, network(float("nan")), SolverConfig(name="DP5"), 2, (1.0, 0.0))


@pytest.mark.parametrize("sensealg", ["Backprop", "BacksolveAdjoint"])
def test_fixed_grids_have_no_maxiters(engine: Engine, sensealg: str) -> None:
    """They are as long as they are; forward, and back."""
    gradients = []
    for maxiters in (3, 10_000):
        dynamics = network()
        solver = SolverConfig(step_size=1 / 32, maxiters=maxiters, sensealg=sensealg)
        solution = integrate(engine, dynamics, solver, 3)
        assert solution.stats.accepted == 32
        gradients.append(torch.autograd.grad(solution.l.sum(), list(dynamics.parameters())))
    for few, many in zip(*gradients, strict=True):
        assert torch.equal(few, many)


def test_a_network_whose_sum_alone_overflows_is_finite(engine: Engine) -> None:
    """Each of 3 samples is finite in float32, and their sum is not."""
    z0 = torch.full((3, 1), 3e38)
    still = ModuleDynamics(Still(), (1,))
    assert torch.equal(engine.integrate(still, z0, None, (0.0, 1.0), SolverConfig()).z, z0)


class Still(nn.Module):
    """``z' = 0``."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return 0 * z


@pytest.mark.parametrize("sensealg", ["InterpolatingAdjoint", "BacksolveAdjoint", "GaussAdjoint", "QuadratureAdjoint"])
def test_an_adjoint_that_does_not_arrive_is_an_error(julia_engine: Engine, sensealg: str) -> None:
    """SciMLSensitivity takes the end of its solve for the start, whether it came so far or not: a wrong gradient."""
    dynamics = network()
    solver = SolverConfig(name="Tsit5", rtol=1e-6, atol=1e-6, sensealg=sensealg, options=TOGETHER)
    steps = integrate(julia_engine, dynamics, solver, 3).stats
    enough = int(steps.accepted + steps.rejected) + 1
    solution = integrate(julia_engine, dynamics, replace(solver, maxiters=enough), 3)
    with pytest.raises(
        SolverError, match=rf"^in the adjoint's solve, maxiters = {enough} steps did not suffice: 3 of 3"
    ):
        (1e6 * solution.n.square().sum()).backward()


# -- interruption ----------------------------------------------------------------------------------------------------


class _AlarmError(Exception):
    pass


def _alarm(number: int, frame: FrameType | None) -> None:
    raise _AlarmError


@pytest.fixture
def alarm() -> Any:
    """Sends a signal, which pytest's own limits do not use, after so many seconds of computing; and every two after.

    Python swallows what is thrown where it tidies up, in a weak reference's callback say, so that one signal can be
    lost: as one Ctrl-C can.
    """
    former = signal.signal(signal.SIGVTALRM, _alarm)
    yield lambda seconds: signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 2.0 if seconds else 0.0)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, former)


SWALLOWED = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")


@SWALLOWED
@pytest.mark.parametrize("options", [{}, {"adaptive": True, "dtmax": 1e-8}], ids=["together", "apart"])
def test_a_long_solve_hears_signals(julia_engine: Engine, alarm: Any, options: dict[str, Any]) -> None:
    """A hundred million steps, an hour's work, end where Python's handler throws; the engine works on."""
    dynamics, solver = network(), SolverConfig(step_size=1e-8, maxiters=10**9, options=options)
    julia_engine.check(solver)
    alarm(0.5)
    with torch.no_grad(), pytest.raises(_AlarmError):
        integrate(julia_engine, dynamics, solver, 3)
    alarm(0)
    found = integrate(julia_engine, dynamics, SolverConfig(), 3)
    expected = integrate(create("torch"), dynamics, SolverConfig(), 3)
    assert torch.allclose(found.z, expected.z, rtol=0, atol=1e-12)


@SWALLOWED
def test_a_long_pullback_hears_signals(julia_engine: Engine, alarm: Any) -> None:
    dynamics, solver = network(), SolverConfig(step_size=1e-5, sensealg="Backprop", memory="checkpoint")
    loss = integrate(julia_engine, dynamics, solver, 3).l.sum()
    alarm(0.02)
    with pytest.raises(_AlarmError):
        loss.backward()
    alarm(0)
    assert all(p.grad is None for p in dynamics.parameters())


# -- stiff solvers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "memory", "expected"),
    [
        ("RK4", "auto", "InterpolatingAdjoint"),
        ("Tsit5", "auto", "GaussAdjoint"),
        ("Tsit5", "checkpoint", "InterpolatingAdjoint"),
        ("VCABM", "auto", "InterpolatingAdjoint"),
        ("Rosenbrock23", "auto", "GaussAdjoint"),
        ("FBDF", "auto", "QuadratureAdjoint"),
    ],
)
def test_auto_is_the_adjoint_that_suits_the_solver(julia_engine: Engine, name: str, memory: str, expected: str) -> None:
    """Its gradient is that of the adjoint which is named, to the last bit, and right."""
    gradients = []
    precise = SolverConfig(name="DP5", rtol=1e-10, atol=1e-10, sensealg="Backprop")
    step = 0.02 if name == "RK4" else 0.25
    settings: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6, "step_size": step, "memory": memory}
    chosen = [SolverConfig(name=name, sensealg=sensealg, **settings) for sensealg in ("auto", expected)]
    for solver in (*chosen, precise):
        dynamics = network()
        solution = integrate(julia_engine, dynamics, solver, 2)
        gradients.append(
            torch.cat([g.ravel() for g in torch.autograd.grad(solution.l.sum(), [*dynamics.parameters()])])
        )
    auto, named, exact = gradients
    assert torch.equal(auto, named)
    assert float((auto - exact).norm() / exact.norm()) < 3e-5


@pytest.mark.parametrize("sensealg", ["InterpolatingAdjoint", "BacksolveAdjoint"])
def test_a_jacobian_over_the_parameters_is_refused(julia_engine: Engine, sensealg: str) -> None:
    """The issue's case: 64-64-64 took five gigabytes and did not end."""
    dynamics = MLP(2, (64, 64, 64))
    z0 = torch.zeros(2, 2)
    solver = SolverConfig(name="Rosenbrock23", sensealg=sensealg)
    message = (
        rf"{sensealg} with Rosenbrock23 takes a Jacobian.*which has the 8836 parameters in it; use .*'GaussAdjoint'"
    )
    with pytest.raises(ConfigError, match=message):
        julia_engine.integrate(dynamics, z0, Probes.exact(z0), (0.0, 1.0), solver)


def test_a_jacobian_over_a_whole_batch_is_refused(julia_engine: Engine) -> None:
    z0, solver = torch.zeros(2000, 2), SolverConfig(name="Rosenbrock23", options=TOGETHER)
    with torch.no_grad(), pytest.raises(ConfigError, match=r"over all 10000 numbers .*\(together = false\)"):
        julia_engine.integrate(MLP(2, (8,)), z0, Probes.exact(z0), (0.0, 1.0), solver)


# -- options ---------------------------------------------------------------------------------------------------------

OPTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("Tsit5", {"maxiters": 3}, r"maxiters = 3 is no option but a setting; give it as solver\.maxiters"),
    ("Tsit5", {"reltol": 1e-3}, r"reltol = 0\.001 is no option but a setting; give it as solver\.rtol"),
    ("RK4", {"dt": 0.1}, r"dt = 0\.1 is no option but a setting; give it as solver\.step_size"),
    ("Tsit5", {"sensealg": "Backprop"}, r"give it as solver\.sensealg"),
    ("Tsit5", {"x": None}, r"solver\.options: x = None: expected a finite number, truth value, text"),
    ("Tsit5", {"dtmax": float("nan")}, r"dtmax = nan: expected a finite number"),
    ("Tsit5", {"x": {"y": 1}}, r"solver\.options: x = {'y': 1}: expected"),
]
JULIA_OPTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("Tsit5", {"x": 1}, r"options given \(x\); its options are .*step_limiter!.*and of every solver's adaptive"),
    ("Tsit5", {"adaptive": "yes"}, r'option adaptive = "yes" of Tsit5: expected true or false'),
    ("Tsit5", {"together": 1}, r"option together = 1 of Tsit5: expected true or false"),
    ("Tsit5", {"dtmax": -1}, r"option dtmax = -1 of Tsit5: expected a positive number"),
    ("Tsit5", {"dtmax": 0}, r"option dtmax = 0 of Tsit5: expected a positive number"),
    ("Tsit5", {"dtmin": -0.1}, r"option dtmin = -0\.1 of Tsit5: expected a number that is not negative"),
    ("Tsit5", {"dtmin": 0.5, "dtmax": 0.1}, r"dtmin = 0\.5, dtmax = 0\.1: the smallest step is longer"),
    ("FBDF", {"max_order": 7}, r"option max_order = 7 of FBDF: expected a whole number from 1 to 5"),
    ("RadauIIA5", {"extrapolant": "x"}, r'option extrapolant = "x" .*: expected one of "constant", "linear", "dense"'),
    ("Rosenbrock23", {"linsolve": "KLU"}, r'option linsolve = "KLU" .*: expected an object of Julia\'s'),
    ("Tsit5", {"controller": "PI"}, r'option controller = "PI" .*: expected an object of Julia\'s'),
    ("KenCarp4", {"controller": "P"}, r'option controller = "P" .*: expected one of "PI", "Predictive", "Standard"'),
    ("Vern7", {"lazy": 0}, r"option lazy = 0 of Vern7: expected true or false"),
    ("SBDF", {}, r"SBDF cannot be made; it needs the option order"),
    ("AutoTsit5(Rosenbrock23)", {"x": 1}, r"options given \(x\); its options are dtfac, .*switch_max"),
]


@pytest.mark.parametrize(("name", "options", "message"), OPTIONS)
def test_options_that_are_none_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_options(SolverConfig(name=name, options=options))


@pytest.mark.parametrize(("name", "options", "message"), [*OPTIONS, *JULIA_OPTIONS])
def test_julia_names_the_option_and_what_it_takes(
    julia_engine: Engine, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as failure:
        julia_engine.check(SolverConfig(name=name, options=options))
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FBDF", {"max_order": 3}),
        ("RadauIIA5", {"extrapolant": "dense"}),
        ("KenCarp4", {"controller": "PI"}),
        ("QBDF2", {}),
        ("AutoTsit5(Rosenbrock23)", {}),
        ("AutoVern7(Rodas5P)", {"lazy": False, "stifftol": 0.8}),
    ],
)
def test_options_and_composites_that_julia_has(julia_engine: Engine, name: str, options: dict[str, Any]) -> None:
    """They solve what PyTorch solves."""
    z0 = torch.linspace(-0.5, 0.5, 6, dtype=torch.float64).reshape(3, 2)
    solver = SolverConfig(name=name, rtol=1e-6, atol=1e-6, options=options)
    with torch.no_grad():
        found = julia_engine.integrate(network(), z0, None, (0.0, 1.0), solver).z
        exact = create("torch").integrate(network(), z0, None, (0.0, 1.0), SolverConfig(name="DP8", rtol=1e-10)).z
    assert torch.allclose(found, exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("dopri5", "'DP5'"),
        ("RK45", "'DP5'"),
        ("ode45", "'DP5'"),
        ("DOP853", "'DP8'"),
        ("bosh3", "'BS3'"),
        ("scipy_solver", "'DP5'"),
        ("tsit5", "'Tsit5'"),
    ],
)
def test_names_of_other_libraries_get_ours(engine: Engine, name: str, meant: str) -> None:
    with pytest.raises(
        EngineUnavailableError, match=rf"unknown solver of the \w+ engine {name!r} \(here it is {meant}\)"
    ):
        engine.check(SolverConfig(name=name))


def test_names_that_the_other_engine_has() -> None:
    assert "(here it is 'AutoTsit5(Rosenbrock23)' of the Julia engine)" in unknown_solver("PyTorch", "lsoda", METHODS)
    assert "(here it is 'AutoTsit5(Rosenbrock23)')" in unknown_solver("Julia", "LSODA", ["RK4"])
    assert "did you mean 'Tsit5'" in unknown_solver("PyTorch", "Tsitt5", METHODS)


def test_every_hint_is_a_solver_that_there_is(julia_engine: Engine) -> None:
    for name in sorted(set(ELSEWHERE.values())):
        julia_engine.check(SolverConfig(name=name))


# -- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (JuliaFailure("interrupt", "", ""), KeyboardInterrupt, "^$"),
        (JuliaFailure("argument", "", "a shape"), ConfigError, "^a shape$"),
        (
            JuliaFailure("other", "LAPACKException", "singular"),
            EngineError,
            r"^RK4 failed in Julia \(LAPACKException\)",
        ),
        (
            JuliaFailure("solve", "ConvergenceFailure", "", 0.25, 0, 3, 3),
            SolverError,
            r"^the equations of an implicit step could not be solved: 3 of 3 .*t = 0\.25\); try a smaller step_size",
        ),
    ],
)
def test_what_julia_throws_in_words(failure: JuliaFailure, error: type[BaseException], message: str) -> None:
    found = in_words(failure, SolverConfig(), (0.0, 1.0), adaptive=False)
    assert type(found) is error
    with pytest.raises(error, match=message):
        raise found
