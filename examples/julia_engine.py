"""The Julia engine from Python: train with it, switch solvers, compare adjoints, and take the density to plain PyTorch.

    pyrnode install-julia           # once; `pyrnode doctor` says what is there
    python examples/julia_engine.py [--quick]

Trains the same 2-D density with several of OrdinaryDiffEq's solvers, prints what each costs and how far it is from the
truth; then differentiates one loss by every sensitivity algorithm, against PyTorch's gradient of an almost exact solve;
and shows that an exported module, which needs no Julia, gives the flow's numbers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import pairwise

import torch
from torch import Tensor

import pyrnode
from pyrnode import Flow, SolverConfig, TorchFlow
from pyrnode.engines import Engine, TorchEngine
from pyrnode.probes import Probes

LOOSE = {"rtol": 1e-3, "atol": 1e-3}
SOLVERS: dict[str, dict[str, object]] = {
    "RK4": {"step_size": 0.25},
    "Tsit5": {**LOOSE, "options": {"together": True}},  # the batch shares its steps: faster for small networks
    "VCABM": {**LOOSE, "options": {"together": True}},  # a multistep method
    "Vern7": {**LOOSE, "options": {"together": True, "lazy": False}},  # "lazy" is an option of the algorithm's own
}
ADJOINTS = ("Backprop", "InterpolatingAdjoint", "BacksolveAdjoint", "GaussAdjoint", "QuadratureAdjoint")


def train(name: str, steps: int) -> pyrnode.TrainingResult:
    """A ring of eight Gaussians, learned with Julia's solver `name` and, where there is one, its exact gradient."""
    settings = {f"solver.{key}": value for key, value in SOLVERS[name].items()}
    overrides = {"max_steps": steps, "validate_every": steps, "data.samples": 6000, **settings}
    sensealg = "InterpolatingAdjoint" if name == "VCABM" else "Backprop"  # Backprop takes Runge-Kutta methods
    return pyrnode.train("8gaussians", engine="julia", solver=name, sensealg=sensealg, progress=False, **overrides)


def gradient(engine: Engine, flow: Flow, y: Tensor, solver: SolverConfig) -> tuple[Tensor, float, float]:
    """Gradient of eq. 17 for the flow's one block, the seconds it took, and the evaluations of f backwards."""
    (block,) = flow.blocks
    started = time.perf_counter()
    solution = engine.integrate(block.dynamics, y, Probes.exact(y), (0.0, block.end_time), solver)
    log_prob = -0.5 * solution.z.square().sum(1) + solution.l
    loss = (-log_prob + 0.01 * (solution.E + solution.n)).mean()
    parts = torch.autograd.grad(loss, list(block.dynamics.parameters()))
    return torch.cat([p.flatten() for p in parts]), time.perf_counter() - started, solution.stats.nfe_backward


def compare_adjoints(flow: Flow, x: Tensor) -> dict[str, float]:
    """Relative errors of the adjoints' gradients with Tsit5, against a reference with tolerances of 1e-11."""
    flow = flow.double()
    y = flow.transform(x.double())[0]
    reference, _, _ = gradient(TorchEngine(), flow, y, SolverConfig(name="DP8", rtol=1e-11, atol=1e-11))
    errors = {}
    for name in ADJOINTS:
        solver = SolverConfig(name="Tsit5", rtol=1e-6, atol=1e-6, sensealg=name, options={"together": True})
        gradient(flow.engine, flow, y, solver)  # compiles
        found, seconds, evaluations = gradient(flow.engine, flow, y, solver)
        errors[name] = float((found - reference).norm() / reference.norm())
        milliseconds = 1e3 * seconds
        print(
            f"{name:<20} relative error {errors[name]:.1e}, {milliseconds:.0f} ms, {evaluations:.0f} evaluations back"
        )
    return errors


def main() -> dict[str, float]:
    """Returns the gaps (nats), the adjoints' relative errors, and the exported module's difference (nats)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps of two solvers only")
    quick = parser.parse_args().quick
    names = ("RK4", "VCABM") if quick else tuple(SOLVERS)
    values: dict[str, float] = {}
    for name in names:
        result = train(name, 30 if quick else 600)
        clock = [record["seconds"] for record in result.history if "nfe" in record]
        milliseconds = 1e3 * statistics.median(b - a for a, b in pairwise(clock))
        assert result.report is not None
        assert result.report.gap is not None
        values[f"gap {name}"] = result.report.gap
        print(f"{name:<8} gap to the truth {result.report.gap:.3f} nats, {milliseconds:.0f} ms a step")
        if name == "RK4":
            flow = result.flow

    x = flow.sample(200, seed=0)
    log_prob = flow.log_prob(x).detach()
    module: TorchFlow = flow.to_torch({"step_size": 0.05})
    values["module"] = float((module.log_prob(x).detach() - log_prob).abs().max())
    print(f"exported to PyTorch: log_prob at most {values['module']:.1e} nats from Julia's")
    values |= compare_adjoints(flow, x)
    return values


if __name__ == "__main__":
    main()
