"""Times a training step of the Julia engine beside the PyTorch engine, and beside the flows of Julia.

    python -m benchmarks.julia_speed              all of it, a table
    python -m benchmarks.julia_speed --json out.json --parts crossing peers --pairs 3

The engines take turns in one process: the same flow, batch, probes and RK4 grid of step 0.25, both with
``Backprop``, and Julia's default adjoint beside them. `peers.jl` does the same for DiffEqFlux's FFJORD layer and
ContinuousNormalizingFlows.jl (where the Julia environment has it), each in a Julia process of its own, which
is given up when a first step takes longer than ``--limit`` seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import records
from benchmarks.clock import Step, milliseconds
from benchmarks.speed import CPU, _perturb
from pyrnode import julia_setup
from pyrnode.config import Config, Divergence
from pyrnode.engines import Engine
from pyrnode.flow import Flow
from pyrnode.objective import objective

CASES: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "mlp-512": (512, (2,), (64, 64, 64)),
    "conv-16": (16, (1, 28, 28), (16, 16, 16)),
}
SIDES = {
    "torch Backprop": ("torch", "Backprop", "auto"),
    "julia Backprop": ("julia", "Backprop", "auto"),
    "julia Backprop, checkpoint": ("julia", "Backprop", "checkpoint"),
    "julia InterpolatingAdjoint": ("julia", "InterpolatingAdjoint", "auto"),
}
TURNS = {"mlp-512": 60, "conv-16": 5}
STEPS = {"mlp-512": 5, "conv-16": 1}
REPEATS = {"mlp-512": 30, "conv-16": 5}
PARTS = ("first", "engines", "crossing", "peers")
PEERS = ("tsit5-loose", "rk4-backsolve", "tsit5", "rk4", "icnf")


def engine_step(case: str, engine: str, sensealg: str, memory: str = "auto", *, instance: Engine | None = None) -> Step:
    """A training step with one engine, or with this instance of it."""
    batch, shape, hidden = CASES[case]
    config = Config().override(
        {
            "engine": engine,
            "sensealg": sensealg,
            "memory": memory,
            "flow.network.hidden": hidden,
            "standardize": "none",
            "step_size": 0.25,
            "blocks": 1,
        }
    )
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
    flow = Flow.build(config, shape)
    flow.engine = instance or flow.engine
    _perturb(flow)
    draw = flow.draw(Divergence("hutchinson"), torch.Generator().manual_seed(2))

    def step() -> None:
        flow.zero_grad()
        objective(flow.solve(x, draw, config.solver), config.penalties).loss.backward()

    return step


def engines(case: str, turns: int) -> dict[str, float]:
    """Median milliseconds of a step by side. In its turn a side takes some steps in a row, as in training.

    The first of them is not timed: the threads of the side before spin for some milliseconds until they rest.
    """
    steps = {side: engine_step(case, *how) for side, how in SIDES.items()}
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {side: [] for side in steps}
    for _ in range(turns):
        for side, step in steps.items():
            step()
            times[side] += [milliseconds(step, CPU) for _ in range(STEPS[case])]
    return {side: statistics.median(values) for side, values in times.items()}


@cache
def _timers() -> Any:
    """The bridge, with `crossing.jl` in it."""
    from pyrnode.engines import julia

    bridge = julia._start()
    bridge.include(str(Path(__file__).with_name("crossing.jl")))
    return bridge


def crossing(case: str, sensealg: str, repeats: int = 30) -> dict[str, float]:
    """Shares of the engine's time, forward and backward, that are not spent in Julia's solves and pullbacks themselves.

    ``"calls"`` is what the calls into Julia cost: their arguments, the views of the arrays, the copy of the results
    into torch's memory. ``"all"`` has the engine's Python too, with torch's own part in it: memory, views of the
    gradient, a node of autograd's graph. What is above the engine (the loss) does not count at all.
    """
    from pyrnode.engines import julia

    engine = julia.JuliaEngine()
    bridge = _timers()
    seconds = {"calls": 0.0, "all": 0.0}

    def timed(kind: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            result = work(*args, **keywords)
            seconds[kind] += time.perf_counter() - start
            return result

        return wrapped

    step = engine_step(case, "julia", sensealg, instance=engine)
    step()
    for network in engine._networks.values():
        network.handle = bridge.wrap(network.handle)
    with (
        mock.patch.object(engine, "integrate", timed("all", engine.integrate)),
        mock.patch.object(julia._Solve, "backward", timed("all", julia._Solve.backward)),
        mock.patch.object(julia, "_call", timed("calls", julia._call)),
    ):
        step()
        bridge.seconds_inside()
        seconds.update(calls=0.0, all=0.0)
        for _ in range(repeats):
            step()
    inside = float(bridge.seconds_inside())
    return {kind: (spent - inside) / seconds["all"] for kind, spent in seconds.items()}


def first_gradient() -> float:
    """Seconds to the first gradient with Julia's default adjoint in a new process, Python's own imports included."""
    code = (
        "import torch; from benchmarks.julia_speed import engine_step; "
        "engine_step('mlp-512', 'julia', 'InterpolatingAdjoint')()"
    )
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def peer(name: str, pairs: int, limit: float) -> dict[str, Any]:
    """`peers.jl`'s results for one peer, from the Julia and the project that the engine uses.

    Where a first step does not end within `limit` seconds, or fails, there is a ``"note"`` instead.
    """
    status = julia_setup.status()
    assert status.executable is not None
    assert status.project is not None
    paths = ["@", str(julia_setup.sources()), os.environ.get("PYRNODE_PEERS", ""), "@stdlib"]
    environment = os.environ | {"JULIA_LOAD_PATH": ":".join(filter(None, paths))}
    command = [status.executable, f"--project={status.project}", "--threads", str(torch.get_num_threads())]
    script = str(Path(__file__).with_name("peers.jl"))
    process = subprocess.Popen([*command, script, name, str(pairs)], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last, expired = "the start of Julia", threading.Event()

    def give_up() -> None:
        expired.set()
        process.kill()

    def watch() -> threading.Timer:
        timer = threading.Timer(limit, give_up)
        timer.start()
        return timer

    timer = watch()
    for line in process.stdout:
        timer.cancel()
        last = line.strip()
        print(f"{name}: {last}", file=sys.stderr)
        timer = watch()
    timer.cancel()
    code = process.wait()
    if expired.is_set():
        return {"note": f"nothing for {limit:g} s after: {last}"}
    if code:
        return {"note": f"exit code {code} after: {last}"}
    result: dict[str, Any] = json.loads(last)
    return result


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    records.json_argument(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS, help="beside whom (default: all)")
    parser.add_argument("--pairs", type=int, help="turns of each side (default: by case)")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for a peer's first step (default: 300)")
    args = parser.parse_args()
    julia_setup.require()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; Julia {julia_setup.status().version}")
    results: dict[str, Any] = {}
    if "first" in args.parts:
        results["first gradient, s"] = first_gradient()
        print(f"first gradient in a new process: {results['first gradient, s']:.1f} s", flush=True)
    if "engines" in args.parts:
        for case in CASES:
            results[case] = engines(case, args.pairs or TURNS[case])
            base = results[case]["torch Backprop"]
            for side, ms in results[case].items():
                print(f"{case:<10}{side:<28}{ms:>9.1f} ms{base / ms:>8.2f} times PyTorch's speed", flush=True)
    if "crossing" in args.parts:
        for case in CASES:
            for sensealg in ("Backprop", "InterpolatingAdjoint"):
                share = crossing(case, sensealg, repeats=REPEATS[case])
                results[f"crossing, {case}, {sensealg}"] = share
                text = (
                    f"{share['calls']:>9.2%} of the engine's time in the calls, {share['all']:.2%} outside the solves"
                )
                print(f"{case:<10}{sensealg:<28}{text}", flush=True)
    if "peers" in args.parts:
        results["peers"] = {name: peer(name, args.pairs or 5, args.limit) for name in args.peers}
        for name, found in results["peers"].items():
            if "note" in found:
                print(f"{name}: {found['note']}")
                continue
            for side, ms in found["milliseconds"].items():
                print(f"{name:<16}{side:<44}{ms:>11.1f} ms{found['bytes'][side]:>16,} bytes a step")
            print(f"RNODE allocates {found['bytes per evaluation']:,} bytes per evaluation")
    records.leave(args.json, results)


if __name__ == "__main__":
    main()
