"""Adaptive solves of a trained 2-D flow by the kernel, beside the same by torch's operations (``PYRNODE_NATIVE=0``).

    python -m benchmarks.adaptive [--repeats N] [--threads N]

A training step, `log_prob` with the exact trace and `sample`, by DP5 at tolerance 1e-5 and, for what a fixed step
costs, by RK4 with step 0.25. The two sides take turns in one process, and the ratio is the median over the pairs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

import pyrnode
from benchmarks import records
from pyrnode import native
from pyrnode.config import Config, Divergence, SolverConfig
from pyrnode.flow import Flow
from pyrnode.objective import objective

SOLVERS = (SolverConfig(name="DP5", rtol=1e-5, atol=1e-5), SolverConfig(name="RK4", step_size=0.25))


def cases(flow: Flow, solver: SolverConfig) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    x = torch.as_tensor(flow.sample(2000, seed=1), dtype=torch.float32)
    penalties = Config().penalties
    draw = flow.draw(Divergence("hutchinson"), torch.Generator().manual_seed(2))

    def step() -> None:
        flow.zero_grad()
        objective(flow.solve(x[:512], draw, solver), penalties).loss.backward()

    return {
        "training step, 512": step,
        "log_prob, 2000": lambda: flow.log_prob(x, solver=solver),
        "sample, 2000": lambda: flow.sample(2000, seed=1, solver=solver),
    }


def milliseconds(work: Callable[[], object], *, kernels: bool) -> float:
    """The time of one call, with the kernels or without."""
    os.environ[native.VARIABLE] = str(int(kernels))
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as README.md has them."""
    rows, before = [], None
    for r in results:
        work, comma, number = r["case"].partition(", ")
        name = r["case"] if work.startswith("training") else f"`{work}`{comma}{number.replace('2000', '2,000')}"
        times = [f"{r[key]:.1f} ms" for key in ("kernel_ms", "torch_ms")]
        ratio = f"{r['ratio']:.2f} ({r['low']:.2f}–{r['high']:.2f})"
        rows.append(["" if r["solver"] == before else r["solver"], name, *times, ratio])
        before = r["solver"]
    return records.markdown(["solver", "case", "kernel", "torch's operations", "ratio (min–max)"], rows)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    records.json_argument(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings: dict[str, Any] = {"engine": "torch", "device": "cpu", "max_steps": 600, "samples": 4000, "seed": 0}
    flow = pyrnode.train("8gaussians", progress=False, evaluate=False, **settings).flow
    print(f"torch {torch.__version__}, {args.threads} thread(s); {native.compiler()}")
    print(f"{'solver':<8}{'case':<20}{'kernel':>10}{'torch':>10}{'ratio (min-max)':>22}")
    results = list[dict[str, Any]]()
    for solver in SOLVERS:
        for name, work in cases(flow, solver).items():
            pairs = [
                [milliseconds(work, kernels=kernels) for kernels in (True, False)] for _ in range(args.repeats + 1)
            ]
            ours, theirs = (statistics.median(side) for side in zip(*pairs[1:], strict=True))
            ratios = sorted(b / a for a, b in pairs[1:])
            row = {"solver": solver.name, "case": name, "kernel_ms": ours, "torch_ms": theirs}
            results.append(row | {"ratio": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]})
            ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
            print(f"{solver.name:<8}{name:<20}{ours:>8.1f}ms{theirs:>8.1f}ms{ratio:>22}", flush=True)
    print(f"\n{table(results)}")
    records.leave(args.json, results)


if __name__ == "__main__":
    main()
