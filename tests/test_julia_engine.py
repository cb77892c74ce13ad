"""The Julia engine beyond the contract: the bridge, every solver, and proof that the two engines are one."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pyrnode
from pyrnode import files, julia_setup
from pyrnode.composition import base_log_prob
from pyrnode.config import SolverConfig
from pyrnode.data.synthetic import DENSITIES
from pyrnode.dynamics import MLP, Dynamics, ModuleDynamics
from pyrnode.engines import Engine, Solution, TorchEngine
from pyrnode.errors import ConfigError, EngineUnavailableError
from pyrnode.probes import Probes
from pyrnode.solvers import METHODS
from tests.test_dynamics import CASES, EVENTS, make, perturbed
from tests.test_engine import Field, Linear, weighted_loss

pytestmark = pytest.mark.needs_julia

TORCH = TorchEngine()
TIGHT = SolverConfig(name="DP8", rtol=1e-12, atol=1e-12)
FIXED = [name for name, method in METHODS.items() if not method.adaptive]


def solve(engine: Engine, dynamics: Dynamics, solver: SolverConfig, batch: int = 4) -> tuple[Solution, list[Tensor]]:
    """A solve from a fixed start with fixed probes, and the gradients of a loss in which every output takes part."""
    generator = torch.Generator().manual_seed(3)
    dtype = next(dynamics.parameters()).dtype
    z0 = torch.randn(batch, *dynamics.event_shape, generator=generator, dtype=dtype).requires_grad_()
    probes = Probes.draw(z0.detach(), 2, generator=generator)
    solution = engine.integrate(dynamics, z0, probes, (0.0, 1.0), solver)
    return solution, list(torch.autograd.grad(weighted_loss(solution), [z0, *dynamics.parameters()]))


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest number of all."""
    a, b = (torch.cat([x.detach().flatten() for x in xs]) for xs in (found, expected))
    return float((a - b).abs().max() / b.abs().max())


def outputs(solution: Solution) -> list[Tensor]:
    return [solution.z, solution.l, solution.E, solution.n]


# -- the bridge ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 3, 4, 5)])
def test_arrays_cross_without_a_copy(julia_engine: Engine, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    from pyrnode.engines.julia import _bridge, _shared

    x = torch.randn(shape, dtype=dtype)
    assert _bridge().address(_shared(x)) == x.data_ptr()


def test_parameters_are_one_piece_of_memory(julia_engine: Engine) -> None:
    """Julia sees what optimisers and `load_state_dict` write; a copy or another precision is laid out anew."""
    from pyrnode.engines.julia import _bridge, _shared, flat_parameters

    def together(dynamics: Dynamics) -> Tensor:
        return torch.cat([p.detach().flatten() for p in dynamics.parameters()])

    dynamics = MLP(3, (4,)).requires_grad_()
    optimizer = torch.optim.Adam(dynamics.parameters(), lr=0.1)
    before, flat = together(dynamics).clone(), flat_parameters(list(dynamics.parameters()))
    address = next(dynamics.parameters()).data_ptr()
    assert torch.equal(flat, before)
    assert _bridge().address(_shared(flat)) == flat.data_ptr() == address
    for p in dynamics.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.allclose(flat, before - 0.1, rtol=0, atol=1e-6)
    dynamics.load_state_dict({name: torch.full_like(value, 2.0) for name, value in dynamics.state_dict().items()})
    assert torch.equal(flat, torch.full_like(flat, 2.0))
    assert flat_parameters(list(dynamics.parameters())).data_ptr() == address
    other = copy.deepcopy(dynamics)
    flat_parameters(list(other.parameters())).fill_(5.0)
    assert torch.equal(together(other), torch.full_like(flat, 5.0))
    assert torch.equal(flat, torch.full_like(flat, 2.0))
    double = flat_parameters(list(other.double().parameters()))
    assert double.dtype == torch.float64
    assert double.data_ptr() == next(other.parameters()).data_ptr()
    assert torch.equal(double, together(other))


def test_a_network_that_changes_is_described_anew(julia_engine: Engine) -> None:
    """Another activation, another precision, a weight turned over in its place: as in PyTorch, at once."""
    dynamics, solver = perturbed(MLP(3, (5, 5))), SolverConfig(sensealg="Backprop")

    def both() -> float:
        return difference(outputs(solve(julia_engine, dynamics, solver)[0]), outputs(solve(TORCH, dynamics, solver)[0]))

    assert both() < 1e-12
    dynamics.activation = "silu"
    assert both() < 1e-12
    square = next(p for p in dynamics.parameters() if p.ndim == 2 and p.shape[0] == p.shape[1])
    square.data = square.data.t()
    assert both() < 1e-12
    dynamics.float()
    assert both() < 1e-4


def test_a_capsule_is_read_once(julia_engine: Engine) -> None:
    from pyrnode.engines.julia import _bridge, _shared

    capsule = _shared(torch.ones(3))
    torch.utils.dlpack.from_dlpack(capsule)
    with pytest.raises(Exception, match="DLPack capsule that is used already"):
        _bridge().address(capsule)


PROGRAM = """
import {first}, json, os, sys
import {second}, torch
sys.path.insert(0, {root!r})
from pyrnode.composition import base_log_prob
from pyrnode.config import SolverConfig
from pyrnode.engines import TorchEngine
from pyrnode.probes import Probes
from pyrnode.engines.julia import JuliaEngine, _start
from pyrnode.dynamics import MLP

def numbers(engine):
    torch.manual_seed(0)
    dynamics, z0 = MLP(2, (8,)).double(), torch.randn(4, 2, dtype=torch.float64)
    for p in dynamics.parameters():
        torch.nn.init.normal_(p)
    probes = Probes(torch.ones(1, 4, 2, dtype=torch.float64), 1.0)
    solution = engine.integrate(dynamics, z0, probes, (0.0, 1.0), SolverConfig(sensealg="Backprop"))
    gradient = torch.autograd.grad(solution.z.square().sum() + solution.l.sum(), list(dynamics.parameters()))
    return torch.cat([solution.z.flatten(), solution.l, *(g.flatten() for g in gradient)]).detach()

error = float((numbers(JuliaEngine()) - numbers(TorchEngine())).abs().max())
variables = {{name: value for name, value in os.environ.items() if name.startswith("PYTHON_JULIACALL_")}}
said = {{"error": error, "version": str(_start().version()), "variables": variables}}
if {fork}:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            numbers(JuliaEngine())
            text = "no error"
        except Exception as exception:
            text = type(exception).__name__ + ": " + str(exception)
        os.write(writing, text.encode())
        os._exit(7)
    os.close(writing)
    said["forked"] = os.read(reading, 10_000).decode()
    said["code"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print("\\n" + json.dumps(said))
"""


def program(first: str, second: str, fork: bool = False, **variables: str) -> dict[str, Any]:
    """What a process of its own says, which imports the two in this order."""
    status = julia_setup.status()
    named = {"PYTHON_JULIACALL_EXE": str(status.executable), "PYTHON_JULIACALL_PROJECT": str(status.project)}
    code = PROGRAM.format(first=first, second=second, fork=fork, root=str(Path(__file__).parents[1]))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON_JULIACALL_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=inherited | named | variables, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def test_torch_first_and_a_forked_process() -> None:
    """The user's variables are kept; a forked process is refused rather than crashed."""
    said = program("torch", "math", fork=True, JULIA_NUM_THREADS="1", PYTHON_JULIACALL_HANDLE_SIGNALS="no")
    assert said["error"] < 1e-10
    assert said["version"].endswith("with 1 thread")
    assert said["variables"]["PYTHON_JULIACALL_HANDLE_SIGNALS"] == "no"
    assert said["variables"]["PYTHON_JULIACALL_STARTUP_FILE"] == "no"
    assert "PYTHON_JULIACALL_THREADS" not in said["variables"]
    assert said["forked"].startswith("EngineUnavailableError: ")
    assert "'spawn'" in said["forked"]
    assert said["code"] == 7


def test_juliacall_first() -> None:
    assert program("juliacall", "torch")["error"] < 1e-10


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "error", "message"),
    [
        (
            SolverConfig(name="Vern7", options={"lazi": False}),
            ConfigError,
            r"options given \(lazi\); its options are .*lazy",
        ),
        (
            SolverConfig(name="Vern7", options={"lazy": object()}),
            ConfigError,
            "expected a finite number, truth value, text",
        ),
        (SolverConfig(name="Euler", options={"adaptive": True}), ConfigError, "Euler has no error estimate"),
        (SolverConfig(name="Tsit4"), EngineUnavailableError, r"unknown solver .* 'Tsit4' \(did you mean 'Tsit5'\?\)"),
        (SolverConfig(name="Tsit5()"), EngineUnavailableError, "unknown solver"),
        (SolverConfig(name="rm"), EngineUnavailableError, "unknown solver"),
        (SolverConfig(sensealg="InterpolatingAdjoin"), EngineUnavailableError, "did you mean 'InterpolatingAdjoint'"),
        (
            SolverConfig(name="VCABM", sensealg="Backprop"),
            ConfigError,
            "Backprop needs an explicit Runge-Kutta method.*InterpolatingAdjoint, BacksolveAdjoint, QuadratureAdjoint",
        ),
    ],
)
def test_bad_settings_are_our_errors(
    julia_engine: Engine, solver: SolverConfig, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as failure:
        julia_engine.check(solver)
    assert "\n" not in str(failure.value)
    assert "Stacktrace" not in str(failure.value)


class _OwnError(Exception):
    pass


class Failing(nn.Module):
    """The user's own module, with a mistake in it that shows late."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.double))
        self.evaluations, self.last = 0, 10**9

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        self.evaluations += 1
        if self.evaluations > self.last:
            raise _OwnError(f"evaluation {self.evaluations}")
        return self.scale * z


@pytest.mark.parametrize("name", ["RK4", "Tsit5"])
@pytest.mark.parametrize("sensealg", ["Backprop", "InterpolatingAdjoint"])
def test_users_own_exception_comes_through(julia_engine: Engine, name: str, sensealg: str) -> None:
    module = Failing()
    dynamics, z0 = ModuleDynamics(module, (3,)), torch.ones(2, 3).double()
    solver = SolverConfig(name=name, sensealg=sensealg)
    module.evaluations, module.last = 0, 5
    with pytest.raises(_OwnError, match=r"^evaluation 6$"):
        julia_engine.integrate(dynamics, z0, None, (0.0, 1.0), solver)
    module.last = 10**9
    loss = julia_engine.integrate(dynamics, z0, None, (0.0, 1.0), solver).z.sum()
    module.evaluations, module.last = 0, 5
    with pytest.raises(_OwnError, match=r"^evaluation 6$"):
        loss.backward()


# -- Ctrl-C ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_training_with_a_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["train", "8gaussians", "--engine", "julia", "--preset", "toy", "--out", str(out), "--no-evaluation"]
    arguments += ["--set", "samples=600", "--set", "batch_size=32", "--set", "checkpoint_every=5", "--quiet"]
    command = [sys.executable, "-m", "pyrnode", *arguments]
    metrics = out / "metrics.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 200
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "--resume" in said
    done = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if "loss" in line]
    more = [*arguments, "--resume", "--set", f"max_steps={done[-1] + 2}"]
    again = subprocess.run([sys.executable, "-m", "pyrnode", *more], capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if "loss" in line]
    assert steps == list(range(1, done[-1] + 3))


LONG_SOLVE = """
import os, subprocess, sys
from dataclasses import replace
import pyrnode
from pyrnode.training import trainer
original = trainer.loss
def loss(flow, batch, config, solver, at):
    if at == 2:  # two steps are done
        solver = replace(solver, step_size=1e-6)
        subprocess.Popen(["sh", "-c", f"for i in 1 2; do sleep 1; kill -INT {os.getpid()}; done"])
    return original(flow, batch, config, solver, at)
trainer.loss = loss
settings = dict(preset="toy", engine="julia", samples=600, batch_size=32, max_steps=5, hidden=[8], blocks=1)
settings |= dict(solver={"name": "RK4", "step_size": 0.25}, evaluate=False, progress=False)
try:
    pyrnode.train("8gaussians", out=sys.argv[1], **settings)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_ctrl_c_twice_ends_a_long_solve_and_keeps_the_state_before_it(tmp_path: Path) -> None:
    """The third step's solve would take minutes: the second Ctrl-C ends it, and the run goes on from the second step.

    The signals come from outside, since Julia holds Python's lock, and no thread of the process's own would run.
    """
    out = tmp_path / "run"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", LONG_SOLVE, str(out)], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "interrupted"), done.stderr
    assert time.monotonic() - began < 290
    assert files.read(out / "checkpoint.safetensors", "checkpoint")[1]["progress"]["step"] == 2
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2]


# -- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sensealg", ["Backprop", "InterpolatingAdjoint"])
def test_backward_from_another_thread(julia_engine: Engine, sensealg: str) -> None:
    dynamics, z0 = make("mlp"), torch.ones(4, 3).double()
    solver = SolverConfig(sensealg=sensealg)
    gradients = []
    for apart in (False, True):
        loss = julia_engine.integrate(dynamics, z0, Probes.exact(z0), (0.0, 1.0), solver).z.sin().sum()
        dynamics.zero_grad()
        if apart:
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join(timeout=60)
            assert not thread.is_alive()
        else:
            loss.backward()
        gradients.append([p.grad for p in dynamics.parameters() if p.grad is not None])
    assert len(gradients[1]) == len(gradients[0]) > 0
    assert difference(gradients[1], gradients[0]) < 1e-14


# -- solvers ---------------------------------------------------------------------------------------------------------

# Name, settings, and the error to expect of z and l.
SOLVERS: list[tuple[str, dict[str, Any], float]] = [
    ("Euler", {"step_size": 1 / 128}, 2e-2),
    ("Midpoint", {"step_size": 1 / 32}, 1e-3),
    ("Heun", {"step_size": 1 / 32}, 1e-3),
    ("RK4", {"step_size": 1 / 16}, 2e-5),
    ("SSPRK33", {"step_size": 1 / 32}, 1e-4),
    ("CarpenterKennedy2N54", {"step_size": 1 / 16}, 1e-5),
    ("BS3", {}, 1e-5),
    ("DP5", {}, 1e-5),
    ("Tsit5", {}, 1e-5),
    ("Vern7", {"options": {"lazy": False}}, 1e-5),
    ("DP8", {}, 1e-5),
    ("VCABM", {}, 1e-5),
    ("Rosenbrock23", {}, 1e-4),
    ("Rodas5P", {}, 1e-5),
    ("ROCK2", {}, 1e-4),
    ("ROCK4", {}, 1e-4),
]
NO_TABLEAU = ("VCABM", "Rosenbrock23", "Rodas5P", "ROCK2", "ROCK4")


@pytest.mark.parametrize(("name", "settings", "bound"), SOLVERS, ids=[case[0] for case in SOLVERS])
def test_solver_agrees_and_trains(julia_engine: Engine, name: str, settings: dict[str, Any], bound: float) -> None:
    torch.manual_seed(0)
    dynamics = MLP(2, (8,), activation="tanh").double()
    with torch.no_grad():
        for p in dynamics.parameters():
            p.copy_(0.5 * torch.randn_like(p))
    z0 = DENSITIES["8gaussians"].sample(6, seed=0, dtype=torch.float64) / 2
    sensealg = "GaussAdjoint" if name in NO_TABLEAU else "Backprop"
    solver = SolverConfig(name=name, rtol=1e-6, atol=1e-6, sensealg=sensealg, **settings)
    probes = Probes.exact(z0)
    with torch.no_grad():
        exact = TORCH.integrate(dynamics, z0, probes, (0.0, 1.0), TIGHT)
        found = julia_engine.integrate(dynamics, z0, probes, (0.0, 1.0), solver)
    error = max(difference([a], [b]) for a, b in zip(outputs(found)[:2], outputs(exact)[:2], strict=True))
    assert error < bound
    optimizer = torch.optim.Adam(dynamics.parameters(), lr=0.02)
    losses = []
    for _ in range(4):
        solution = julia_engine.integrate(dynamics, z0, probes, (0.0, 1.0), solver)
        loss = -(base_log_prob(solution.z) + solution.l).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.02


# -- the engines are one ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "time", "activation"), CASES)
def test_every_network_is_the_same_in_both_engines(julia_engine: Engine, kind: str, time: str, activation: str) -> None:
    dynamics = make(kind, time, activation)
    solver = SolverConfig(step_size=0.3, sensealg="Backprop")
    (found, gradient), (expected, reference) = (solve(e, dynamics, solver) for e in (julia_engine, TORCH))
    assert difference(outputs(found), outputs(expected)) < 1e-10
    assert difference(gradient, reference) < 1e-8


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("kind", EVENTS)
def test_every_fixed_step_method_is_the_same_in_both_engines(julia_engine: Engine, kind: str, name: str) -> None:
    dynamics, solver = make(kind), SolverConfig(name=name, step_size=0.3, sensealg="Backprop")
    (found, gradient), (expected, reference) = (solve(e, dynamics, solver) for e in (julia_engine, TORCH))
    assert difference(outputs(found), outputs(expected)) < 1e-10
    assert difference(gradient, reference) < 1e-8


@pytest.mark.parametrize(
    ("sensealg", "memory"),
    [
        ("InterpolatingAdjoint", "auto"),
        ("InterpolatingAdjoint", "checkpoint"),
        ("BacksolveAdjoint", "auto"),
        ("QuadratureAdjoint", "auto"),
        ("GaussAdjoint", "auto"),
    ],
)
@pytest.mark.parametrize("kind", EVENTS)
def test_every_adjoint_gives_pytorchs_gradient(julia_engine: Engine, kind: str, sensealg: str, memory: Any) -> None:
    dynamics = make(kind)
    _, reference = solve(TORCH, dynamics, TIGHT)
    solver = SolverConfig(name="Tsit5", rtol=1e-9, atol=1e-9, sensealg=sensealg, memory=memory)
    _, gradient = solve(julia_engine, dynamics, solver)
    for found, expected in zip(gradient, reference, strict=True):
        assert difference([found], [expected]) < 1e-5


@pytest.mark.parametrize(
    ("name", "sensealg"), [("Euler", "InterpolatingAdjoint"), ("RK4", "InterpolatingAdjoint"), ("RK4", "GaussAdjoint")]
)
def test_checkpoints_keep_to_the_grid(julia_engine: Engine, name: str, sensealg: str) -> None:
    """What is solved again between checkpoints has the same fixed steps, and needs no estimate of their error."""
    dynamics, solver = make("mlp"), SolverConfig(name=name, step_size=0.125, sensealg=sensealg)
    kept = solve(julia_engine, dynamics, solver)[1]
    again = solve(julia_engine, dynamics, replace(solver, memory="checkpoint"))[1]
    assert difference(again, kept) < 1e-12


@pytest.mark.parametrize(("name", "stages"), [("RK4", 4), ("Heun", 2), ("Tsit5", 6)])
@pytest.mark.parametrize("kind", ["mlp", "conv", "module"])
def test_backprop_keeps_the_stages_of_fixed_steps(julia_engine: Engine, kind: str, name: str, stages: int) -> None:
    """No evaluation in the backward pass where all of it is kept; one for each pullback where only the states are."""
    gradients = []
    dynamics: Dynamics = ModuleDynamics(Field().double(), (3,)) if kind == "module" else make(kind)
    solver = SolverConfig(name=name, step_size=0.25, sensealg="Backprop", adaptive=False)
    kept, again = 4 * stages if kind == "module" else 0, 4 * (2 * stages - 1)
    for memory, evaluations in (("auto", kept), ("store", kept), ("checkpoint", again)):
        if memory == "store" and kind == "module":
            continue  # refused: test_storing_needs_an_explicit_product
        solution, gradient = solve(julia_engine, dynamics, replace(solver, memory=memory))
        assert solution.stats.nfe_backward == evaluations
        gradients.append(gradient)
    for gradient in gradients[:-1]:
        assert difference(gradient, gradients[-1]) < 1e-13


def test_large_evaluations_are_kept_only_when_asked(julia_engine: Engine) -> None:
    dynamics, evaluations = MLP(2), {}
    solver = SolverConfig(step_size=0.25, sensealg="Backprop")
    for batch, memory in ((512, "auto"), (1024, "auto"), (1024, "store")):  # 20 MB, and 40
        z0 = torch.randn(batch, 2, generator=torch.Generator().manual_seed(0))
        solution = julia_engine.integrate(
            dynamics, z0, Probes(z0[None], 1.0), (0.0, 1.0), replace(solver, memory=memory)
        )
        solution.l.sum().backward()
        evaluations[batch, memory] = solution.stats.nfe_backward
    assert evaluations == {(512, "auto"): 0, (1024, "auto"): 16, (1024, "store"): 0}


def test_closed_form_gradient_of_an_adjoint(julia_engine: Engine) -> None:
    """For f = Az the gradient of Σ z(1) with respect to z(0) is e^{Aᵀ}1, with PyTorch's engine out of it."""
    A = torch.tensor([[0.3, -0.9], [0.8, -0.2]], dtype=torch.double)
    z0 = torch.randn(3, 2, dtype=torch.double, requires_grad=True)
    solver = SolverConfig(name="Vern7", rtol=1e-10, atol=1e-10, sensealg="GaussAdjoint")
    solution = julia_engine.integrate(ModuleDynamics(Linear(A), (2,)), z0, None, (0.0, 1.0), solver)
    (gradient,) = torch.autograd.grad(solution.z.sum(), z0)
    assert torch.allclose(gradient, torch.matrix_exp(A.T).sum(1).expand(3, 2), rtol=0, atol=1e-7)


def losses(history: list[dict[str, Any]]) -> np.ndarray[Any, Any]:
    return np.array([record["loss"] for record in history if "loss" in record])


@pytest.mark.slow
def test_same_loss_curve_on_mnist(data_dir: Path) -> None:
    """200 steps from the same start, single precision; of Adam, which leaves rounding what it is."""
    settings: dict[str, Any] = {"data.dir": str(data_dir), "data.limit": 2000, "flow.network.hidden": [8]}
    settings |= {"training.optimizer": "adam"}
    settings |= {"training.batch_size": 16, "training.max_steps": 200, "training.validation_limit": 16}
    settings |= {"solver.sensealg": "Backprop", "solver.name": "RK4", "training.warmup_steps": 0}
    curves = []
    for engine in ("torch", "julia"):
        result = pyrnode.train("mnist", engine=engine, **settings, evaluate=False, progress=False)
        curves.append(losses(result.history))
    assert len(curves[0]) == len(curves[1]) == 200
    assert curves[0][-1] < 0.8 * curves[0][0]
    assert np.abs(curves[0] - curves[1]).max() < 1e-4


@pytest.mark.parametrize("first", ["torch", "julia"])
def test_run_of_one_engine_resumes_with_the_other(julia_engine: Engine, tmp_path: Path, first: str) -> None:
    second = {"torch": "julia", "julia": "torch"}[first]
    settings = {"flow.network.hidden": [8], "samples": 200, "batch_size": 20, "solver.sensealg": "Backprop"}

    def train(engine: str, steps: int, out: Path | None, resume: bool = False) -> np.ndarray[Any, Any]:
        overrides = settings | {"max_steps": steps, "schedule": "constant"}
        result = pyrnode.train(
            "8gaussians", engine=engine, out=out, resume=resume, **overrides, evaluate=False, progress=False
        )
        return losses(result.history)

    train(first, 10, tmp_path / "run")
    resumed = train(second, 20, tmp_path / "run", resume=True)
    assert np.abs(resumed - train(second, 20, None)).max() < 1e-5


@pytest.mark.parametrize("sensealg", ["Backprop", "InterpolatingAdjoint"])
@pytest.mark.parametrize("options", [{"save_everystep": False}, {"saveat": [0.3]}, {"dense": False}])
def test_what_is_saved_does_not_change_the_gradient(
    julia_engine: Engine, options: dict[str, Any], sensealg: str
) -> None:
    """The pullback reads the saved states; a path of the user's choosing in their place would be a wrong gradient."""
    found = []
    for given in ({}, options):
        dynamics, z0 = make("mlp"), torch.linspace(-1, 1, 9).double().reshape(3, 3)
        solver = SolverConfig(name="RK4", step_size=0.125, sensealg=sensealg, options=given)
        probes = Probes.draw(z0, 1, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            alone = julia_engine.integrate(dynamics, z0, probes, (0.0, 1.0), solver)
        solution = julia_engine.integrate(dynamics, z0, probes, (0.0, 1.0), solver)
        loss = solution.z.square().sum() + solution.l.sum() + solution.n.sum()
        gradients = torch.autograd.grad(loss, list(dynamics.parameters()))
        found.append([alone.z, solution.z.detach(), *gradients])
    for plain, saved in zip(*found, strict=True):
        assert torch.allclose(plain, saved, rtol=1e-12, atol=1e-12)
