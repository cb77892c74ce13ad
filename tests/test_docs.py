"""What a reader goes by: the reference has every public name once, links lead somewhere, the citation is up to date.

The site itself is built by ``make docs``, which fails on whatever mkdocs warns of; nothing here needs mkdocs.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import re
import tomllib
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import pyrnode
from docs.tools import julia_page
from pyrnode import errors

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")), ROOT / "benchmarks" / "README.md"]
FENCED = re.compile(r"^ *```.*?^ *```$", flags=re.MULTILINE | re.DOTALL)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


# -- the reference ---------------------------------------------------------------------------------------------------


def found(path: str) -> Any:
    """What a dotted path names: an attribute, or a module that nothing has imported yet."""
    name, *rest = path.split(".")
    item: Any = importlib.import_module(name)
    for part in rest:
        name = f"{name}.{part}"
        try:
            item = getattr(item, part)
        except AttributeError:
            item = importlib.import_module(name)
    return item


def identity(path: str) -> str:
    """One name for the same thing under several: where it is defined; constants have but the path."""
    item = found(path)
    if isinstance(item, ModuleType):
        return item.__name__
    if inspect.isclass(item) or inspect.isfunction(item):
        return f"{item.__module__}.{item.__qualname__}"
    return path


def documented() -> list[str]:
    """The paths that the reference's pages are made from, ``::: path``."""
    return [
        path
        for page in sorted((DOCS / "reference").glob("*.md"))
        for path in re.findall(r"^::: (\S+)$", text_of(page), re.MULTILINE)
    ]


def demanded(paths: list[str]) -> set[str]:
    """What the package, and each module that has a page, say that they offer; and every error."""
    modules = [pyrnode, *(item for item in map(found, paths) if isinstance(item, ModuleType))]
    names = {f"{module.__name__}.{name}" for module in modules for name in getattr(module, "__all__", ())}
    raised = {
        name for name, item in vars(errors).items() if inspect.isclass(item) and issubclass(item, Exception | Warning)
    }
    return {identity(path) for path in names | {f"pyrnode.errors.{name}" for name in raised}}


def test_the_reference_has_every_public_name_once() -> None:
    paths = documented()
    times = Counter(map(identity, paths))
    assert {name: count for name, count in times.items() if count != 1} == {}
    assert demanded(paths) - times.keys() == set()


def described_constants() -> set[str]:
    """Names that a file of the package assigns, with a text on the next line."""
    names = set()
    for path in (ROOT / "pyrnode").rglob("*.py"):
        body = ast.parse(text_of(path)).body
        for item, after in itertools.pairwise(body):
            targets = item.targets if isinstance(item, ast.Assign) else [getattr(item, "target", None)]
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_what_the_reference_shows_has_a_docstring() -> None:
    constants = described_constants()
    paths = [(path, found(path)) for path in documented()]
    bare = [path for path, item in paths if not isinstance(item, dict) and not inspect.getdoc(item)]
    assert bare == []
    assert {path.rpartition(".")[2] for path, item in paths if isinstance(item, dict)} - constants == set()


def test_the_contents_list_every_page() -> None:
    listed = re.findall(r"([\w/]+\.md)$", text_of(ROOT / "mkdocs.yml"), flags=re.MULTILINE)
    there = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert sorted(listed) == sorted(there | {julia_page.PAGE})


def test_the_site_is_light_or_dark_as_the_reader_has_it_and_asks_nobody_for_fonts() -> None:
    """Looked at in a browser in November 2026: until then it was light always, and asked Google."""
    theme = re.search(r"^theme:\n((?:  .*\n)+)", text_of(ROOT / "mkdocs.yml"), re.MULTILINE)
    assert theme is not None
    settings = yaml.safe_load(theme[1])
    assert settings["font"] is False
    assert [entry.get("scheme") for entry in settings["palette"]] == [None, "default", "slate"]
    assert all(entry["media"].startswith("(prefers-color-scheme") for entry in settings["palette"])


# -- Julia -----------------------------------------------------------------------------------------------------------


def test_the_page_on_julia_has_every_exported_name_once_with_its_text() -> None:
    page = julia_page.page(ROOT / "julia" / "src")
    headings = re.findall(r"^### `(.+)`$", page, flags=re.MULTILINE)
    assert Counter(headings).most_common(1)[0][1] == 1
    exported = julia_page.exported(text_of(ROOT / "julia" / "src" / "RNODE.jl"))
    assert len(exported) > 8
    assert headings[: len(exported)] == exported
    assert "Directions in which the Jacobian is probed" in page  # of a docstring on one line,
    assert "differentiated by the adjoints of SciMLSensitivity" in page  # of one on several,
    assert "```julia\nRNODELayer(dynamics, tspan=(0.0f0, 1.0f0);" in page  # and its signature where it begins with one


def test_a_name_that_julia_exports_without_a_docstring_is_an_error(tmp_path: Path) -> None:
    source = '"""\n    RNODE\n\nText.\n"""\nmodule RNODE\nexport one, two\n"Is said."\none(x) = x\ntwo(x) = x\nend\n'
    (tmp_path / "RNODE.jl").write_text(source, encoding="utf-8")
    with pytest.raises(ValueError, match="without a docstring: two"):
        julia_page.page(tmp_path)


# -- links and commands ----------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The headings' anchors, as GitHub and mkdocs make them of words."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def broken(page: Path) -> list[str]:
    """The relative links of a page whose file, or heading in it, is not there."""
    bad = []
    for target in re.findall(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)", FENCED.sub("", text_of(page))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors(text_of(path))):
            bad.append(target)
    return bad


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda path: path.name)
def test_the_names_that_prose_gives_in_full_are_there(page: Path) -> None:
    missing = []
    for name in re.findall(r"`(pyrnode(?:\.\w+)+)[`(]", FENCED.sub("", text_of(page))):
        try:
            found(name)
        except ModuleNotFoundError:
            missing.append(name)
    assert missing == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# Where: it is!\n\n```\n# not a heading\n```\n", encoding="utf-8")
    page = tmp_path / "a.md"
    page.write_text(
        "[good](b.md) [good](b.md#where-it-is) [good](https://example.org/x.md) [own](#here) ![none](no.png)\n\n"
        "[none](c.md) [none](b.md#not-a-heading)\n\n# Here\n\n```\n[no link](d.md)\n```\n",
        encoding="utf-8",
    )
    assert broken(page) == ["no.png", "c.md", "b.md#not-a-heading"]


def test_the_readme_begins_with_the_demo_and_the_tests_and_names_no_other_targets() -> None:
    targets = set(re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), flags=re.MULTILINE))
    named = re.findall(r"(?:^    |`)make ([\w-]+)", text_of(ROOT / "README.md"), flags=re.MULTILINE)
    assert named[:2] == ["demo", "test"]
    assert set(named) <= targets


def test_the_tests_that_the_readme_names_are_there() -> None:
    named = re.findall(r"\[`(\w+)`\]\((tests/\w+\.py)\)", text_of(ROOT / "README.md"))
    assert len(named) >= 8
    assert [name for name, file in named if f"def {name}(" not in text_of(ROOT / file)] == []


# -- the citation ----------------------------------------------------------------------------------------------------


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    citation = yaml.safe_load(text_of(ROOT / "CITATION.cff"))
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what the format demands
    assert str(citation["version"]) == pyrnode.__version__
    assert citation["license"] == project["license"]
    assert citation["authors"] == project["authors"]
    (paper,) = citation["references"]
    assert paper["year"] == 2020
    assert [author["family-names"] for author in paper["authors"]] == ["Finlay", "Jacobsen", "Nurbekyan", "Oberman"]
    assert paper["identifiers"] == [{"type": "other", "value": "arXiv:2002.02798"}]
