"""The tutorials: whole, run in order when their outputs were taken, small, and run again here in a quick form."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pyrnode import julia_setup

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
LARGEST = 400_000
"""Bytes of a notebook with its outputs."""


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def code(cell: dict[str, Any]) -> str:
    """A cell's Python, without what only a notebook knows."""
    return "".join(line for line in cell["source"] if not line.startswith("%"))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_outputs_are_of_one_run_from_top_to_bottom_and_small(path: Path) -> None:
    numbers = [cell["execution_count"] for cell in cells(path, "code")]
    assert numbers == list(range(1, len(numbers) + 1))
    outputs = [output for cell in cells(path, "code") for output in cell["outputs"]]
    assert "error" not in {output["output_type"] for output in outputs}
    said = [line for output in outputs if output.get("name") == "stderr" for line in output["text"]]
    assert [line for line in said if not line.startswith("note: ")] == []  # no warning of Python's
    assert path.stat().st_size < LARGEST
    assert len(outputs) >= 5


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_explains_more_than_it_does(path: Path) -> None:
    prose = "".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    assert prose.startswith("# ")
    assert len(prose) > sum(len(code(cell)) for cell in cells(path, "code"))


def run(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that a tutorial's quick form leaves."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)  # which is read again from TMPDIR
    monkeypatch.setenv("TUTORIAL_STEPS", "10")
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells(path, "code"), 1):
        exec(compile(code(cell), f"{path.name}, cell {number}", "exec"), names)
    return names


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Julia is not there, whatever the machine has: its cells say so and the others run."""
    missing = julia_setup.JuliaStatus(ready=False, detail="Julia is not installed", remedy="pyrnode install-julia")
    monkeypatch.setattr(julia_setup, "status", lambda: missing)
    _CHECKS[path.stem](run(path, tmp_path, monkeypatch))


@pytest.mark.needs_julia
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tutorial_on_julia_runs_with_julia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run(ROOT / "docs" / "tutorials" / "5_julia.ipynb", tmp_path, monkeypatch)
    assert names["ready"]
    torch.testing.assert_close(names["theirs"], names["ours"], atol=5e-3, rtol=0)
    assert "InterpolatingAdjoint" in names["trained"].config.solver.sensealg


def _tables(names: dict[str, Any]) -> None:
    assert names["p_malignant"].shape == (len(names["malignant"]),) == (212,)
    assert names["p_fresh"].min() >= 1 / 81
    assert (names["error"] > 0).all()


def _page(names: dict[str, Any]) -> None:
    assert names["page"].name == "comparison.html"
    assert names["page"].stat().st_size > 100_000


def _simulations(names: dict[str, Any]) -> None:
    """The exact posterior is one: its log-density is that of the simulator at the observation, by Bayes' rule."""
    exact, log_p = names["exact"], names["log_p"]
    total, difference = exact.sum(1).abs() / 2**0.5, (exact[:, 1] - exact[:, 0]) / 2**0.5
    point = names["observed"] + torch.stack((total, -difference), 1) - torch.tensor([0.25, 0.0])  # the crescent's
    r = point.norm(dim=1)
    likelihood = torch.distributions.Normal(0.1, 0.01).log_prob(r) - (math.pi * r).log()
    offset = likelihood - log_p  # the evidence over the prior: one number
    torch.testing.assert_close(offset, offset.mean().expand_as(offset), atol=2e-3, rtol=0)
    for ranks in (names["found"], names["narrow"]):
        assert ranks.shape == (20, 3)
        assert 0 <= ranks.min() <= ranks.max() <= 1


def _inside_a_model(names: dict[str, Any]) -> None:
    """The truth is a density, both models were trained, and the exported file gives the model's numbers."""
    side = torch.linspace(-2, 2, 201)
    grid = torch.cartesian_prod(side, side)
    mass = names["truth"](names["one"].expand(len(grid), -1), grid).exp().sum() * float(side[1] - side[0]) ** 2
    assert float(mass) == pytest.approx(1, abs=1e-3)
    assert names["scores"].keys() == {"Gaussian", "flow"}
    assert all(0 < score < 10 for score in names["scores"].values())
    assert names["difference"] < 1e-3


def _julia(names: dict[str, Any]) -> None:
    assert {row.solver for row in names["table"]} == {"Euler", "Midpoint", "RK4", "DP5", "DP8"}
    assert names["why"] == "Julia is not installed; run: pyrnode install-julia"
    assert not {"julia", "trained"} & names.keys()


_CHECKS = {
    "1_tables": _tables,
    "2_images": _page,
    "3_simulations": _simulations,
    "4_inside_a_model": _inside_a_model,
    "5_julia": _julia,
    "6_choosing": _page,
}


def test_the_site_lists_every_tutorial() -> None:
    listed = re.findall(r"(tutorials/\S+\.ipynb)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == [f"tutorials/{path.name}" for path in TUTORIALS]


def test_links_between_tutorials_lead_somewhere() -> None:
    for path in TUTORIALS:
        for cell in cells(path, "markdown"):
            for target in re.findall(r"\]\(([^)#\s]+)", "".join(cell["source"])):
                assert re.match(r"https?:", target) or (path.parent / target).is_file(), (path.name, target)
