"""A training step of a potential flow beside OT-Flow's own code: loss, gradient, time and memory.

    git clone https://github.com/EmoryMLIP/OT-Flow theirs
    python -m benchmarks.otflow theirs [--cases toy table] [--repeats 5] [--memory auto store]

The folder has ``src/Phi.py`` and ``src/OTFlowProblem.py`` of OT-Flow (Onken et al. 2021), none of it ours. Both
sides have the same parameters, batch and steps of RK4. Their loss is ``alpha_1 L + alpha_2 C + alpha_3 R``, with
``L = E/2``, C the mean of ``-log p`` and R that of H; ours, in nats per dimension, is that over ``alpha_2 d`` where
``kinetic = alpha_1/(2 alpha_2)`` and ``hjb = alpha_3/alpha_2``. Loss and gradient are compared in double precision on
50 samples. Times are the processor's, in single precision, of steps in turn; memory is the growth of the resident set
over three steps, each side in a fresh process (Linux).
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.clock import peak_mib
from pyrnode.config import Config
from pyrnode.dynamics import Potential
from pyrnode.flow import Flow
from pyrnode.objective import objective
from pyrnode.probes import Probes


@dataclass(frozen=True)
class Case:
    """A network, the weights of the loss, and the size of a step."""

    d: int
    width: int
    layers: int
    alphas: tuple[float, float, float]
    steps: int
    batch: int


CASES = {
    "toy": Case(2, 32, 2, (1.0, 30.0, 1.0), 8, 512),
    "toy-5000": Case(2, 32, 2, (1.0, 30.0, 1.0), 8, 5000),
    "table": Case(10, 64, 2, (1.0, 100.0, 15.0), 6, 512),
    "miniboone": Case(43, 256, 2, (1.0, 100.0, 15.0), 6, 500),
}
"""OT-Flow's toy, at a tenth of its batch and at its own; a table; its MiniBooNE, at a quarter of its batch."""


class Theirs:
    """OT-Flow's network and objective, from a folder of its code.

    Raises:
        SystemExit: The folder does not hold it.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "src" / "OTFlowProblem.py").is_file():
            raise SystemExit(f"{folder} has no src/OTFlowProblem.py: clone https://github.com/EmoryMLIP/OT-Flow there")
        sys.path.insert(0, str(folder.resolve()))
        self.phi: Callable[..., Any] = importlib.import_module("src.Phi").Phi
        self.problem: Callable[..., Any] = importlib.import_module("src.OTFlowProblem").OTFlowProblem

    def network(self, case: Case, dtype: torch.dtype) -> Any:
        """Their network, a little beside where it begins, so that no gradient is a constant."""
        torch.manual_seed(0)
        network = self.phi(nTh=case.layers, m=case.width, d=case.d, alph=list(case.alphas))
        with torch.no_grad():
            network.w.weight.mul_(0.3).add_(0.1 * torch.randn_like(network.w.weight))
            network.c.weight.add_(0.1 * torch.randn_like(network.c.weight))
        return network.to(dtype)

    def step(self, network: nn.Module, case: Case, x: Tensor) -> Callable[[], float]:
        """A training step: loss and gradient."""

        def step() -> float:
            network.zero_grad(set_to_none=True)
            loss, _ = self.problem(x, network, [0, 1], nt=case.steps, stepper="rk4", alph=list(case.alphas))
            loss.backward()
            return float(loss.detach())

        return step


def ours(case: Case, network: Any, dtype: torch.dtype, memory: str = "auto") -> tuple[Flow, Config]:
    """A flow with the parameters of their network, and its settings."""
    transport, likelihood, equation = case.alphas
    config = Config().override(
        {
            "engine": "torch",
            "device": "cpu",
            "dtype": str(dtype).removeprefix("torch."),
            "network.kind": "potential",
            "hidden": [case.width] * case.layers,
            "activation": "logcosh",
            "standardize": "none",
            "solver.name": "RK4",
            "solver.step_size": 1 / case.steps,
            "solver.memory": memory,
            "kinetic": transport / (2 * likelihood),
            "jacobian": 0.0,
            "hjb": equation / likelihood,
        }
    )
    flow = Flow.build(config, (case.d,))
    with torch.no_grad():
        for own, given in zip(_in_order(flow), _theirs_in_order(network), strict=True):
            own.copy_(given)
    return flow, config


def _in_order(flow: Flow) -> list[Tensor]:
    own = flow.blocks[0].dynamics
    assert isinstance(own, Potential)
    return list(own.solved_parameters())


def _theirs_in_order(network: Any) -> list[Tensor]:
    """Their parameters in the order of `Potential.solved_parameters`; the constant of Φ has no gradient."""
    layers = [p for layer in network.N.layers for p in (layer.weight, layer.bias)]
    return [*layers, network.w.weight[0], network.A, network.c.weight[0]]


def our_step(flow: Flow, config: Config, x: Tensor) -> Callable[[], float]:
    """A training step: loss and gradient."""

    def step() -> float:
        flow.zero_grad(set_to_none=True)
        loss = objective(flow.solve(x, Probes.exact, config.solver, hjb=True), config.penalties).loss
        loss.backward()
        return float(loss.detach())

    return step


def agreement(theirs: Theirs, case: Case) -> tuple[float, float]:
    """Relative difference of the loss, and the largest of the gradient relative to its parameter's largest entry."""
    network = theirs.network(case, torch.double)
    flow, config = ours(case, network, torch.double)
    x = _data(case, 50, torch.double)
    their_loss, our_loss = theirs.step(network, case, x)(), our_step(flow, config, x)()
    scale, apart = case.alphas[1] * case.d, 0.0
    for own, given in zip(_in_order(flow), _gradients(network), strict=True):
        assert own.grad is not None
        apart = max(apart, float((scale * own.grad - given).abs().max() / given.abs().max()))
    return abs(scale * our_loss - their_loss) / abs(their_loss), apart


def _gradients(network: Any) -> list[Tensor]:
    layers = [p.grad for layer in network.N.layers for p in (layer.weight, layer.bias)]
    return [*layers, network.w.weight.grad[0], network.A.grad, network.c.weight.grad[0]]


def _data(case: Case, batch: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, case.d, generator=torch.Generator().manual_seed(1), dtype=torch.double).to(dtype)


def _steps(theirs: Theirs, case: Case, memories: list[str]) -> dict[str, Callable[[], float]]:
    network = theirs.network(case, torch.float32)
    x = _data(case, case.batch, torch.float32)
    steps = {"theirs": theirs.step(network, case, x)}
    return steps | {memory: our_step(*ours(case, network, torch.float32, memory), x) for memory in memories}


def milliseconds(steps: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """The processor's time of each step, taken in turn; the first turn does not count."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            begun = time.process_time()
            step()
            if turn:
                taken[name].append(1e3 * (time.process_time() - begun))
    return taken


def growth(step: Callable[[], float]) -> float:
    """Growth of the resident set over three steps, MiB; once in a fresh process."""
    before = peak_mib()
    for _ in range(3):
        step()
    return peak_mib() - before


def _in_fresh_process(folder: Path, case: str, side: str) -> float:
    command = [sys.executable, "-m", "benchmarks.otflow", str(folder), "--grown", case, side]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compare(folder: Path, theirs: Theirs, name: str, memories: list[str], repeats: int) -> None:
    """Prints the rows of a case."""
    case = CASES[name]
    loss, gradient = agreement(theirs, case)
    taken = milliseconds(_steps(theirs, case, memories), repeats)
    peak = {side: _in_fresh_process(folder, name, side) for side in ("theirs", *memories)}
    for memory in memories:
        ratios = sorted(a / b for a, b in zip(taken["theirs"], taken[memory], strict=True))
        times = f"{statistics.median(taken['theirs']):.0f} ms | {statistics.median(taken[memory]):.0f} ms"
        span = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"
        apart = f"{loss:.0e}, {gradient:.0e}"
        print(f"| {name} | {memory} | {apart} | {times} | {span} | {peak[memory]:.0f} vs {peak['theirs']:.0f} |")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="a training step beside OT-Flow's own code")
    parser.add_argument("folder", type=Path, help="OT-Flow's code, with src/ in it")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["toy", "toy-5000", "table"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", nargs="+", choices=["auto", "store", "checkpoint"], default=["auto", "store"])
    parser.add_argument("--grown", nargs=2, metavar=("CASE", "SIDE"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    theirs = Theirs(given.folder)
    if given.grown:
        name, side = given.grown
        sides = [] if side == "theirs" else [side]
        print(growth(_steps(theirs, CASES[name], sides)[side]))
        return
    print("| case | memory | loss, gradient off by | theirs | ours | ratio | peak memory, MiB, ours vs theirs |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in given.cases:
        compare(given.folder, theirs, name, given.memory, given.repeats)


if __name__ == "__main__":
    main()
