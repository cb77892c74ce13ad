"""What a step of SOAP costs beside one of Adam: time, and what the optimiser keeps.

    python -m benchmarks.optimisers [--cases table wide-table mnist-cpu] [--repeats 8] [--json FILE]

Both train the same preset on noise of its data's shape, with the preset's network and batch, and RK4 in one step. Their
steps take turns, on one thread. Times are medians of the processor's; the ratio is the median over the turns. SOAP
refreshes its bases at every tenth step: turns are of ten steps, so that each has one.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from benchmarks import records
from pyrnode.config import Config
from pyrnode.data import Splits, TensorSamples
from pyrnode.training.trainer import Trainer

CASES: dict[str, tuple[int, ...]] = {"table": (8,), "wide-table": (60,), "mnist-cpu": (1, 28, 28)}
"""Presets, and the shape of a sample."""

TURN = 10
"""Steps of a turn: as many as SOAP has between two refreshments."""


def trainer(preset: str, optimizer: str) -> Trainer:
    """A run of a preset, with numbers for λ and a solver that stays."""
    shape, generator = CASES[preset], torch.Generator().manual_seed(0)
    images = len(shape) == 3
    values = torch.randint(0, 256, (600, *shape), generator=generator, dtype=torch.uint8)
    samples = TensorSamples(values if images else torch.randn(600, *shape, generator=generator))
    splits = Splits("noise", samples, samples, samples, shape, 256 if images else None)
    settings = {"engine": "torch", "optimizer": optimizer, "solver": {"name": "RK4", "step_size": 1.0}, "minutes": None}
    return Trainer(Config.preset(preset).override(settings), splits, None, progress=False)


def steps(subject: Trainer) -> Iterator[float]:
    """The processor's seconds of one turn after another, a step."""
    batches = subject._batches()
    while True:
        begun = time.process_time()
        for batch in itertools.islice(batches, TURN):
            subject._step(batch)
        yield (time.process_time() - begun) / TURN


def measure(case: str, repeats: int) -> dict[str, Any]:
    """A row: milliseconds of a step, and MiB that the optimiser keeps."""
    subjects = {name: trainer(case, name) for name in ("adam", "soap")}
    turns = {name: steps(subject) for name, subject in subjects.items()}
    pairs = [[next(turns[name]) for name in ("adam", "soap")] for _ in range(repeats + 1)][1:]
    kept = {
        name: sum(v.nbytes for s in subject.state.optimizer.state.values() for v in s.values()) / 2**20
        for name, subject in subjects.items()
    }
    return {
        "case": case,
        **{f"{name}_ms": 1e3 * statistics.median(pair[i] for pair in pairs) for i, name in enumerate(subjects)},
        "ratio": statistics.median(soap / adam for adam, soap in pairs),
        **{f"{name}_mib": kept[name] for name in subjects},
    }


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as README.md has them."""
    heads = ["preset", "Adam, ms a step", "SOAP, ms a step", "ratio", "Adam keeps, MiB", "SOAP keeps, MiB"]
    rows = []
    for r in results:
        times, kept = ([f"{r[f'{name}_{unit}']:.1f}" for name in ("adam", "soap")] for unit in ("ms", "mib"))
        rows.append([r["case"], *times, f"{r['ratio']:.2f}", *kept])
    return records.markdown(heads, rows)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=8, help="turns of ten steps each (default %(default)s)")
    records.json_argument(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(case, args.repeats) for case in args.cases]
    print(table(rows))
    records.leave(args.json, rows)


if __name__ == "__main__":
    main()
