"""Every solver of Julia's against a tight reference: up to an hour, since each is compiled; PYRNODE_NIGHTLY=1 asks."""

from __future__ import annotations

import math
import os
import re
import subprocess
from pathlib import Path

import pytest

from pyrnode import julia_setup

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "solvers.md"
BOUND = 1e-3
"""What a method is off at most, of whatever order, with the steps and tolerances of ``tests/julia/solvers.jl``."""


def faults() -> dict[str, str]:
    """The methods that RNODE marks as wrong in OrdinaryDiffEq itself."""
    source = (ROOT / "julia" / "src" / "solvers.jl").read_text(encoding="utf-8")
    table = re.search(r"^const FAULTS = Dict\(\n((?:    .*\n)*)\)", source, flags=re.MULTILINE)
    assert table is not None
    return dict(re.findall(r'"([^"]+)" => "([^"]+)"', table[1]))


def shown() -> dict[str, list[str]]:
    """The rows of the table in the docs, by name."""
    rows = re.findall(r"^\| `([^`]+)` \| (.*) \|$", TABLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: rest.split(" | ") for name, rest in rows}


def test_the_table_marks_what_is_wrong_and_nothing_else() -> None:
    """What was measured is within the bound, or the method is marked, with the same words."""
    measured = shown()
    wrong = {name for name, (error, *_) in measured.items() if not float(error.replace("failed", "nan")) < BOUND}
    assert wrong == faults().keys() & measured.keys()
    assert {name: row[-1] for name, row in measured.items() if name in wrong} == {
        name: text for name, text in faults().items() if name in wrong
    }
    assert len(measured) >= 50


@pytest.mark.slow
@pytest.mark.needs_julia
@pytest.mark.timeout(7200)
def test_every_solver_is_right_or_marked(tmp_path: Path) -> None:
    if "PYRNODE_NIGHTLY" not in os.environ:
        pytest.skip("it takes up to an hour: PYRNODE_NIGHTLY=1 runs it")
    status = julia_setup.status()
    command = [str(status.executable), f"--project={status.project}", "--startup-file=no"]
    found = tmp_path / "solvers.txt"
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "julia" / "solvers.jl"), str(found)],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=7000,
    )
    assert done.returncode == 0, done.stderr[:4000]
    rows = [line.split("|") for line in found.read_text(encoding="utf-8").splitlines()]
    errors = {name: float(error) for name, error, *_ in rows}
    assert {name for name, error in errors.items() if math.isnan(error) or error > BOUND} == faults().keys()
    assert errors.keys() >= shown().keys() | faults().keys()
