"""A convolutional training step on a machine that is busy with something else, with one thread and with two.

    python -m benchmarks.busy [--repeats N] [--loops 0 1 2] [--threads 1 2] [--width 16] [--batch 16]

Beside so many busy loops (``while 1: pass``, started here and ended here) a step of five blocks on 28×28 images (RK4,
step 0.25, one probe, both penalties) is taken with each number of threads in turn. Times are medians of a step's, by
the clock and of the processor's; the ratio is the median, over the turns, of the first number's time over the other's:
below 1 where more threads are slower. README.md says what came out.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks import records
from pyrnode import native
from pyrnode.config import Config, Divergence
from pyrnode.flow import Flow
from pyrnode.objective import objective


class Row(NamedTuple):
    """What a number of threads took beside so many loops, milliseconds, and the first number's time over it."""

    loops: int
    threads: int
    wall: float
    cpu: float
    ratio: float


@contextlib.contextmanager
def busy(loops: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many processes that compute without end, ended with the block."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        processes += (subprocess.Popen([sys.executable, "-c", "while 1: pass"]) for _ in range(loops))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def make(width: int, batch: int, *, size: int = 28, blocks: int = 5) -> Callable[[], None]:
    """A training step; the last layers, which start at zero, are moved away from it."""
    settings = {"hidden": (width,) * 3, "blocks": blocks, "scales": 1, "standardize": "none", "step_size": 0.25}
    config = Config().override(settings)
    flow = Flow.build(config, (1, size, size))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in flow.parameters():
            if not bool(parameter.any()):
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    x = torch.randn(batch, 1, size, size, generator=generator)
    draw = flow.draw(Divergence("hutchinson"), generator)

    def step() -> None:
        flow.zero_grad()
        objective(flow.solve(x, draw, config.solver, verified=False), config.penalties).loss.backward()

    return step


def measure(step: Callable[[], None], loops: int, threads: list[int], repeats: int) -> list[Row]:
    """A row for each number of threads, which take turns."""
    wall: dict[int, list[float]] = {number: [] for number in threads}
    cpu: dict[int, list[float]] = {number: [] for number in threads}
    before = torch.get_num_threads()
    try:
        with busy(loops):
            for turn in range(repeats + 1):
                for number in threads:
                    torch.set_num_threads(number)
                    begun, spent = time.perf_counter(), time.process_time()
                    step()
                    if turn:  # the first one does not count
                        wall[number].append(1e3 * (time.perf_counter() - begun))
                        cpu[number].append(1e3 * (time.process_time() - spent))
    finally:
        torch.set_num_threads(before)
    first = wall[threads[0]]
    rows = []
    for number in threads:
        ratio = statistics.median(a / b for a, b in zip(first, wall[number], strict=True))
        rows.append(Row(loops, number, statistics.median(wall[number]), statistics.median(cpu[number]), ratio))
    return rows


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as README.md has them: a row for each load, the numbers of threads beside one another."""
    words = {1: "one thread", 2: "two threads"}
    threads = list(dict.fromkeys(r["threads"] for r in results))
    rows = []
    for loops in dict.fromkeys(r["loops"] for r in results):
        found = {r["threads"]: r for r in results if r["loops"] == loops}
        times = [f"{found[n]['wall']:.0f}, {found[n]['cpu']:.0f} ms" for n in threads]
        rows.append([str(loops), *times, f"{found[threads[-1]]['ratio']:.2f}"])
    heads = [f"{words.get(n, f'{n} threads')}: clock, processor" for n in threads]
    return records.markdown(["busy loops more", *heads, "ratio"], rows)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="turns (default %(default)s)")
    parser.add_argument("--loops", type=int, nargs="+", default=[0, 1, 2], help="busy loops beside it")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--width", type=int, default=16, help="channels of the hidden layers (default %(default)s)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=28, help="of the images (default %(default)s)")
    records.json_argument(parser)
    args = parser.parse_args()
    step = make(args.width, args.batch, size=args.size)
    print(f"torch {torch.__version__}; {native.compiler()}; width {args.width}, batch {args.batch}, {args.size} pixels")
    print(f"{'loops':>6}{'threads':>9}{'wall':>12}{'processor':>12}{'ratio':>8}")
    results = list[dict[str, Any]]()
    for loops in args.loops:
        for row in measure(step, loops, args.threads, args.repeats):
            times = f"{row.wall:>10.0f}ms{row.cpu:>10.0f}ms"
            print(f"{row.loops:>6}{row.threads:>9}{times}{row.ratio:>8.2f}", flush=True)
            results.append(row._asdict())
    print(f"\n{table(results)}")
    records.leave(args.json, results)


if __name__ == "__main__":
    main()
