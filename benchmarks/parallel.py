"""Times training steps of one process and of two, in one run on one machine, and what of them is communication.

    python -m benchmarks.parallel [--cases mlp-512 mnist-8] [--rounds 3] [--json FILE]
    python -m benchmarks.parallel --scaling          a larger batch with a scaled rate, on a small case
    python -m benchmarks.parallel --memory           what each process holds of a table of 5 million rows

Three ways to use two cores: two processes with one thread each, one process with two threads, and, to compare with, one
with one. All are started first and wait; then each in turn takes a few steps. The share of communication is the time in
the sum over processes, waiting for the other included. docs/parallel.md says what the numbers mean.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyrnode
from benchmarks import records
from pyrnode import distributed
from pyrnode.config import Config
from pyrnode.data import load
from pyrnode.training.trainer import Trainer

CASES: dict[str, dict[str, Any]] = {
    "mlp-512": {"batch_size": 512, "data.samples": 5000},
    "mnist-8": {"batch_size": 8, "flow.blocks": 2, "flow.network.kind": "conv"},
    "mnist-32": {"batch_size": 32, "flow.blocks": 2, "flow.network.kind": "conv"},
}
STEPS = {"mlp-512": 20, "mnist-8": 1, "mnist-32": 1}
"""Steps in a turn."""

WAYS = {"two processes": (2, 1), "one process, two threads": (1, 2), "one process, one thread": (1, 1)}
"""Processes, and threads of each."""

COMMON: dict[str, Any] = {
    "engine": "torch",
    "device": "cpu",
    "solver": "RK4",
    "step_size": 0.25,
    "hidden": [64, 64, 64],
}
COMMON |= {"penalties.divergence": "hutchinson", "max_steps": 2**30, "validate_every": 2**30, "checkpoint_every": 2**30}


def data(case: str) -> Any:
    """The samples of a case: a density, or images of noise."""
    if case.startswith("mlp"):
        return "8gaussians"
    return torch.randint(0, 256, (200, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def steps_of(case: str) -> None:
    """Takes steps when it is told to, on standard input, and says what each took, in seconds; a process of a way."""
    config = Config().override({**COMMON, **CASES[case]})
    world = distributed.world()
    trainer = Trainer(config, load(data(case), config=config.data), None, progress=False, world=world)
    batches, original, waited = trainer._batches(), type(world).sum, 0.0

    def timed(self: distributed.World, values: Tensor, *, patient: bool) -> Tensor:
        nonlocal waited
        begun = time.perf_counter()
        result = original(self, values, patient=patient)
        waited += time.perf_counter() - begun
        return result

    type(world).sum = timed  # type: ignore[method-assign]
    volume = sum(p.nbytes for p in trainer.flow.parameters())
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            waited, begun, used = 0.0, time.perf_counter(), time.process_time()
            trainer._step(next(batches))
            seconds.append((time.perf_counter() - begun, time.process_time() - used, waited))
        print(json.dumps({"seconds": seconds, "volume": volume}), flush=True)


def start(case: str, processes: int, threads: int, stack: ExitStack) -> list[subprocess.Popen[str]]:
    """The processes of a way."""
    return launch(["--steps-of", case], processes, threads, stack)


def launch(arguments: list[str], processes: int, threads: int, stack: ExitStack) -> list[subprocess.Popen[str]]:
    """Processes of this program that reach one another."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(processes):
        there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
        environment = os.environ | {key: str(value) for key, value in there.items()}
        environment |= {"MASTER_PORT": port, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "benchmarks.parallel", *arguments]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment, **pipes))
        stack.callback(started[-1].kill)
    return started


def take(processes: list[subprocess.Popen[str]], count: int) -> list[dict[str, Any]]:
    """So many steps, by all processes of a way."""
    for process in processes:
        assert process.stdin is not None
        print(count, file=process.stdin, flush=True)
    return [json.loads(process.stdout.readline()) for process in processes if process.stdout is not None]


def measure(case: str, rounds: int) -> list[dict[str, Any]]:
    """A row a way."""
    with ExitStack() as stack:
        started = {name: start(case, *way, stack) for name, way in WAYS.items()}
        for processes in started.values():
            take(processes, 1)  # what is compiled and allocated at first
        found: dict[str, list[list[tuple[float, float, float]]]] = {name: [] for name in WAYS}
        for _ in range(rounds):
            for name, processes in started.items():
                told = take(processes, STEPS[case])
                found[name] += [list(step) for step in zip(*(rank["seconds"] for rank in told), strict=True)]
        volume = told[0]["volume"]
    rows = []
    for name, steps in found.items():
        wall = statistics.median(max(rank[0] for rank in step) for step in steps)
        used = statistics.median(sum(rank[1] for rank in step) for step in steps)
        share = statistics.median(max(rank[2] / rank[0] for rank in step) for step in steps)
        least = statistics.median(min(rank[2] for rank in step) for step in steps)
        row = {"case": case, "way": name, "ms": 1e3 * wall, "processor_ms": 1e3 * used, "steps": len(steps)}
        rows.append(row | {"share": share, "sum_ms": 1e3 * least, "volume": volume if WAYS[name][0] > 1 else 0})
    return rows


# -- memory ----------------------------------------------------------------------------------------------------------

ROWS, COLUMNS = 5_000_000, 20


def write_table(path: Path, rows: int) -> None:
    """A table of float32, in pieces."""
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    random, size = np.random.default_rng(0), 250_000
    parts = (random.normal(size=(min(size, rows - n), COLUMNS)).astype("f4") for n in range(0, rows, size))
    if path.suffix == ".npy":
        file = np.lib.format.open_memmap(path, mode="w+", dtype="f4", shape=(rows, COLUMNS))
        for number, part in enumerate(parts):
            file[number * size : number * size + len(part)] = part
        return
    writer = None
    for part in parts:
        table = pa.Table.from_pandas(pd.DataFrame(part, columns=[f"x{i}" for i in range(COLUMNS)]))
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table, row_group_size=size)
    assert writer is not None
    writer.close()


def anonymous() -> int:
    """Bytes of this process that no file stands for (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def memory_of(path: Path) -> None:
    """Trains for twenty steps; prints how much more this process held meanwhile than before, in MiB."""
    import threading

    torch.set_num_threads(1)
    before, peak, ended = anonymous(), 0, threading.Event()

    def look() -> None:
        nonlocal peak
        while not ended.wait(0.02):
            peak = max(peak, anonymous())

    thread = threading.Thread(target=look)
    thread.start()
    settings: dict[str, Any] = {"engine": "torch", "device": "cpu", "standardize": "whiten", "batch_size": 512}
    settings |= {"max_steps": 20, "validate_every": 20, "validation_limit": 1000, "hidden": [16, 16], "solver": "RK4"}
    settings |= {"step_size": 0.5, "penalties.divergence": "hutchinson", "warmup_steps": 0}
    pyrnode.train(path, preset=Config(), evaluate=False, progress=False, **settings)
    ended.set()
    thread.join()
    print(json.dumps({"peak_MiB": round((max(peak, anonymous()) - before) / 2**20)}), flush=True)


def memory(rows: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each kind of file and number of processes."""
    found = []
    for suffix in (".npy", ".parquet"):
        path = folder / f"table{suffix}"
        write_table(path, rows)
        for size in (1, 2, 3):
            with ExitStack() as stack:
                processes = launch(["--memory-of", str(path)], size, 1, stack)
                peaks = [json.loads(process.communicate()[0])["peak_MiB"] for process in processes]
            share = rows * COLUMNS * 4 / 2**20 / size
            found.append({"file": suffix, "processes": size, "a share, MiB": round(share), "each held, MiB": peaks})
        path.unlink()
    return found


# -- a larger batch --------------------------------------------------------------------------------------------------

BATCH, TIMES, SMALL_STEPS = 128, 8, 1200
RATES = {"batch b, rate r": (1, 1.0), "8b, r": (TIMES, 1.0), "8b, √8 r": (TIMES, TIMES**0.5), "8b, 8 r": (TIMES, 8.0)}


def scaling(quick: bool) -> list[dict[str, Any]]:
    """Runs that see as many samples in fewer steps, at rates as they are scaled."""
    rows = []
    for name, (times, factor) in RATES.items():
        steps = (40 if quick else SMALL_STEPS) // times
        settings: dict[str, Any] = {"batch_size": BATCH * times, "max_steps": steps, "learning_rate": 0.003 * factor}
        settings |= {"warmup_steps": steps // 10, "schedule": "cosine", "hidden": [32, 32], "validate_every": steps}
        flow: dict[str, Any] = {
            "engine": "torch",
            "device": "cpu",
            "data.samples": 20_000,
            "evaluate": False,
            "progress": False,
        }
        for seed in range(1 if quick else 2):
            result = pyrnode.train("8gaussians", preset="toy", seed=seed, **settings, **flow)
            value = next(r["validation"] for r in reversed(result.history) if "validation" in r)
            rows.append({"run": name, "steps": steps, "seed": seed, "validation": 2 * value})  # nats per sample
    return rows


def main() -> None:
    """Prints tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["mlp-512", "mnist-8"])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way (default 3)")
    parser.add_argument("--scaling", action="store_true", help="the larger batch instead")
    parser.add_argument("--quick", action="store_true", help="few steps of the larger batch")
    parser.add_argument("--memory", action="store_true", help="what each process holds of a large table")
    parser.add_argument("--rows", type=int, default=ROWS, help="of that table (default 5 million)")
    records.json_argument(parser)
    parser.add_argument("--steps-of", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of is not None:
        return memory_of(args.memory_of)
    if args.steps_of is not None:
        return steps_of(args.steps_of)
    print(f"load {os.getloadavg()[0]:.1f}")
    rows: list[dict[str, Any]] = []
    measured: Iterable[list[dict[str, Any]]] = (measure(case, args.rounds) for case in args.cases)
    if args.scaling:
        measured = [scaling(args.quick)]
    if args.memory:
        with tempfile.TemporaryDirectory() as folder:
            measured = [memory(args.rows, Path(folder))]
    for found in measured:
        print("|", " | ".join(found[0]), "|\n|" + "---|" * len(found[0]))
        for row in found:
            print(
                "|", " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()), "|", flush=True
            )
        rows += found
    records.leave(args.json, rows)


if __name__ == "__main__":
    main()
