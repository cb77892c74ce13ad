"""The numbers of whole runs, for README.md: scores, steps and times, out of the files that the runs leave.

    python -m benchmarks.runs demo --json benchmarks/results/demo.json            runs `pyrnode demo`, and times it
    python -m benchmarks.runs first-look --json benchmarks/results/first-look.json README's first example, in full
    python -m benchmarks.runs runs/mnist --json benchmarks/results/mnist.json      reads a run that is there

Where a run was made in several goes, its times are of all of them, and the machine's line that of the reading.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import records
from pyrnode.runs import RunFolder


def numbers(folder: Path) -> dict[str, Any]:
    """What a finished run came to."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    about = json.loads((folder / "versions.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    config = RunFolder(folder).stored_config()
    assert config is not None
    steps = [line for line in lines if "loss" in line]
    pauses = [b["seconds"] - a["seconds"] for a, b in itertools.pairwise(steps) if b["step"] == a["step"] + 1]
    return {
        "data": config.data.name,
        "command": " ".join(["pyrnode", *about["command"][1:]]),
        "instructions": about["processor"],
        "threads": about["threads"],
        "steps": steps[-1]["step"],
        "batch_size": config.training.batch_size,
        "seconds": steps[-1]["seconds"],
        "seconds_per_step": statistics.median(pauses),
        "report": report,
    }


def demo(folder: Path) -> list[dict[str, Any]]:
    """Runs the demo, as `make demo` does once everything is installed."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "pyrnode", "demo", "--out", str(folder)], check=True)
    taken = time.perf_counter() - begun
    return [numbers(folder / name) | {"demo_seconds": taken} for name in ("digits", "8gaussians")]


def first_look(folder: Path) -> list[dict[str, Any]]:
    """README's first example without ``max_steps``."""
    command = [sys.executable, "-m", "pyrnode", "train", "moons", "--set", "seed=1", "--out", str(folder)]
    subprocess.run(command, check=True)
    return [numbers(folder)]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", help="demo, first-look, or the folder of a run")
    records.json_argument(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        made = {"demo": demo, "first-look": first_look}.get(args.what)
        rows = [numbers(Path(args.what))] if made is None else made(Path(scratch) / args.what)
    for row in rows:
        score = row["report"]["score"]
        print(f"{row['data']}: {row['steps']} steps, {row['seconds']:.0f} s, {score['nats']:.4f} nats per sample")
    records.leave(args.json, rows)


if __name__ == "__main__":
    main()
