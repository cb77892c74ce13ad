"""Julia out of its system image: what comes compiled, and that its numbers are those of Julia without it.

The image is the one that `pyrnode install-julia` has built of the present sources; without one the tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyrnode import julia_image, julia_setup

pytestmark = [pytest.mark.needs_julia, pytest.mark.slow, pytest.mark.timeout(900)]

PROGRAM = """
import json, sys, time
import torch
from pyrnode.config import SolverConfig
from pyrnode.engines.julia import JuliaEngine, _start
from pyrnode.engines.julia_workload import cases
from pyrnode.probes import Probes

engine, wanted, found = JuliaEngine(), sys.argv[1:], {}
torch.manual_seed(0)
for case in cases():
    name = f"{case.solver.name} {case.solver.sensealg} {type(case.dynamics).__name__} {case.dtype}"
    if wanted and name not in wanted:
        continue
    generator = torch.Generator().manual_seed(1)
    dynamics = case.dynamics.to(case.dtype)
    with torch.no_grad():
        for p in dynamics.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    z0 = torch.randn(3, *dynamics.event_shape, generator=generator, dtype=case.dtype)
    c = torch.ones(3, dynamics.context_dim, dtype=case.dtype) if dynamics.context_dim else None
    s = engine.integrate(dynamics, z0, Probes.exact(z0), (0.0, 1.0), case.solver, context=c)
    gradient = torch.autograd.grad(s.z.sum() + s.l.sum() + s.E.sum() + s.n.sum(), list(dynamics.parameters()))
    numbers = torch.cat([s.z.flatten(), s.l, *(g.flatten() for g in gradient)]).double()
    found.setdefault("first", [time.process_time(), float(_start().compile_seconds())])
    found[name] = numbers.tolist()
import juliacall
found["image"], found["compiled"] = juliacall.CONFIG["opt_sysimage"], float(_start().compile_seconds())
print(json.dumps(found))
"""

USUAL = ["RK4 Backprop MLP torch.float32", "Tsit5 InterpolatingAdjoint MLP torch.float32"]


@pytest.fixture(scope="module")
def image() -> Path:
    path = julia_image.usable(julia_setup.require())
    if path is None:
        pytest.skip("there is no system image of the present sources; `pyrnode install-julia` builds it")
    return path


def run(*names: str, **variables: str) -> dict[str, Any]:
    command = [sys.executable, "-c", PROGRAM, *names]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def own_image() -> str:
    """The image that Julia comes with."""
    command = [str(julia_setup.require().executable), "-e", "print(unsafe_string(Base.JLOptions().image_file))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_first_gradient_compiles_next_to_nothing(image: Path) -> None:
    found = run(USUAL[0])
    assert found["image"] == str(image)
    seconds, compiled = found["first"]
    assert compiled < 1.0
    assert seconds < 10.0  # of the work of all threads, imports and all


def test_every_usual_solver_and_adjoint_comes_compiled(image: Path) -> None:
    found = run()
    assert found["image"] == str(image)
    assert found["compiled"] < 20.0  # each alone takes 2 to 20 s without


def test_its_numbers_are_those_of_julia_without_it(image: Path) -> None:
    found, without = run(*USUAL), run(*USUAL, PYTHON_JULIACALL_SYSIMAGE=own_image())
    assert found["image"] == str(image) != without["image"]
    for name in USUAL:
        assert found[name] == pytest.approx(without[name], rel=1e-5, abs=1e-6)
