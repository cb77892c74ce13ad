"""Times a training step of pyrnode beside the standard construction, in one run on one machine.

    python -m benchmarks.speed                 all cases, a table
    python -m benchmarks.speed --json out.json --cases mlp-512 mnist-8
    python -m benchmarks.speed --device cuda --cases mnist-32 mnist-200

Both sides have the same network, batch, time grid (RK4, step 0.25, one block after the other), one Gaussian probe and
both penalties, and compute the loss and the gradient of every parameter. Steps alternate between the two sides in one
process, and the ratio is the median over the pairs; peak memory is the growth of the resident set over five steps, each
side in a fresh process of its own. On a GPU times are those of its events, and memory is the device's. README.md says
what the numbers mean.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import records
from benchmarks.clock import Step, device_mib, milliseconds, peak_mib
from benchmarks.reference import ReferenceImageFlow, ReferenceMLPFlow
from pyrnode.config import Config, Divergence
from pyrnode.devices import resolve_device
from pyrnode.flow import Flow
from pyrnode.objective import objective
from pyrnode.precision import own_precision

CASES = {"mlp-512": 512, "mnist-8": 8, "mnist-32": 32, "mnist-200": 200}
PAIRS = {"mlp-512": 60, "mnist-8": 7, "mnist-32": 3, "mnist-200": 3}
SIDES = ("pyrnode", "adjoint", "backprop")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Result:
    """One case: pyrnode against one way of differentiating the standard construction."""

    case: str
    reference: str
    pyrnode_ms: float
    reference_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    pyrnode_mib: float
    reference_mib: float
    attained: float | None


def _data(case: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (2,) if case.startswith("mlp") else (1, 28, 28)
    return torch.randn(CASES[case], *shape, generator=generator)


def _perturb(module: torch.nn.Module) -> None:
    """Moves the zero-initialised layers away from zero, as a few steps of training do."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if not bool(parameter.any()):
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))


def pyrnode_step(case: str, device: torch.device = CPU) -> Step:
    """A training step of pyrnode."""
    settings = {"blocks": 1 if case.startswith("mlp") else 2}
    config = Config().override({**settings, "standardize": "none", "step_size": 0.25})
    x = _data(case).to(device)
    flow = Flow.build(config, tuple(x.shape[1:]))
    _perturb(flow)
    flow.to(device)
    draw = flow.draw(Divergence("hutchinson"), torch.Generator(device).manual_seed(2))

    def step() -> None:
        flow.zero_grad()
        objective(flow.solve(x, draw, config.solver, verified=False), config.penalties).loss.backward()

    return step


def reference_step(case: str, gradients: str, device: torch.device = CPU) -> Step:
    """A training step of the standard construction; `gradients` is ``"adjoint"`` or ``"backprop"``."""
    options: dict[str, Any] = {"gradients": gradients, "step_size": 0.25}
    x = _data(case).to(device)
    flow = ReferenceMLPFlow(2, **options) if case.startswith("mlp") else ReferenceImageFlow(**options)
    _perturb(flow)
    flow.to(device)
    generator = torch.Generator(device).manual_seed(2)

    def step() -> None:
        flow.zero_grad()
        flow.loss(x, generator).backward()

    return step


def _make(case: str, side: str, device: torch.device) -> Step:
    return pyrnode_step(case, device) if side == "pyrnode" else reference_step(case, side, device)


def memory(case: str, side: str) -> float:
    """Growth of the resident set over five steps, MiB; to be called once in a fresh process."""
    step = _make(case, side, CPU)
    torch.nn.functional.conv2d(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 3, 3))  # the libraries' own start-up
    before = peak_mib()
    for _ in range(5):
        step()
    return peak_mib() - before


def throughput(batch: int, device: torch.device) -> float:
    """Multiply-adds per second ×2 of a 64-channel 3×3 convolution on 28×28 images, channels last (FLOP/s).

    In IEEE float32, as a solve computes.
    """
    x = torch.randn(batch, 64, 28, 28, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    with own_precision(x):
        times = [milliseconds(lambda: torch.nn.functional.conv2d(x, weight, padding=1), device) for _ in range(60)]
    seconds = [1e-3 * time for time in times]
    return 2 * x.numel() * 64 * 9 / statistics.median(seconds[10:])


def arithmetic(case: str) -> float:
    """Operations that a step cannot do without: six products with each weight in each of 16 evaluations (FLOP)."""
    config = Config().override({"blocks": 2})
    flow = Flow.build(config, (1, 28, 28))
    per_sample = 0
    for block in flow.blocks:
        _, height, width = block.dynamics.event_shape
        weights = sum(p.numel() for name, p in block.dynamics.named_parameters() if name.endswith(".weight"))
        per_sample += weights * height * width
    return 2.0 * per_sample * 6 * 16 * CASES[case]


def measure(case: str, pairs: int, device: torch.device) -> list[Result]:
    """Times all sides of a case, one step of each in turn."""
    steps = {side: _make(case, side, device) for side in SIDES}
    for step in steps.values():
        step()
    table: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(pairs):
        for side, step in steps.items():
            table[side].append(milliseconds(step, device))
    attained = None
    if case.startswith("mnist"):
        attained = arithmetic(case) / (statistics.median(table["pyrnode"]) / 1e3) / throughput(CASES[case], device)
    if device.type == "cuda":
        peak = {side: device_mib(step, device) for side, step in steps.items()}
    else:
        peak = {side: _in_fresh_process(case, side) for side in SIDES}
    results = []
    for side in SIDES[1:]:
        ratios = sorted(b / a for a, b in zip(table["pyrnode"], table[side], strict=True))
        ours, theirs = statistics.median(table["pyrnode"]), statistics.median(table[side])
        span = (ratios[0], ratios[-1])
        results.append(
            Result(case, side, ours, theirs, statistics.median(ratios), *span, peak["pyrnode"], peak[side], attained)
        )
    return results


def _in_fresh_process(case: str, side: str) -> float:
    command = [sys.executable, "-m", "benchmarks.speed", "--memory", case, side]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


NAMES = {
    "mlp-512": "2-D MLP 64-64-64, batch 512",
    "mnist-8": "MNIST, width 64, 10 blocks, batch 8",
    "mnist-32": "the same, batch 32",
    "mnist-200": "the same, batch 200",
}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as README.md has them."""
    rows = []
    for r in results:
        first = r["reference"] == SIDES[1]
        ratio = f"{r['ratio']:.2f} ({r['ratio_low']:.2f}–{r['ratio_high']:.2f})"
        attained = "" if r["attained"] is None else f"{r['attained']:.0%}".replace("%", " %")
        times = [f"{r[key]:.{1 if r[key] < 100 else 0}f} ms" for key in ("pyrnode_ms", "reference_ms")]
        mib = f"{r['pyrnode_mib']:.0f} vs {r['reference_mib']:.0f}"
        rows.append([NAMES[r["case"]] if first else "", r["reference"], *times, ratio, mib, attained])
    head = ["case", "against", "pyrnode", "theirs", "ratio (min–max)", "peak memory, MiB", "attained"]
    return records.markdown(head, rows)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: on a CPU all but mnist-200")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    parser.add_argument("--pairs", type=int, help="steps of each side (default: by case)")
    records.json_argument(parser)
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print(memory(*args.memory))
        return
    device = resolve_device(args.device)
    where = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    print(f"torch {torch.__version__}, {where}; pyrnode against torchdiffeq + nested autograd")
    names = f"{'case':<10}{'against':<10}{'pyrnode':>10}{'theirs':>10}{'ratio (min-max)':>20}"
    print(f"{names}{'peak memory, MiB':>22}{'attained':>10}")
    results = []
    usual = [case for case in CASES if device.type != "cpu" or CASES[case] != 200]
    for case in args.cases or usual:
        for r in measure(case, args.pairs or PAIRS[case], device):
            results.append(r)
            attained = "" if r.attained is None else f"{r.attained:.0%}"
            ratio = f"{r.ratio:.2f} ({r.ratio_low:.2f}-{r.ratio_high:.2f})"
            mib = f"{r.pyrnode_mib:.0f} vs {r.reference_mib:.0f}"
            times = f"{r.pyrnode_ms:>8.1f}ms{r.reference_ms:>8.1f}ms"
            print(f"{r.case:<10}{r.reference:<10}{times}{ratio:>20}{mib:>22}{attained:>10}", flush=True)
    rows = [asdict(r) | {"device": device.type} for r in results]
    print(f"\n{table(rows)}")
    records.leave(args.json, rows)
    assert all(math.isfinite(r.ratio) for r in results)


if __name__ == "__main__":
    main()
