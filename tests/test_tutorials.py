"""The tutorials: whole, run in order when their outputs were taken, small, and run again here in a quick form."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

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


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)  # which is read again from TMPDIR
    monkeypatch.setenv("TUTORIAL_STEPS", "10")
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells(path, "code"), 1):
        exec(compile(code(cell), f"{path.name}, cell {number}", "exec"), names)
    if path.stem == "1_tables":
        assert names["p_malignant"].shape == (len(names["malignant"]),) == (212,)
        assert names["p_fresh"].min() >= 1 / 81
        assert (names["error"] > 0).all()
    else:
        assert names["page"].name == "comparison.html"
        assert names["page"].stat().st_size > 100_000


def test_the_site_lists_every_tutorial() -> None:
    listed = re.findall(r"(tutorials/\S+\.ipynb)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == [f"tutorials/{path.name}" for path in TUTORIALS]


def test_links_between_tutorials_lead_somewhere() -> None:
    for path in TUTORIALS:
        for cell in cells(path, "markdown"):
            for target in re.findall(r"\]\(([^)#\s]+)", "".join(cell["source"])):
                assert re.match(r"https?:", target) or (path.parent / target).is_file(), (path.name, target)
