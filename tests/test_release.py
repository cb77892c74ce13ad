"""What a release is made of: versions that agree, notes of the CHANGELOG, a recipe with pyproject's requirements."""

from __future__ import annotations

import hashlib
import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
RECIPE_TEXT = (ROOT / "conda" / "recipe.yaml").read_text(encoding="utf-8")
RECIPE = yaml.safe_load(RECIPE_TEXT)
USERS = ("julia", "tables", "onnx")
"""Extras that are for users; the others are for developers."""
CONDA = {"torch": "pytorch", "matplotlib": "matplotlib-base", "juliacall": "pyjuliacall"}
"""What conda-forge calls otherwise."""


def release() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / ".ci" / "release.py"))


def bounds(texts: list[str]) -> dict[str, frozenset[str]]:
    """Names and bounds of requirements, by conda-forge's names."""
    parsed = map(Requirement, texts)
    return {CONDA.get(r.name, r.name): frozenset(map(str, r.specifier)) for r in parsed}


def of_recipe(lines: list[str]) -> dict[str, frozenset[str]]:
    pairs = (line.partition(" ") for line in lines if not line.startswith("python "))
    return {name: frozenset(given.split(",")) for name, _, given in pairs}


# -- conda-forge -----------------------------------------------------------------------------------------------------


def test_the_recipe_requires_what_pyproject_does() -> None:
    assert of_recipe(RECIPE["requirements"]["run"]) == bounds(PROJECT["dependencies"])
    optional = [text for extra in USERS for text in PROJECT["optional-dependencies"][extra]]
    assert of_recipe(RECIPE["requirements"]["run_constraints"]) == bounds(optional)
    host = [line for line in RECIPE["requirements"]["host"] if line != "pip"]
    assert of_recipe(host) == bounds(PYPROJECT["build-system"]["requires"])


def test_the_recipe_has_pyprojects_python_version_command_and_licence() -> None:
    context = RECIPE["context"]
    assert context["version"] == PROJECT["version"]
    assert f">={context['python_min']}" == PROJECT["requires-python"]
    assert "python >=${{ python_min }}" in RECIPE["requirements"]["run"]
    commands = [f"{name} = {target}" for name, target in PROJECT["scripts"].items()]
    assert RECIPE["build"]["python"]["entry_points"] == commands
    assert RECIPE["about"]["license"] == PROJECT["license"]
    assert [RECIPE["about"]["license_file"]] == PROJECT["license-files"]
    assert RECIPE["source"]["url"].endswith("/p/pyrnode/pyrnode-${{ version }}.tar.gz")


def test_rattler_build_reads_the_recipe(tmp_path: Path) -> None:
    """The parser and the renderer of the program that conda-forge builds with."""
    rattler = pytest.importorskip("rattler_build", reason="py-rattler-build is not installed (pip install it)")
    (tmp_path / "sdist").write_bytes(b"the files")
    (tmp_path / "recipe.yaml").write_text(release()["recipe"](RECIPE_TEXT, tmp_path / "sdist"), encoding="utf-8")
    (variant,) = rattler.Stage0Recipe.from_file(tmp_path / "recipe.yaml").render(rattler.VariantConfig())
    rendered = variant.recipe.to_dict()
    assert rendered["package"] == {"name": PROJECT["name"], "version": PROJECT["version"]}
    assert rendered["build"]["noarch"] == "python"
    assert rendered["source"][0]["url"].endswith(f"/pyrnode-{PROJECT['version']}.tar.gz")
    assert f"python {PROJECT['requires-python']}" in rendered["requirements"]["run"]
    assert of_recipe(rendered["requirements"]["run"]) == bounds(PROJECT["dependencies"])
    assert "${{" not in str({key: value for key, value in rendered.items() if key != "build"})


def test_the_recipe_of_a_release_has_the_digest_of_its_sdist(tmp_path: Path) -> None:
    (tmp_path / "sdist").write_bytes(b"the files")
    filled = release()["recipe"](RECIPE_TEXT, tmp_path / "sdist")
    expected = hashlib.sha256(b"the files").hexdigest()
    assert yaml.safe_load(filled) == RECIPE | {"source": RECIPE["source"] | {"sha256": expected}}
    with pytest.raises(SystemExit, match="to be filled in"):
        release()["recipe"](filled, tmp_path / "sdist")


# -- versions and notes ----------------------------------------------------------------------------------------------


def test_every_file_names_one_version() -> None:
    assert release()["version"](ROOT) == PROJECT["version"]


@pytest.mark.parametrize("place", ["pyrnode/version.py", "CITATION.cff", "conda/recipe.yaml"])
def test_a_version_that_was_forgotten_is_named(place: str, tmp_path: Path) -> None:
    for name in ("pyproject.toml", "pyrnode/version.py", "CITATION.cff", "conda/recipe.yaml"):
        text = (ROOT / name).read_text(encoding="utf-8")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text.replace(PROJECT["version"], "9.9.9", 1) if name == place else text)
    with pytest.raises(SystemExit, match=rf"{place} has version 9\.9\.9, pyproject\.toml {PROJECT['version']}"):
        release()["version"](tmp_path)


CHANGES = """# Changelog

## [Unreleased]

### Added

- what comes

## [1.1.0] - 2027-01-02

- new

## [1.0.0] - 2026-12-01

- old
"""


def test_notes_are_the_versions_own_section() -> None:
    notes = release()["notes"]
    assert notes(CHANGES, "1.1.0") == "# pyrnode 1.1.0\n\n- new\n"
    assert notes(CHANGES, "1.0.0") == "# pyrnode 1.0.0\n\n- old\n"
    draft = "# pyrnode 2.0.0\n\n*Draft: CHANGELOG.md has no section [2.0.0] yet.*\n\n### Added\n\n- what comes\n"
    assert notes(CHANGES, "2.0.0") == draft
    with pytest.raises(SystemExit, match=r"nothing under \[2\.0\.0\]"):
        notes("# Changelog\n\n## [Unreleased]\n\n", "2.0.0")
    assert notes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), PROJECT["version"]).count("\n") > 20


def test_a_release_writes_notes_and_recipe_beside_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["release.py", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"tar\.gz is not there"):
        release()["main"]()
    for end in (".tar.gz", "-py3-none-any.whl"):
        (tmp_path / f"pyrnode-{PROJECT['version']}{end}").write_bytes(b"file")
    assert release()["main"]() == 0
    assert {path.name for path in tmp_path.iterdir()} > {"notes.md", "recipe.yaml"}


def test_make_release_publishes_nothing() -> None:
    rule = re.search(r"^release:.*?(?=^\S+:|\Z)", (ROOT / "Makefile").read_text(), re.MULTILINE | re.DOTALL)
    assert rule is not None
    assert "twine check --strict" in rule[0]
    assert "upload" not in rule[0]


# -- what users are told ---------------------------------------------------------------------------------------------


def test_the_page_on_installing_lists_every_extra_with_what_it_brings() -> None:
    page = (ROOT / "docs" / "installing.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `pyrnode\[(\w+)\]` \| (.*?) \|", page, re.MULTILINE))
    extras = PROJECT["optional-dependencies"]
    assert list(rows) == list(USERS)
    assert set(extras) - set(rows) == {"test", "dev", "docs"}
    for extra, packages in rows.items():
        assert re.findall(r"\w+", packages) == [Requirement(text).name for text in extras[extra]]
