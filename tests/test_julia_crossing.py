"""The Julia engine's crossing to a GPU, with memory that only says that it is a GPU's.

torch's tensors are the CPU's; their DLPack capsules say CUDA, and on Julia's side stand arrays over the same memory
that forbid what a GPU cannot do (``julia/crossing.jl`` in place of ``julia/bridge/RNODEBridgeCUDA.jl``, never run).
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyrnode import julia_setup
from pyrnode.config import SolverConfig
from pyrnode.dynamics import MLP, Dynamics, ModuleDynamics, Potential
from pyrnode.engines import TorchEngine
from tests.test_dynamics import perturbed
from tests.test_julia_engine import difference, outputs, solve

ROOT = Path(__file__).parents[1]

pytestmark = [pytest.mark.needs_julia, pytest.mark.slow]

SOLVERS = {
    "fixed": SolverConfig(sensealg="Backprop", step_size=0.25),
    "more steps": SolverConfig(sensealg="Backprop", step_size=0.0625),
    "adjoint": SolverConfig(sensealg="InterpolatingAdjoint", step_size=0.25),
    "adaptive": SolverConfig(name="Tsit5", sensealg="Backprop", rtol=1e-8, atol=1e-8),
}


class Own(nn.Module):
    """A module of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.layer(z)) * (1 + t)


def dynamics() -> dict[str, Dynamics]:
    torch.manual_seed(0)
    made = {"mlp": MLP(3, (5, 5)).double(), "potential": Potential(3, (5, 5)).double()}
    return {name: perturbed(one) for name, one in made.items()} | {"own": ModuleDynamics(Own(), (3,))}


def as_cuda(capsule: Any) -> Any:
    """The capsule, which says of its memory that it is CUDA's."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    ctypes.c_int32.from_address(pointer(capsule, b"dltensor") + 8).value = 2  # kDLCUDA
    return capsule


def cases() -> dict[str, dict[str, Any]]:
    """By dynamics and solver: the largest differences to torch's engine, and who read and waited how often."""
    import juliacall

    from pyrnode.engines import foreign, julia

    engine, shared, settled, found = julia.JuliaEngine(), julia._shared, list[str](), {}
    bridge = julia._start()
    juliacall.Main.include(str(ROOT / "tests" / "julia" / "crossing.jl"))
    counts = juliacall.Main.Crossing.counts
    julia._shared = lambda x: None if x is None else as_cuda(shared(x))
    julia.settle = lambda x: settled.append("engine")
    foreign.settle = lambda x: settled.append("module")
    refused = ""
    try:
        bridge.view_of(_opencl(shared(torch.ones(3))))
    except Exception as error:
        refused = str(error)
    for name, one in dynamics().items():
        for kind, solver in SOLVERS.items():
            if kind == "adaptive" and name != "mlp":
                continue
            expected = solve(TorchEngine(), one, SolverConfig(name="DP8", rtol=1e-12, atol=1e-12))
            if kind in ("fixed", "more steps"):
                expected = solve(TorchEngine(), one, solver)
            counts(), settled.clear()
            solution, bars = solve(engine, one, solver)
            reads, waits, wrapped = (int(n) for n in counts())
            found[f"{name} {kind}"] = {
                "solution": difference(outputs(solution), outputs(expected[0])),
                "gradient": difference(bars, expected[1]),
                "reads": reads,
                "waits": waits,
                "wrapped": wrapped,
                "settled": [settled.count("engine"), settled.count("module")],
                "nfe": [solution.stats.nfe, solution.stats.nfe_backward],
            }
    return found | {"refused": {"said": refused.splitlines()[0]}}


def _opencl(capsule: Any) -> Any:
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    ctypes.c_int32.from_address(pointer(as_cuda(capsule), b"dltensor") + 8).value = 4
    return capsule


def test_a_solve_over_memory_that_says_it_is_a_gpus() -> None:
    """The numbers are PyTorch's; of fixed steps the host reads what their number does not change; each side waits."""
    status = julia_setup.status()
    if "JLArrays" not in (Path(str(status.project)) / "Project.toml").read_text(encoding="utf-8"):
        pytest.skip("JLArrays, which stands for a GPU, is not in the Julia project")
    named = {"PYTHON_JULIACALL_EXE": str(status.executable), "PYTHON_JULIACALL_PROJECT": str(status.project)}
    code = "import json, tests.test_julia_crossing as crossing; print(json.dumps(crossing.cases()))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | named, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "memory of a device of kind 4: no package is loaded for it" in found.pop("refused")["said"]
    assert len(found) == 10
    for name, case in found.items():
        exact = "fixed" in name or "more steps" in name
        assert case["solution"] < (1e-12 if exact else 1e-3), name
        assert case["gradient"] < (1e-12 if exact else 1e-3), name
        assert case["wrapped"] > 5, name
        assert case["settled"][0] == 2, name  # before the solve, and before its pullback
        if not name.startswith("own"):
            assert case["waits"] == 2, name
            assert case["settled"][1] == 0, name
        else:  # each evaluation, and each pullback, is Python's: both sides wait before the other reads
            assert case["settled"][1] > case["nfe"][0], name
            assert case["waits"] > case["nfe"][0], name
    for name in ("mlp", "potential", "own"):
        assert found[f"{name} fixed"]["reads"] == found[f"{name} more steps"]["reads"] <= 3, name
