"""Docstrings as the reference needs them (an extension of griffe, which reads them): names become links.

The docstrings are written to be read in a terminal, where a name in backticks is enough. Here such a name, looked up
where the docstring stands, is a link if the reference has it; doctests become code blocks.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Extension, Function, Module, NameResolutionError, Object

NAME = re.compile(r"(?<![`\w])`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)`(?!`)")
DOCTEST = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?P=indent)(?! *$).*)*", flags=re.MULTILINE)


def resolve(name: str, scope: Object) -> str | None:
    """The path of what a name means in the docstring of an object, if it is something of ours."""
    first, _, rest = name.partition(".")
    if first == "pyrnode":
        return name
    for place in (scope, scope.modules_collection["pyrnode"]):
        try:
            path = place.resolve(first)
        except NameResolutionError:
            continue
        if path.partition(".")[0] == "pyrnode":
            return f"{path}.{rest}" if rest else path
    return None


def linked(text: str, scope: Object) -> str:
    """The text with its names as links; one that no page has stays what it was (`optional`)."""

    def link(match: re.Match[str]) -> str:
        path = resolve(match[1], scope)
        # mkdocs-autorefs' own tag: [`name`][path] is an error where no page has the path
        return f'<autoref identifier="{path}" optional><code>{match[1]}</code></autoref>' if path else match[0]

    return NAME.sub(link, text)


def fenced(text: str) -> str:
    """Doctests in code blocks, where Markdown would see quotations; and ``::``, after which it needs none."""

    def fence(match: re.Match[str]) -> str:
        indent = match["indent"]
        return f"{indent}```pycon\n{match[0]}\n{indent}```"

    return re.sub(r"(?<=\w)::$", ":", DOCTEST.sub(fence, text), flags=re.MULTILINE)


class Crossrefs(Extension):
    """Rewrites every docstring once the whole package is read and names can be looked up."""

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        self._visit(pkg)

    def _visit(self, item: Object) -> None:
        if item.docstring is not None:
            parts = re.split(r"(^ *```pycon\n.*?^ *```$)", fenced(item.docstring.value), flags=re.MULTILINE | re.DOTALL)
            item.docstring.value = "".join(part if "```pycon" in part else linked(part, item) for part in parts)
        for member in item.members.values():
            if not member.is_alias and isinstance(member, Module | Class | Function | Object):
                self._visit(member)
