"""How a benchmark leaves what it measured: one file of JSON with the numbers, and how they came about.

Every script that measures takes ``--json FILE`` (`json_argument`) and leaves its results there (`leave`). What
README.md and benchmarks/README.md say is in ``benchmarks/results``, written so; tests/test_numbers.py compares.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyrnode
from pyrnode import native
from pyrnode.config import Config
from pyrnode.files import write_atomically
from pyrnode.runs import versions

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Results = Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""Rows, or what there is by name."""


def json_argument(parser: argparse.ArgumentParser) -> None:
    """The option of every script that measures."""
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="leave the results there too, with machine, version, command and date"
    )


def leave(path: Path | None, results: Results) -> None:
    """Writes the results, if a file for them was named."""
    if path is None:
        return
    document = {
        "command": shlex.join(["python", "-m", _module(), *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": pyrnode.__version__,
        "commit": _commit(),
        "machine": machine(),
        "packages": versions(Config())["packages"],
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


def results(name: str) -> list[dict[str, Any]]:
    """The rows of a file of ``benchmarks/results``."""
    document = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = document["results"]
    return rows


def machine() -> dict[str, Any]:
    """What it was measured on, and how busy that was in the last minute."""
    about = versions(Config())
    return {
        "processor": _processor(),
        "instructions": about["processor"],
        "cores": os.cpu_count(),
        "threads": about["threads"],
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "system": about["platform"],
        "python": about["python"],
        "compiler": native.compiler() if native.enabled() else f"none ({native.VARIABLE}=0)",
    }


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [" | ".join(row) for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {line} |" for line in lines)])


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return getattr(spec, "name", None) or Path(sys.argv[0]).stem


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str | None:
    """The commit that was measured, with a + where files of the package or the benchmarks differ from it."""
    try:
        asked = ["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", "pyrnode", "benchmarks/*.py"]
        said = [
            subprocess.run(["git", *what], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for what in asked
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return said[0] + ("+" if said[1] else "")
