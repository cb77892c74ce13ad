"""The reference page of the Julia package, made from the docstrings in julia/src/*.jl (a hook of mkdocs)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

PAGE = "reference/julia.md"
OWN = {"dynamics.jl": "Dynamics of your own", "flux.jl": "The layer"}
"""Files whose docstrings are shown beside what is exported, with the heading that they stand under."""

DOCSTRING = re.compile(
    r'^(?:"""\n(?P<long>(?:(?!""").*\n)+)"""|"(?P<short>(?:[^"\\\n]|\\.)+)")\n(?P<code>\S.*)$', flags=re.MULTILINE
)
DEFINED = re.compile(
    r"(?:Base\.@kwdef |@inline |@generated )*"
    r"(?:(?:abstract type|mutable struct|struct|const|function|module) )?(?P<name>[\w.]+!?)"
)


class Entry(NamedTuple):
    """A docstring, what it documents, and where it stands."""

    name: str
    text: str
    signature: str
    file: str
    line: int


def entries(path: Path) -> list[Entry]:
    """The docstrings of a file, in order."""
    source, found = path.read_text(encoding="utf-8"), []
    for match in DOCSTRING.finditer(source):
        name = DEFINED.match(match["code"])
        if name is None:
            raise ValueError(f"{path}: no name in {match['code']!r}, which follows a docstring")
        text, signature = match["long"] or match["short"], match["code"]
        if lines := re.match(
            r"(?:    .*\n)+(?=\n|\Z)", text + "\n"
        ):  # Julia's custom: the signature, indented, comes first
            signature, text = lines[0], text[lines.end() :]
            signature = "\n".join(line[4:] for line in signature.splitlines())
        found.append(Entry(name["name"], text.strip(), signature, path.name, source.count("\n", 0, match.start()) + 1))
    return found


def exported(source: str) -> list[str]:
    """The names that a module exports, in order."""
    lines = re.findall(r"^export (.+)$", source, flags=re.MULTILINE)
    return [name.strip() for line in lines for name in line.split(",")]


def page(folder: Path) -> str:
    """The page as Markdown, from the folder with the sources.

    Raises:
        ValueError: A name is exported and has no docstring.
    """
    module = folder / "RNODE.jl"
    documented = [entry for path in sorted(folder.glob("*.jl")) for entry in entries(path)]
    public = exported(module.read_text(encoding="utf-8"))
    if missing := set(public) - {entry.name for entry in documented}:
        raise ValueError(f"exported without a docstring: {', '.join(sorted(missing))}")
    head = next(entry for entry in documented if entry.name == "RNODE")
    parts = [
        "# Julia: the package RNODE",
        _without_references(head.text),
        "[The Julia engine](../julia.md) says how it is installed and used.",
    ]
    parts += ["## What it exports"]
    parts += [_shown([entry for entry in documented if entry.name == name]) for name in public]
    for file, heading in OWN.items():
        inner = [entry for entry in documented if entry.file == file and entry.name not in public]
        parts += [f"## {heading}", *(_shown([entry]) for entry in inner)]
    return "\n\n".join(parts) + "\n"


def _shown(same: list[Entry]) -> str:
    """What documents one name: a docstring, or one for each way to call it."""
    parts = [f"### `{same[0].name}`"]
    for entry in same:
        text = _without_references(entry.text)
        parts += [f"```julia\n{entry.signature}\n```", text, f"*julia/src/{entry.file}, line {entry.line}*"]
    return "\n\n".join(parts)


def _without_references(text: str) -> str:
    """Documenter's links between docstrings as plain names, which mkdocs takes for files, and its tests as code."""
    return re.sub(r"\[(`[^`]+`)\]\(@ref[^)]*\)", r"\1", text).replace("```jldoctest\n", "```julia-repl\n")


def on_files(files: Any, config: Any) -> Any:
    """Adds the page to those that mkdocs found."""
    from mkdocs.structure.files import File

    folder = Path(config.config_file_path).parent / "julia" / "src"
    files.append(File.generated(config, PAGE, content=page(folder)))
    return files
