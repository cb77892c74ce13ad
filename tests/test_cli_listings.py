"""The commands that list what there is: presets, solvers and their sensitivities, and what a machine lacks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import pyrnode
from pyrnode import cli, julia_setup
from pyrnode.config import Config
from pyrnode.julia_setup import JuliaStatus
from pyrnode.solvers import USES, SolverInfo


def run(*arguments: str) -> int:
    return cli.main([*arguments])


@pytest.mark.parametrize("name", sorted(pyrnode.presets()))
def test_a_preset_is_printed_as_toml_that_gives_it_back(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("presets", name) == 0
    (tmp_path / "copy.toml").write_text(capsys.readouterr().out)
    assert Config.preset(str(tmp_path / "copy.toml")) == Config.preset(name)
    assert run("presets", name, "--json") == 0
    assert Config.from_dict(json.loads(capsys.readouterr().out)) == Config.preset(name)


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("presets") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(pyrnode.presets())
    assert run("presets", "--json") == 0
    assert json.loads(capsys.readouterr().out) == pyrnode.presets()


ORDERS = {"Euler": 1, "Midpoint": 2, "Heun": 2, "SSPRK33": 3, "RK4": 4, "BS3": 3, "DP5": 5, "Tsit5": 5, "DP8": 8}
ABSENT = JuliaStatus(False, "juliacall is not installed", "pip install 'pyrnode[julia]'")


def test_solvers_of_pytorch_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("solvers", "--engine", "torch", "--json") == 0
    table = json.loads(capsys.readouterr().out)
    assert {row["name"]: row["order"] for row in table["solvers"]} == ORDERS
    assert {(row["engine"], row["package"]) for row in table["solvers"]} == {("torch", "pyrnode")}
    assert {"Backprop", "BacksolveAdjoint"} <= set(table["sensitivities"])
    assert table["missing"] is None
    assert run("solvers", "--engine", "torch") == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split() == ["solver", "engine", "order", "kind", "package", "description"]
    listed = [
        line.split()[:3] for line in lines if " torch " in line and "Backprop" not in line and "Adjoint" not in line
    ]
    groups = ["Euler Midpoint Heun RK4", "BS3", "DP5 Tsit5", "DP8", "SSPRK33"]
    assert listed == [[name, "torch", str(ORDERS[name])] for group in groups for name in group.split()]
    headings = [lines[i + 1] for i, line in enumerate(lines[:-1]) if line == ""]
    assert headings[0] == "training on a grid of steps"
    assert headings[-2].startswith("made for discretised PDEs")
    assert headings[-1].startswith("sensitivity")
    assert [use in USES for use in headings] == [True] * 5 + [False]
    assert "Julia" not in captured.out + captured.err


def test_solvers_of_a_julia_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(julia_setup, "status", lambda: ABSENT)
    reason = "juliacall is not installed; run: pip install 'pyrnode[julia]'"
    assert run("solvers") == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == f"the solvers of Julia are not listed: {reason}"
    assert captured.err == ""
    assert run("solvers", "--json") == 0
    table = json.loads(capsys.readouterr().out)
    assert (len(table["solvers"]), table["missing"]) == (len(ORDERS), {"julia": reason})
    assert run("solvers", "--engine", "julia") == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"pyrnode: the Julia engine cannot be started: {reason}\n")


def test_solvers_of_both_engines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    moulton = "OrdinaryDiffEqAdamsBashforthMoulton"
    rows: list[dict[str, Any]] = [
        {"name": "Rodas5P", "order": 5, "kind": "stiff, adaptive", "package": "OrdinaryDiffEqRosenbrock"},
        {"name": "VCABM", "order": 0, "kind": "multistep, adaptive", "package": moulton},
    ]
    rows = [{**row, "description": "from Julia"} for row in rows]
    infos = [SolverInfo(**row) for row in rows]
    fake = ModuleType("pyrnode.engines.julia")
    adjoints = {"BacksolveAdjoint": "backwards", "GaussAdjoint": "by Gauss quadrature"}
    engine = SimpleNamespace(solvers=lambda: infos, sensitivities=lambda: adjoints)
    monkeypatch.setattr(fake, "JuliaEngine", lambda: engine, raising=False)
    monkeypatch.setitem(sys.modules, "pyrnode.engines.julia", fake)
    monkeypatch.setattr(julia_setup, "status", lambda: JuliaStatus(True, "Julia 1.10.8"))
    assert run("solvers", "--json") == 0
    captured = capsys.readouterr()
    table = json.loads(captured.out)
    further = [{"use": "stiff dynamics of few dimensions"}, {"use": "expensive dynamics: few evaluations a step"}]
    expected = [{**row, "engine": "julia", "fault": "", **use} for row, use in zip(rows, further, strict=True)]
    assert table["solvers"][len(ORDERS) :] == expected
    assert table["missing"] is None
    assert list(table["sensitivities"]) == ["Backprop", "BacksolveAdjoint", "GaussAdjoint"]
    assert table["sensitivities"]["BacksolveAdjoint"].keys() == {"torch", "julia"}
    assert table["sensitivities"]["GaussAdjoint"] == {"julia": "by Gauss quadrature"}
    assert captured.err == ""
    assert run("solvers", "--engine", "julia") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines if "from Julia" in line] == [
        ["VCABM", "julia", "0"],
        ["Rodas5P", "julia", "5"],
    ]
    assert [line for line in lines if line in USES] == [use["use"] for use in further[::-1]]
    assert len({line.index("from Julia") for line in lines if "from Julia" in line}) == 1  # columns are columns
    assert [line.split()[:2] for line in lines[-3:]] == [
        ["sensitivity", "engine"],
        ["BacksolveAdjoint", "julia"],
        ["GaussAdjoint", "julia"],
    ]
    assert run("solvers", "--engine", "torch") == 0
    assert "julia" not in capsys.readouterr().out


@pytest.mark.needs_julia
def test_solvers_of_julia_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("solvers", "--engine", "julia", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["solvers"]}
    for name, order in ORDERS.items():
        assert (rows[name]["order"], rows[name]["engine"]) == (order, "julia")
    assert len(rows) > 200
    assert rows["Kvaerno3"]["description"] == (
        "from OrdinaryDiffEqSDIRK; of order 1 where time enters, in OrdinaryDiffEq itself: "
        "a stage has the wrong time; take KenCarp3"
    )
    assert rows["AutoTsit5(Rosenbrock23)"]["kind"] == "explicit or stiff, adaptive"
    uses = {
        name: rows[name]["use"] for name in ("RK4", "Tsit5", "Vern9", "VCABM", "ROCK4", "FBDF", "SSPRK33", "Kvaerno3")
    }
    assert list(uses.values()) == [
        "training on a grid of steps",
        "steps of its own, middling tolerances",
        "steps of its own, tight tolerances (1e-7 and below)",
        "expensive dynamics: few evaluations a step",
        "mildly stiff dynamics of many dimensions",
        "stiff dynamics of few dimensions",
        "made for discretised PDEs (little memory, strong stability)",
        "known to be wrong: take another",
    ]
    assert {row["use"] for row in rows.values()} == {*USES}


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code = run("doctor", "--json")
    checks = json.loads(capsys.readouterr().out)
    assert code == int(any(check["status"] == "problem" for check in checks))
    assert any("torch" in json.dumps(check) for check in checks)
    assert run("doctor") == code
    assert torch.__version__.split("+")[0] in capsys.readouterr().out
