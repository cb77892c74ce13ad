"""Held-out nats of pyrnode and of its peers on real tables, at equal training time on one core.

    python -m benchmarks.density --out runs/density.jsonl                60 s a run, three seeds: hours
    python -m benchmarks.density --out runs/density.jsonl --minutes 10 --tables diamonds weather
    python -m benchmarks.density --out runs/density.jsonl --models pyrnode \
        --ours 'defaults={}' --ours 'fast={"learning_rate": 0.01, "solver": "Midpoint"}'
    python -m benchmarks.density --out runs/density.jsonl --report

Each table, model, configuration and seed is a process of its own with one thread, and leaves a line of JSON in
``--out``. A run that is there is not repeated, so that a measurement can be interrupted, and goes on with the same
command. At the end, or with ``--report`` at any time, everything in the file is shown as a table. README.md says what
the numbers mean.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import tables
from benchmarks.density_models import CLOCKS, MODELS, train_pyrnode
from pyrnode import particles
from pyrnode.flow import Flow

SCORED = {"validation": 2_000, "test": 5_000}
"""Rows that are scored after training, the same for all models."""

FOLLOWED = 500
"""Test rows whose paths are followed."""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Line = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What one process does."""

    table: str
    model: str
    configuration: str
    seed: int
    budget: float
    clock: str
    settings: Mapping[str, Any]

    @property
    def key(self) -> str:
        """By which a run is found again."""
        return json.dumps(asdict(self), sort_keys=True)

    def __str__(self) -> str:
        return f"{self.table}, {self.model}:{self.configuration}, seed {self.seed}, {self.budget:g} s"


# -- one run -----------------------------------------------------------------------------------------------------------


def measure(run: Run, path: Path) -> Line:
    """Trains and scores; to be called in a process of its own."""
    torch.set_num_threads(1)
    table = tables.Table.read(path)
    fit = MODELS[run.model].fit if run.model in MODELS else train_pyrnode
    fitted = fit(table, run.budget, run.seed, clock=run.clock, **run.settings)
    validation = fitted.log_prob(table.validation[: SCORED["validation"]])
    test = fitted.log_prob(table.test[: SCORED["test"]])
    return {
        "seconds": round(fitted.seconds, 2),
        "steps": fitted.steps,
        "note": fitted.note,
        "validation": float(validation.mean()),
        "nats": float(test.mean()),
        "error": float(test.std() / math.sqrt(len(test))),
        "median": float(np.median(test)),
        "worst": float(test.min()),
        **({} if fitted.flow is None else movement(fitted.flow, table.test[:FOLLOWED])),
    }


@torch.no_grad()
def movement(flow: Flow, rows: tables.Array) -> dict[str, float]:
    """How a flow of ours moves rows ``(n, d)`` to the base, by its accurate solver, in its own space.

    ``weights``; ``evaluations`` of f; ``detour``, the median of path length over distance; ``variation`` of a
    particle's speed along its path, the mean; ``inversion``, the largest error of the way there and back.
    """
    x = torch.from_numpy(rows)
    _, states = particles.particle_paths(flow, x)
    passage = flow.solve(flow.admit(x)[0])
    return {
        "weights": sum(p.numel() for p in flow.parameters()),
        "evaluations": float(passage.nfe),
        "detour": float(particles.detours(states).median()),
        "variation": particles.speed_variation(states),
        "inversion": float((flow.unsolve(passage.z) - passage.y).abs().max()),
    }


def in_fresh_process(run: Run, path: Path) -> Line:
    """The line of a run; `failed` says why where there are no numbers."""
    command = [sys.executable, "-m", "benchmarks.density", "--run", run.key, str(path.resolve())]
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, **dict.fromkeys(THREADS, "1")}
    limit = 5 * run.budget + 1_800
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {limit:.0f} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    line: Line = json.loads(done.stdout.splitlines()[-1])
    return line if math.isfinite(line["nats"]) else {"failed": f"its nats are {line['nats']}"}


# -- all runs ----------------------------------------------------------------------------------------------------------


def wanted(args: argparse.Namespace) -> Iterator[Run]:
    """The runs that are asked for: all of one seed, then all of the next, so that there is soon a whole table."""
    budget = 60 * args.minutes if args.minutes else args.seconds
    configurations = {
        name: dict(islice(MODELS[name].configurations.items(), args.configurations)) if name in MODELS else args.ours
        for name in args.models
    }
    for seed, table, name in product(range(args.seeds), args.tables, args.models):
        for label, settings in configurations[name].items():
            yield Run(Path(table).stem, name, label, seed, budget, args.clock, settings)


def table_files(names: Iterable[str], folder: Path, data: Path | None) -> dict[str, Path]:
    """Files of the tables: those given as such, and the named ones, which are made where they are not there yet."""
    found = {}
    for name in names:
        path = Path(name) if name.endswith(".npz") else folder / f"{name}.npz"
        if not path.exists():
            try:
                table = tables.load(name, data)
            except tables.MissingError as error:
                print(f"{name}: not made ({error})")
                continue
            folder.mkdir(parents=True, exist_ok=True)
            table.save(path)
        found[path.stem] = path
    return found


def read(path: Path) -> list[Line]:
    """The lines so far; of a run that was repeated, the last."""
    if not path.exists():
        return []
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return list({key(line): line for line in lines}.values())


def key(line: Line) -> str:
    """The key of the run that left this line."""
    return Run(**{name: line[name] for name in Run.__dataclass_fields__}).key


def installed(names: Iterable[str]) -> list[str]:
    """Of the models those whose packages are here; the others are named."""
    found = []
    for name in names:
        required = MODELS[name].requires if name in MODELS else ()
        if missing := [package for package in required if find_spec(package) is None]:
            print(f"{name}: skipped (pip install {' '.join(missing)})")
        else:
            found.append(name)
    return found


def measure_all(args: argparse.Namespace) -> None:
    """Goes through the runs that are not in the file yet."""
    args.models = installed(args.models)
    files = table_files(args.tables, args.tables_dir or args.out.with_suffix(""), args.data_dir)
    done = {key(line) for line in read(args.out) if "failed" not in line}
    runs = [run for run in wanted(args) if run.table in files and run.key not in done]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for number, run in enumerate(runs, 1):
        line = in_fresh_process(run, files[run.table])
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**asdict(run), **line}) + "\n")
        said = line.get("failed") or f"{line['nats']:.3f} nats, {line['steps']} steps in {line['seconds']:.1f} s"
        print(f"[{number}/{len(runs)}] {run}: {said}", flush=True)


# -- the table ---------------------------------------------------------------------------------------------------------


def report(lines: list[Line]) -> str:
    """A Markdown table for each training time: mean ± standard error over the seeds, the best of a table in bold."""
    parts = []
    for budget in sorted({line["budget"] for line in lines}):
        of_budget = [line for line in lines if line["budget"] == budget]
        parts.append(f"{budget:g} s of training:\n\n{_table(of_budget)}")
        if moved := [line for line in of_budget if "detour" in line]:
            parts.append(_movements(moved))
    return "\n\n".join(parts)


def _movements(lines: list[Line]) -> str:
    """A row for each run of ours: what `movement` says of its paths."""
    head = ("table", "ours", "seed", "nats", "steps", "weights", "evaluations", "length / distance", "speed varies by")
    rows = ["| " + " | ".join((*head, "inversion error")) + " |", "|---" * (len(head) + 1) + "|"]
    for line in lines:
        text = f"{line['nats']:.2f}".replace("-", "−")
        counts = f"{line['steps']} | {line['weights']} | {line['evaluations']:.0f}"
        paths = f"{line['detour']:.3f} | {100 * line['variation']:.0f} % | {line['inversion']:.0e}"
        rows.append(f"| {line['table']} | {line['configuration']} | {line['seed']} | {text} | {counts} | {paths} |")
    return "\n".join(rows)


def _table(lines: list[Line]) -> str:
    grouped = _by_column(lines)
    columns = list(dict.fromkeys(column for cells in grouped.values() for column in cells))
    rows = [f"| table | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    chosen, failures = [], [f"{_title(line)}: {line['failed']}" for line in lines if "failed" in line]
    for table, cells in grouped.items():
        means = {column: statistics.fmean(line["nats"] for line in found) for column, found in cells.items()}
        texts = [_cell(cells[c], best=means[c] == max(means.values())) if c in cells else "" for c in columns]
        rows.append(f"| {table} | {' | '.join(texts)} |")
        if picked := [f"{c} {cells[c][0]['configuration']}" for c in columns if c in cells and c in MODELS]:
            chosen.append(f"{table}: {', '.join(picked)}")
    notes = ["Chosen by validation: " + "; ".join(chosen) + "."] if chosen else []
    notes += ["Failed: " + "; ".join(failures) + "."] if failures else []
    return "\n\n".join(["\n".join(rows), *notes])


def _by_column(lines: list[Line]) -> dict[str, dict[str, list[Line]]]:
    """The runs of each table's columns: of a peer, those of the configuration that validation prefers."""
    groups: dict[str, dict[str, dict[str, list[Line]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for line in lines:
        if "failed" not in line:
            column = line["model"] if line["model"] in MODELS else f"{line['model']} {line['configuration']}"
            groups[line["table"]][column][line["configuration"]].append(line)
    return {
        table: {
            column: max(found.values(), key=lambda runs: statistics.fmean(run["validation"] for run in runs))
            for column, found in columns.items()
        }
        for table, columns in groups.items()
    }


def _cell(lines: list[Line], *, best: bool) -> str:
    nats = [line["nats"] for line in lines]
    text = f"{statistics.fmean(nats):.2f}".replace("-", "−")
    text += f" ± {statistics.stdev(nats) / math.sqrt(len(nats)):.2f}" if len(nats) > 1 else ""
    return f"**{text}**" if best else text


def _title(line: Line) -> str:
    return str(Run(**{name: line[name] for name in Run.__dataclass_fields__}))


# -- the command -------------------------------------------------------------------------------------------------------


def _labelled(text: str) -> tuple[str, dict[str, Any]]:
    label, equals, settings = text.partition("=") if not text.startswith("{") else ("settings", "=", text)
    try:
        found = json.loads(settings)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected LABEL={{...}}, settings of pyrnode as JSON") from error
    if not equals or not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: expected LABEL={{...}}, settings of pyrnode as JSON")
    return label, found


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/density.jsonl"), help="file of results")
    parser.add_argument("--tables", nargs="+", default=list(tables.TABLES), help="names, or .npz files of your own")
    parser.add_argument("--tables-dir", type=Path, help="folder where tables are kept (default: --out, without .jsonl)")
    parser.add_argument("--data-dir", type=Path, help="folder of MNIST and cifar10-jpeg (default: PYRNODE_DATA)")
    parser.add_argument("--models", nargs="+", choices=["pyrnode", *MODELS], default=["pyrnode", *MODELS])
    parser.add_argument("--ours", action="append", type=_labelled, metavar="LABEL={...}", help="settings of pyrnode")
    parser.add_argument("--configurations", type=int, help="only the first so many of each peer's configurations")
    parser.add_argument("--seconds", type=float, default=60, help="training time of a run")
    parser.add_argument("--minutes", type=float, help="the same in minutes")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu counts the processor's time: on a busy machine"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--report", action="store_true", help="only show what is in the file")
    parser.add_argument("--run", nargs=2, metavar=("RUN", "TABLE"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.run:
        print(json.dumps(measure(Run(**json.loads(args.run[0])), Path(args.run[1]))))
        return
    args.ours = dict(args.ours or [("defaults", {})])
    if unknown := [name for name in args.tables if name not in tables.TABLES and not Path(name).is_file()]:
        parser.error(f"no such table: {', '.join(unknown)} (there are {', '.join(tables.TABLES)})")
    if not args.report:
        measure_all(args)
    print(report(read(args.out)))


if __name__ == "__main__":
    main()
