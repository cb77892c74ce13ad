"""Every solver of Julia's against a tight reference: up to an hour, since each is compiled; PYRNODE_NIGHTLY=1 asks."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyrnode import julia_setup

ROOT = Path(__file__).parents[1]
BOUND = 2e-3
"""What a method is off at most, one of order 1 too, with the steps and tolerances of ``tests/julia/solvers.jl``."""
UNSEEN = {"Kvaerno4", "Kvaerno5", "RKV76IIa"}
"""Marked methods that come within the bound by many short steps; ``tests/julia/faults.jl`` sees what is wrong."""


def _tool() -> Any:
    spec = importlib.util.spec_from_file_location("solver_table", ROOT / "docs" / "tools" / "solver_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


TOOL = _tool()
PAGE = TOOL.PAGE.read_text(encoding="utf-8")


def nightly(script: str, *arguments: str) -> str:
    """What a long script of ``tests/julia`` prints."""
    if "PYRNODE_NIGHTLY" not in os.environ:
        pytest.skip("it takes up to an hour: PYRNODE_NIGHTLY=1 runs it")
    status = julia_setup.status()
    command = [str(status.executable), f"--project={status.project}", "--startup-file=no"]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "julia" / script), *arguments],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=7000,
    )
    assert done.returncode == 0, done.stderr[:4000]
    return done.stdout


def wrong(rows: list[Any]) -> set[str]:
    return {row.name for row in rows if not row.error < BOUND}


def test_the_table_marks_what_is_wrong_and_nothing_else() -> None:
    """What was measured is within the bound, or the method is marked, with the same words."""
    rows = TOOL.shown(PAGE)
    assert wrong(rows) == TOOL.faults().keys() - UNSEEN
    assert {row.name: row.fault for row in rows if row.fault} == TOOL.faults()
    assert len({row.name for row in rows}) == len(rows) >= 120
    assert TOOL.table_of(PAGE) == "\n" + TOOL.render(rows)


@pytest.mark.slow
@pytest.mark.needs_julia
@pytest.mark.timeout(7200)
def test_every_solver_is_right_or_marked(tmp_path: Path) -> None:
    """All that the table has are there; with ``PYRNODE_NIGHTLY=write`` the table is renewed."""
    nightly("solvers.jl", str(tmp_path / "solvers.txt"))
    rows = TOOL.measured(tmp_path / "solvers.txt")
    assert wrong(rows) == TOOL.faults().keys() - UNSEEN
    assert {row.name for row in rows} >= {row.name for row in TOOL.shown(PAGE)}
    if os.environ["PYRNODE_NIGHTLY"] == "write":
        TOOL.main(str(tmp_path / "solvers.txt"))


@pytest.mark.slow
@pytest.mark.needs_julia
@pytest.mark.timeout(7200)
def test_what_is_marked_is_wrong_without_pyrnode_too() -> None:
    """One line a method: what OrdinaryDiffEq alone makes of a problem of two dimensions."""
    found = {line.split("|")[0]: line for line in nightly("faults.jl").splitlines()}
    assert found.keys() == TOOL.faults().keys()
    assert {name for name, line in found.items() if not line.endswith("|wrong")} == set()
