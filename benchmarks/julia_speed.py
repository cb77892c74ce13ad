"""Times a training step of the Julia engine beside the PyTorch engine, and beside the flows of Julia.

    python -m benchmarks.julia_speed              all of it, a table
    python -m benchmarks.julia_speed --json out.json

Between the engines steps alternate in one process: the same flow, batch, probes and RK4 grid of step 0.25, both with
``Backprop``, and Julia's default adjoint beside them. `peers.jl` does the same for DiffEqFlux's FFJORD layer and
ContinuousNormalizingFlows.jl (where the Julia environment has it), in one Julia process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed import Step, _milliseconds, _perturb
from pyrnode import julia_setup
from pyrnode.config import Config
from pyrnode.flow import Flow
from pyrnode.objective import objective
from pyrnode.runs import versions

CASES: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "mlp-512": (512, (2,), (64, 64, 64)),
    "conv-16": (16, (1, 28, 28), (16, 16, 16)),
}
SIDES = (("torch", "Backprop"), ("julia", "Backprop"), ("julia", "InterpolatingAdjoint"))
PAIRS = {"mlp-512": 60, "conv-16": 5}


def engine_step(case: str, engine: str, sensealg: str) -> Step:
    """A training step with one engine."""
    batch, shape, hidden = CASES[case]
    config = Config().override(
        {"engine": engine, "sensealg": sensealg, "flow.network.hidden": hidden, "standardize": False, "blocks": 1}
    )
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
    flow = Flow.build(config, shape)
    _perturb(flow)
    log_det = torch.zeros(batch)
    draw = flow.draw("hutchinson", generator=torch.Generator().manual_seed(2))

    def step() -> None:
        flow.zero_grad()
        objective(flow.solve(x, draw, config.solver), log_det, config.penalties).loss.backward()

    return step


def engines(case: str, pairs: int) -> dict[str, float]:
    """Median milliseconds of a step by side, the sides taken in turn."""
    steps = {" ".join(side): engine_step(case, *side) for side in SIDES}
    for step in steps.values():
        step()
        step()
    times: dict[str, list[float]] = {side: [] for side in steps}
    for _ in range(pairs):
        for side, step in steps.items():
            times[side].append(_milliseconds(step))
    return {side: statistics.median(values) for side, values in times.items()}


def crossing(case: str, repeats: int = 30) -> float:
    """Share of a step's time in the Julia engine that is not spent inside Julia's solves.

    What is above the engine (the loss, autograd, `zero_grad`) counts as outside too.
    """
    from pyrnode.engines import julia

    inside = 0.0
    call = julia._call

    def timed(function: Any, *args: Any) -> Any:
        nonlocal inside
        start = time.perf_counter()
        try:
            return call(function, *args)
        finally:
            inside += time.perf_counter() - start

    step = engine_step(case, "julia", "Backprop")
    step()
    julia._call = timed
    try:
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        total = time.perf_counter() - start
    finally:
        julia._call = call
    return 1 - inside / total


def first_gradient() -> float:
    """Seconds to the first gradient with Julia's default adjoint in a new process, Python's own imports included."""
    code = (
        "import torch; from benchmarks.julia_speed import engine_step; "
        "engine_step('mlp-512', 'julia', 'InterpolatingAdjoint')()"
    )
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def peers(pairs: int) -> dict[str, Any]:
    """`peers.jl`'s results, from the Julia and the project that the engine uses."""
    status = julia_setup.status()
    assert status.executable is not None
    assert status.project is not None
    paths = [str(julia_setup.sources()), "@", os.environ.get("PYRNODE_PEERS", ""), "@stdlib"]
    environment = os.environ | {"JULIA_LOAD_PATH": ":".join(filter(None, paths))}
    script = Path(__file__).with_name("peers.jl")
    command = [status.executable, f"--project={status.project}", "--threads", str(torch.get_num_threads()), str(script)]
    done = subprocess.run([*command, str(pairs)], check=True, env=environment, stdout=subprocess.PIPE, text=True)
    *notes, last = done.stdout.strip().splitlines()
    print("\n".join(notes), file=sys.stderr)
    result: dict[str, Any] = json.loads(last)
    return result


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results there")
    parser.add_argument("--pairs", type=int, help="steps of each side (default: by case)")
    args = parser.parse_args()
    julia_setup.require()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; Julia {julia_setup.status().version}")
    results: dict[str, Any] = {"first gradient, s": first_gradient()}
    print(f"first gradient in a new process: {results['first gradient, s']:.1f} s")
    for case in CASES:
        results[case] = engines(case, args.pairs or PAIRS[case])
        base = results[case]["torch Backprop"]
        for side, ms in results[case].items():
            print(f"{case:<10}{side:<28}{ms:>9.1f} ms{base / ms:>8.2f} times PyTorch's speed", flush=True)
        results[f"outside Julia, {case}"] = crossing(case)
        print(f"{case:<10}outside Julia's solves: {results[f'outside Julia, {case}']:.1%}")
    results["peers"] = peers(args.pairs or 15)
    ours = results["peers"]["milliseconds"]["RNODE"]
    for name, ms in sorted(results["peers"]["milliseconds"].items(), key=lambda item: item[1]):
        print(f"{'mlp-512':<10}{name:<28}{ms:>9.1f} ms{ms / ours:>8.2f} times RNODE's time")
    for name in ("step", "evaluation"):
        print(f"RNODE allocates {results['peers'][f'allocated_per_{name}']:,} bytes per {name}")
    if args.json:
        document = {"versions": versions(Config().override({"engine": "julia"})), "results": results}
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
